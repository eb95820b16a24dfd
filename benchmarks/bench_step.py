"""Time of one training step: closed-form gradients against autograd through the same loss, side by side.

    python benchmarks/bench_step.py

Prints, for each architecture and shape, the median time of both and their ratio. Both do the same optimiser step.
"""

import statistics
import time

import torch

from fastcache.sae.init import initialise
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.recipe import resolve
from fastcache.stages.train.trainer import Trainer, build_sae

SHAPES = ((256, 8, 4096), (896, 8, 1024))  # d_in, expansion, batch
REPEATS = 7


class _Jump(torch.autograd.Function):
    """The straight-through estimators of f and of L0 in one function."""

    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        active = (z > theta).float()
        ctx.save_for_backward(z, theta, active)
        ctx.bandwidth = bandwidth
        return z * active, active

    @staticmethod
    def backward(ctx, grad_acts, grad_l0):
        z, theta, active = ctx.saved_tensors
        rectangle = ((z - theta).abs() < ctx.bandwidth / 2).float() / ctx.bandwidth
        return grad_acts * active, -((theta * grad_acts + grad_l0) * rectangle).sum(0), None


def autograd_step(sae, optimizer, x, coefficient):
    """What SAE libraries do: build the graph, call backward, clip, step, normalise."""
    z = x @ sae.W_enc + sae.b_enc
    if hasattr(sae, "log_threshold"):
        acts, sparsity = _Jump.apply(z, sae.log_threshold.exp(), sae.bandwidth)
    else:
        acts = sparsity = torch.relu(z)
    error = acts @ sae.W_dec + sae.b_dec - x
    loss = error.square().sum(1).mean() + coefficient * sparsity.sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    sae.remove_parallel_decoder_gradient()
    optimizer.step()
    sae.normalise_decoder()


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(arch: str, d_in: int, expansion: int, batch: int) -> tuple[float, float]:
    config = TrainConfig(cache="", recipe="fast-paper", arch=arch, expansion=expansion, coefficient=0.1, lr=1e-4)
    recipe = resolve(config, d_in, n_rows=128_000)
    x = torch.randn(batch, d_in)
    ours = Trainer(recipe, "cpu")
    ours.initialise(x)
    sae = build_sae(recipe)
    initialise(sae, x, torch.Generator().manual_seed(config.seed))
    for value in sae.parameters():
        value.requires_grad_()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS + 1):  # turn about, so that a busy machine hurts both; the first round warms up
        times[0].append(timed(lambda: ours.step(x)))
        times[1].append(timed(lambda: autograd_step(sae, optimizer, x, 0.1)))
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; median of {REPEATS} steps")
    print(f"{'arch':10}{'d_in':>6}{'d_sae':>7}{'batch':>7}{'closed form':>13}{'autograd':>11}{'ratio':>7}")
    for arch in ("standard", "jumprelu"):
        for d_in, expansion, batch in SHAPES:
            ours, other = compare(arch, d_in, expansion, batch)
            sizes = f"{d_in:>6}{expansion * d_in:>7}{batch:>7}"
            print(f"{arch:10}{sizes}{1000 * ours:>10.0f} ms{1000 * other:>8.0f} ms{other / ours:>6.2f}x")


if __name__ == "__main__":
    main()
