"""Triton's kernels, in its interpreter: no GPU is needed for what they compute."""

import os
import subprocess
import sys
import textwrap

import pytest
import reference_sae
import torch
from test_fast_training import recipe_of, trained
from test_gradients import DEAD, random_sae

from fastcache.errors import SpaceError
from fastcache.sae.architectures import StepInputs
from fastcache.sae.fast import gpu
from fastcache.sae.fast.buffers import Buffers
from fastcache.sae.fast.dense import TorchOps
from fastcache.sae.fast.step import fast_step

CPU = torch.device("cpu")


pytest.importorskip("triton")  # interpreted: see conftest.py


def test_the_check_finds_that_they_agree_with_torch():
    assert gpu.agree(CPU)


@pytest.mark.parametrize("name", ["relu_forward", "relu_backward", "jump_forward", "jump_backward", "residual", "adam"])
def test_the_check_finds_a_kernel_that_does_nothing(name, monkeypatch):
    class Nothing:
        def __getitem__(self, _grid):
            return lambda *_, **__: None

    monkeypatch.setattr(gpu._kernels(), name, Nothing())
    assert not gpu.agree(CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (17, 129), (1100, 40), (5, 300)])
def test_passes_are_those_of_torch_for_any_shape(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    values, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    theta, penalty = torch.rand(shape[1], generator=generator), torch.randn(shape[0], generator=generator)
    found = []
    for ops in (gpu.TritonOps(Buffers(CPU)), TorchOps(Buffers(CPU))):
        z, slope, recon = values.clone(), grad.clone(), grad.clone()
        counted = ops.jump(z, theta.to(dtype).float(), 0.25)
        made = [
            counted.counts,
            counted.row_counts,
            *ops.jump_backward(slope, z, theta.to(dtype).float(), 0.25, penalty),
        ]
        made += [*ops.residual(recon, values, 0.5), z, slope, recon]
        found.append([one.float() for one in made])
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for ours, torchs in zip(*found, strict=True):
        assert (ours - torchs).norm() <= tolerance * (1 + torchs.norm())


@pytest.mark.parametrize("dead", [None, DEAD], ids=["none dead", "some dead"])
@pytest.mark.parametrize("name", ["standard", "jumprelu", "topk"])
def test_steps_equal_autograd(name, dead):
    sae, x = random_sae(name)
    sae, x = sae.float(), x.float()
    step = fast_step(sae)
    step._by_triton, step._compiles, step.sparse = True, False, False
    inputs = StepInputs(0.3, 0.2, dead)
    figures = step(x, inputs)
    loss, grads = reference_sae.loss_and_grads(sae, x, inputs)
    assert torch.allclose(figures.loss, loss, rtol=1e-5)
    for key, value in sae.named_parameters():
        assert torch.allclose(value.grad, grads[key], rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize(("arch", "decoder_norm"), [("standard", "unit"), ("jumprelu", "free")])
def test_training_goes_where_plain_training_goes(arch, decoder_norm, monkeypatch):
    small = {"decoder_norm": decoder_norm, "expansion": 4}  # Triton's interpreter takes a while for each latent
    plain, expected = trained(recipe_of(arch, plain=True, **small), 3)
    monkeypatch.setattr(gpu, "trouble", lambda _device: None)
    monkeypatch.setattr("fastcache.sae.fast.step.compiles", False)
    fast, figures = trained(recipe_of(arch, **small), 3)
    assert fast._fast._by_triton
    assert [float(one.loss) for one in figures] == pytest.approx([float(one.loss) for one in expected], rel=1e-4)
    for name, value in plain.sae.named_parameters():
        assert (dict(fast.sae.named_parameters())[name] - value).norm() <= 1e-3 * value.norm(), name


def test_a_triton_that_is_broken_is_not_used(monkeypatch):
    def broken():
        raise RuntimeError("ptxas was not found\nand more")

    monkeypatch.setattr(gpu, "_kernels", broken)
    monkeypatch.setattr(gpu, "agree", lambda _device: broken())
    gpu.trouble.cache_clear()
    assert gpu.trouble(torch.device("cuda")) == "RuntimeError: ptxas was not found"
    gpu.trouble.cache_clear()


COMPILE = """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from fastcache.sae.fast import triton_kernels

    wide, sums, number, size = "*bf16", "*fp32", "fp32", "i32"
    shape = dict.fromkeys(("n", "d", "size"), size)
    kernels = {
        "relu_forward": {"z": wide, "sums": sums, "counts": sums, **shape},
        "relu_backward": {"grad": wide, "acts": wide, "sums": sums, **shape},
        "jump_forward": {
            "z": wide, "theta": sums, "half": number, "counts": sums, "row_counts": sums, "row_entries": sums, **shape
        },
        "jump_backward": {
            "grad": wide, "acts": wide, "theta": sums, "half": number, "per_width": number, "penalty": sums,
            "sums": sums, "theta_sums": sums, **shape,
        },
        "residual": {"recon": wide, "x": wide, "scale": number, "squares": sums, "sums": sums, **shape},
        "adam": {
            **dict.fromkeys(("weights", "grads", "mean", "square", "clip"), sums),
            **dict.fromkeys(("rest1", "rest2", "rate", "correction", "eps"), number), "n_values": size, "d": size,
        },
    }
    for name, signature in kernels.items():
        constants = {"UNIT_ROWS": True, "COLUMNS": 4096} if name == "adam" else {"ROWS": 16, "COLUMNS": 128}
        source = ASTSource(
            getattr(triton_kernels, name), {**signature, **dict.fromkeys(constants, "constexpr")}, constexprs=constants
        )
        made = compile(source, target=GPUTarget("cuda", 90, 32))
        assert made.asm["cubin"], name
        print(name, "-0.0" if "<-0.000000e+00>" in made.asm["ttir"] else "")
"""


def test_kernels_compile_for_a_real_gpu(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(COMPILE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 6
    assert "jump_forward -0.0" in done.stdout  # the band is told by it, and a compiler may take it for 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("No module named 'triton'"), "ImportError: No module named 'triton'"),
        (RuntimeError("Failed to find C compiler\nmore"), "RuntimeError: Failed to find C compiler"),
        (PermissionError(13, "Permission denied"), "PermissionError: [Errno 13] Permission denied"),
    ],
)
def test_what_is_wrong_with_a_machine_is_why_it_does_without_the_kernels(monkeypatch, error, reason):
    monkeypatch.setattr(gpu, "agree", raising(error))
    assert gpu.trouble.__wrapped__(torch.device("cuda")) == reason


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), OSError(28, "No space left on device"), MemoryError()]
)
def test_what_is_wrong_at_the_moment_is_an_error(monkeypatch, error):
    """Without the kernels the same command would have other bits tomorrow."""
    monkeypatch.setattr(gpu, "agree", raising(error))
    with pytest.raises(SpaceError, match="run the same command again"):
        gpu.trouble.__wrapped__(torch.device("cuda"))


def raising(error):
    def fails(_device):
        raise error

    return fails
