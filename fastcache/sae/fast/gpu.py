"""The passes of a step on a GPU, by Triton. Used only where they were seen to agree with torch's operations."""

import errno
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastcache.errors import SpaceError
from fastcache.memory import is_lack_of_memory
from fastcache.sae.fast.buffers import Buffers
from fastcache.sae.fast.dense import Forward, TorchOps
from fastcache.sae.fast.threads import compiles, numba

ROWS, COLUMNS = 16, 128
"""Of a tile."""
N_GROUPS = 64
VECTOR_COLUMNS = 1024
"""A vector is updated in rows of so many numbers."""
TOLERANCE = 1e-4

PASSING_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO)


@cache
def _kernels() -> ModuleType:
    """The kernels; raises `ImportError` where there is no Triton."""
    from fastcache.sae.fast import triton_kernels

    return triton_kernels


class TritonOps:
    """What `TorchOps` is, a kernel for each pass. Sums are in float32."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers

    def _launch(self, name: str, values: Tensor, *arguments: Any) -> None:
        """Run a kernel over `values` `[n, columns]`."""
        n, d = values.shape
        size, n_groups = _groups(n)
        grid = (-(-d // COLUMNS), n_groups)
        getattr(_kernels(), name)[grid](*arguments, n, d, size, ROWS=ROWS, COLUMNS=COLUMNS)

    def _sums(self, name: str, like: Tensor) -> Tensor:
        return self._buffers.get(name, _groups(len(like))[1], like.shape[1])

    def relu(self, z: Tensor) -> Forward:
        """See `CompiledOps.relu`."""
        sums, counts = self._sums("sums", z), self._sums("counts", z)
        self._launch("relu_forward", z, z, sums, counts)
        per_latent = counts.sum(0)
        return Forward(per_latent, sums.sum(0), z[:0], per_latent.sum())

    def relu_backward(self, grad: Tensor, acts: Tensor) -> Tensor:
        """See `CompiledOps.relu_backward`."""
        sums = self._sums("sums", grad)
        self._launch("relu_backward", grad, grad, acts, sums)
        return sums.sum(0)

    def jump(self, z: Tensor, theta: Tensor, bandwidth: float) -> Forward:
        """See `CompiledOps.jump`."""
        counts, n_tiles = self._sums("counts", z), -(-z.shape[1] // COLUMNS)
        row_counts, entries = (self._buffers.get(name, n_tiles, len(z)) for name in ("row_counts", "row_entries"))
        self._launch("jump_forward", z, z, theta, bandwidth / 2, counts, row_counts, entries)
        return Forward(counts.sum(0), z[:0], row_counts.sum(0), entries.sum())

    def jump_backward(
        self, grad: Tensor, acts: Tensor, theta: Tensor, bandwidth: float, penalty: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `CompiledOps.jump_backward`."""
        sums, theta_sums = self._sums("sums", grad), self._sums("counts", grad)
        given = theta, bandwidth / 2, 1 / bandwidth, penalty
        self._launch("jump_backward", grad, grad, acts, *given, sums, theta_sums)
        return sums.sum(0), theta_sums.sum(0)

    def residual(self, recon: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See `CompiledOps.residual`."""
        squares, sums = self._sums("squares", x), self._sums("error_sums", x)
        self._launch("residual", recon, recon, x, scale, squares, sums)
        return squares.sum(), sums.sum(0)


def _groups(n: int) -> tuple[int, int]:
    """Rows in a group, a multiple of a tile's, and number of groups, for a batch of n."""
    size = -(-n // (N_GROUPS * ROWS)) * ROWS
    return size, -(-n // size)


def adam_rows(
    weights: Tensor, grads: Tensor, mean: Tensor, square: Tensor, clip: Tensor, rest: tuple[float, ...], unit_rows: bool
) -> None:
    """A step of Adam on `[rows, columns]` of float32, all contiguous; see `adam_kernels.adam`.

    `clip` is a tensor of one number, so that nobody waits for it; `rest` the numbers that follow it there.
    """
    n, d = weights.shape
    if n == 1 and not unit_rows:
        n, d = -(-d // VECTOR_COLUMNS), VECTOR_COLUMNS
    columns = 1 << (d - 1).bit_length()
    given = weights, grads, mean, square, clip, *rest, weights.numel(), d
    _kernels().adam[(n,)](*given, UNIT_ROWS=unit_rows, COLUMNS=columns)


@cache
def trouble(device: torch.device) -> str | None:
    """Why the kernels can't be used on `device`; None: they can.

    They are compared with torch's operations first: a Triton that doesn't fit the driver or the card fails in many ways. Raises
    `SpaceError` for what is wrong at this moment only: without the kernels the run would have other bits than tomorrow.
    """
    if device.type != "cuda":
        return "they are for CUDA"
    try:
        return None if agree(device) else "they don't agree with torch's operations here"
    except Exception as error:  # whatever is wrong with them, torch's operations do
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if not _passes_by(error):
            return reason
        raise SpaceError(
            f"The GPU kernels can't be tried on {device}: {reason}. Free some memory of the GPU and space on the disk, and run "
            "the same command again."
        ) from error


def _passes_by(error: Exception) -> bool:
    """Whether `error` says something about this moment, and not about this machine."""
    return is_lack_of_memory(error) or (isinstance(error, OSError) and error.errno in PASSING_ERRORS)


def passes(device: torch.device) -> str:
    """What computes the passes of a fast step on `device`: triton, numba or torch."""
    if device.type == "cuda":
        return "torch" if trouble(device) else f"triton {_kernels().triton.__version__}"
    return f"numba {numba.__version__}" if compiles and device.type == "cpu" else "torch"


def agree(device: torch.device) -> bool:
    """Whether all passes come to the same by Triton and by torch's operations."""
    by_triton, by_torch = (_every_pass(ops(Buffers(device)), device) for ops in (TritonOps, TorchOps))
    found = [*by_triton, _adam_step(adam_rows, device)], [*by_torch, _adam_step(_adam_by_torch, device)]
    return all(torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE) for one, other in zip(*found, strict=True))


def _every_pass(ops: TritonOps | TorchOps, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, relu_grad, jump_grad = (torch.randn(100, 300, generator=generator).to(device) for _ in range(3))
    x, recon = (torch.randn(100, 70, generator=generator).to(device) for _ in range(2))
    theta, penalty = torch.full((300,), 0.5, device=device), torch.linspace(-1, 1, 100, device=device)
    relu, jump = z.clone(), z.clone()
    made = [*ops.relu(relu), ops.relu_backward(relu_grad, relu), relu, relu_grad]
    made += [*ops.jump(jump, theta, 0.4)[:3], *ops.jump_backward(jump_grad, jump, theta, 0.4, penalty), jump, jump_grad]
    return [*made, *ops.residual(recon, x, 0.3), recon]


def _adam_step(step: Any, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weights, grads, mean = (torch.randn(20, 70, generator=generator).to(device) for _ in range(3))
    weights /= weights.norm(dim=1, keepdim=True)
    clip = torch.full((1,), 0.5, device=device)
    step(weights, grads, mean, mean.square(), clip, (0.1, 0.001, 0.01, 0.9, 1e-8), True)
    return weights


def _adam_by_torch(
    weights: Tensor, grads: Tensor, mean: Tensor, square: Tensor, clip: Tensor, rest: tuple[float, ...], _unit: bool
) -> None:
    rest1, rest2, rate, correction, eps = rest
    grads = clip * (grads - (grads * weights).sum(1, keepdim=True) * weights)
    mean, square = mean.lerp(grads, rest1), square.lerp(grads.square(), rest2)
    weights -= rate * mean / (square.sqrt() / correction + eps)
    weights /= weights.norm(dim=1, keepdim=True)
