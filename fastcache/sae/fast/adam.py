"""Adam with clipping and unit decoder rows in one pass over the parameters."""

from collections.abc import Iterable
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from fastcache.sae.fast import adam_kernels as kernels
from fastcache.sae.fast import gpu
from fastcache.sae.fast.dense import arrays
from fastcache.sae.fast.threads import spread


class FastAdam(torch.optim.Adam):
    """torch's Adam with the same state, and a step that clips, projects and normalises on its way.

    That step needs compiled loops and parameters on a CPU or, with `by_triton`, float32 on a GPU.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float, by_triton: bool = False
    ) -> None:
        # torch's fused Adam keeps the number of steps on the GPU, and to ask for it is to wait.
        super().__init__(parameters, lr=lr, betas=(0.9, 0.999), fused=not by_triton)
        self._by_triton = by_triton

    # torch wraps these for torch.compile, and the wrappers import what it needs: seconds, for nothing that is used here.
    add_param_group = unwrap(torch.optim.Adam.add_param_group)
    state_dict = unwrap(torch.optim.Adam.state_dict)
    load_state_dict = unwrap(torch.optim.Adam.load_state_dict)

    def step(self, closure: Any = None) -> Any:
        """See `torch.optim.Adam.step`."""
        for parameter in self.state:
            self._lay_out(parameter)
        return super().step(closure)

    def _lay_out(self, parameter: Tensor) -> dict[str, Any]:
        """Its state, with the moments in memory as the parameter is, which neither loading nor a change of it cares for."""
        state: dict[str, Any] = self.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state and state[name].stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(state[name])
        return state

    @torch.no_grad()
    def clipped_step(self, clip_norm: float, unit_rows: nn.Parameter | None) -> None:
        """One step, after the gradients were clipped to a norm of `clip_norm` together (0: not).

        `unit_rows` has rows of unit norm, and keeps them: see `adam_kernels.adam`.
        """
        pairs = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [_flat(p.grad, p) for _, p in pairs]
        scale = grads[0].new_ones(())
        if clip_norm:
            norm = torch.nn.utils.get_total_norm(grads) if self._by_triton else _norm(grads)
            scale = (clip_norm / (norm + 1e-6)).clamp(max=1)  # NaN stays what it is, and shows
        for group, parameter in pairs:
            self._update(parameter, group, scale, parameter is unit_rows)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], scale: Tensor, unit_rows: bool) -> None:
        state = self._lay_out(parameter)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        (beta1, beta2), t = group["betas"], float(state["step"])
        weights = _flat(parameter, parameter)
        rest = 1 - beta1, 1 - beta2, group["lr"] / (1 - beta1**t), (1 - beta2**t) ** 0.5, group["eps"]
        mean, square = (_flat(state[name], parameter) for name in ("exp_avg", "exp_avg_sq"))
        tensors = weights, _flat(parameter.grad, parameter), mean, square
        if self._by_triton:
            gpu.adam_rows(*tensors, scale, rest, unit_rows)
            return
        number = weights.numpy().dtype.type
        spread(kernels.adam, len(weights), *arrays(*tensors), *map(number, (float(scale), *rest)), unit_rows)


def _flat(tensor: Tensor | None, parameter: nn.Parameter) -> Tensor:
    """`tensor` as rows in the order of the parameter's memory; a vector as one row."""
    assert tensor is not None  # noqa: S101 - the caller has looked
    if parameter.dim() == 1:
        return tensor.detach().contiguous()[None]
    laid_out = tensor if parameter.is_contiguous() else tensor.T
    return laid_out.detach().contiguous()


def _norm(grads: list[Tensor]) -> Tensor:
    """Of all together."""
    sums = []
    for one in grads:
        squares = torch.empty(len(one), dtype=one.dtype)
        spread(kernels.squared_norms, len(one), *arrays(one, squares))
        sums.append(squares.sum(dtype=torch.double))
    return torch.stack(sums).sum().sqrt()
