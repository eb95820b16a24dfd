"""Training steps on a CUDA GPU: checked against float64 autograd, then timed beside the bare products and SAELens.

    python benchmarks/gpu/bench_train_gpu.py                                    # all of it
    python benchmarks/gpu/bench_train_gpu.py --d-in 3584 --expansion 8 --batch 8192 --precision bf16 --k 1
    python benchmarks/gpu/bench_train_gpu.py --device cpu --tiny                # the same code on a CPU; figures mean nothing

No result is committed yet: this was never run on a GPU.

On a GPU a step is five products with Triton's kernels between them, and Adam with all that surrounds it in one kernel; each is
timed beside torch operations in their place. Sparse-support steps are for CPUs, and CUDA graphs aren't used. "of products" is
the time of the five bare products at the same precision over that of the step. "of memory" is what the step must read and
write at the least, over its time, by the bandwidth of a copy.
Target: at d_in 3,584, d_sae 28,672, batch 8,192 in bf16, a share of at least 0.75 of the products.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch
from torch import Tensor

from fastcache.sae.architectures import StandardSae, StepInputs
from fastcache.sae.fast import gpu
from fastcache.sae.fast.products import ROUTES, Route, candidates, choose_route, product_error
from fastcache.sae.fast.step import fast_step
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.recipe import resolve
from fastcache.stages.train.trainer import Trainer

PRECISIONS = ("float32", "tf32", "bf16")
TOLERANCE = {"float32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
TARGET, TARGET_SHAPE = 0.75, (3584, 28672, 8192)
Step = Callable[[Tensor], object]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median over rounds of some repeats each, after some that warm up."""
    found = []
    for number in range(rounds + 1):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(3):
            work()
        synchronise(device)
        if number:
            found.append((time.perf_counter() - start) / 3)
    return statistics.median(found)


def check(device: torch.device, route: Route) -> float:
    """Largest relative error of a gradient of a standard step, against autograd in float64."""
    generator = torch.Generator().manual_seed(0)
    sae = StandardSae(64, 256)
    for value in sae.parameters():
        value.copy_(torch.randn(value.shape, generator=generator) / 8)
    x = torch.randn(512, 64, generator=generator)
    p = {name: value.double().clone().requires_grad_() for name, value in sae.named_parameters()}
    f = torch.relu(x.double() @ p["W_enc"] + p["b_enc"])
    loss = (f @ p["W_dec"] + p["b_dec"] - x).square().sum(1).mean() + 0.1 * f.sum(1).mean()
    loss.backward()
    sae = sae.to(device)
    step = fast_step(sae)
    step.route = route
    step(x.to(device), StepInputs(0.1))
    grads = {name: value.grad.double().cpu() for name, value in sae.named_parameters()}
    return max(float((grads[name] - value.grad).norm() / value.grad.norm()) for name, value in p.items())


def products(x: Tensor, d_sae: int, route: Route) -> Step:
    """The five products of a dense step."""
    n, d_in = x.shape
    make = lambda *shape: torch.randn(shape, device=x.device).to(route.dtype)  # noqa: E731
    wide, grad, error, weights = make(n, d_sae), make(n, d_sae), make(n, d_in), make(d_sae, d_in)
    out_wide, out_narrow, out_weights = torch.empty_like(wide), torch.empty_like(error), torch.empty_like(weights)
    narrow = x.to(route.dtype)

    def step(_x: Tensor) -> None:
        with route.active(x.device):
            torch.mm(narrow, weights.T, out=out_wide)
            torch.mm(wide, weights, out=out_narrow)
            torch.mm(wide.T, error, out=out_weights)
            torch.mm(error, weights.T, out=out_wide)
            torch.mm(grad.T, error, out=out_weights)

    return step


def ours(arch: str, x: Tensor, d_sae: int, route: Route, by_triton: bool = True) -> Step:
    d_in = x.shape[1]
    config = TrainConfig(
        cache="", arch=arch, expansion=d_sae // d_in, batch_size=len(x), lr=1e-9, aux_coefficient=0.0,
        scale_activations=False, precision="bf16" if route.name == "bf16" else "float32",
    )  # fmt: skip
    left_out = nullcontext() if by_triton else patch.object(gpu, "trouble", lambda _device: "left out")
    with left_out:
        trainer = Trainer(resolve(config, d_in, 10**7), str(x.device))
    trainer.initialise(x[:4096])
    trainer._fast.route = route
    return trainer.step


def saelens(arch: str, x: Tensor, d_sae: int, autocast: bool) -> Step:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes import (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
    )
    from sae_lens.training.sae_trainer import SAETrainer

    kind, settings = {
        "standard": (StandardTrainingSAE, StandardTrainingSAEConfig),
        "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    }[arch]
    sae = kind(settings(d_in=x.shape[1], d_sae=d_sae, device=str(x.device)))
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=len(x), lr=1e-9, lr_end=1e-9, autocast=autocast,
        device=str(x.device),
    )  # fmt: skip
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(batch: Tensor) -> None:
        trainer.step(batch)
        trainer.n_training_steps += 1

    return step


def bandwidth(device: torch.device, rounds: int, n: int) -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.empty(n, device=device)
    b = torch.empty_like(a)
    return 2 * 4 * n / seconds(lambda: b.copy_(a), device, rounds)


def least_bytes(n: int, d_in: int, d_sae: int, width: int) -> int:
    """What a dense step reads and writes: each array once where it is made and once where it is used."""
    latents = 2 * 3 * n * d_sae * width  # latent_acts and their gradient: made, changed in place, used
    adam = 2 * d_in * d_sae * (4 * 7 + 2 * width)  # weights, moments read and written, gradients
    return latents + adam + 6 * n * d_in * width


def measure(arch: str, shape: tuple[int, int, int], route: Route, arguments: argparse.Namespace, speed: float) -> None:
    d_in, d_sae, n = shape
    device = torch.device(arguments.device)
    x = torch.randn(n, d_in, device=device)
    bound = seconds(lambda: step(x), device, arguments.rounds) if (step := products(x, d_sae, route)) else 0.0
    flops = 10 * n * d_in * d_sae
    name = f"{arch} {d_in}/{d_sae:,}, batch {n:,}, {route.name}"
    for k in arguments.k:
        saes = [ours(arch, x, d_sae, route) for _ in range(k)]
        taken = seconds(lambda: [train(x) for train in saes], device, arguments.rounds) / k  # noqa: B023
        memory = least_bytes(n, d_in, d_sae, 2 if route.dtype == torch.bfloat16 else 4) / speed / taken
        figures = f"{1000 * taken:>9.2f} ms{n / taken:>12,.0f} tok/s{flops / taken / 1e12:>8.1f} TFLOP/s"
        print(f"{name + f', K = {k}':52}{figures}  of products {bound / taken:.2f}, of memory {memory:.2f}", flush=True)
        if shape == TARGET_SHAPE and route.name == "bf16":
            print(f"  target {TARGET} of the products: {'met' if bound / taken >= TARGET else 'missed'}")
    others = {"torch operations": ours(arch, x, d_sae, route, by_triton=False)}
    if importlib.util.find_spec("sae_lens"):
        others["SAELens"] = saelens(arch, x, d_sae, autocast=route.name == "bf16")
    for other, train in others.items():
        taken = seconds(lambda: train(x), device, arguments.rounds)  # noqa: B023
        figures = f"{1000 * taken:>9.2f} ms{n / taken:>12,.0f} tok/s{flops / taken / 1e12:>8.1f} TFLOP/s"
        print(f"{'  ' + other:52}{figures}", flush=True)


def shapes_of(arguments: argparse.Namespace) -> list[tuple[int, int, int]]:
    if arguments.tiny:
        return [(32, 256, 128)]
    found = [(d, e * d, n) for d in arguments.d_in for e in arguments.expansion for n in arguments.batch]
    return [*found, TARGET_SHAPE] if TARGET_SHAPE[0] in arguments.d_in and TARGET_SHAPE not in found else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", nargs="+", type=int, default=[896, 2048, 3584])
    parser.add_argument("--expansion", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--batch", nargs="+", type=int, default=[128, 4096, 16384])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--arch", nargs="+", choices=("standard", "jumprelu"), default=["standard", "jumprelu"])
    parser.add_argument("--k", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one shape of milliseconds")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("No CUDA GPU is here, or this torch is built without CUDA: nothing was measured.")
        print("On a CPU, --device cpu --tiny runs the same code.")
        return
    device = torch.device(arguments.device)
    print(f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")
    speed = bandwidth(device, arguments.rounds, 10**6 if arguments.tiny else 10**9)
    print(f"memory: {speed / 1e12:.3f} TB/s by a copy; probe for float32: {choose_route('float32', device).name}")
    if device.type == "cuda" and (why := gpu.trouble(device)):
        print(f"Triton's kernels are left out: {why}")
    if not importlib.util.find_spec("sae_lens"):
        print("sae-lens isn't installed, and is left out.")
    there = {route.name for route in candidates(device)}
    routes = [ROUTES[name] for name in arguments.precision if name in there]
    for route in routes:
        error, step_error = product_error(route, device), check(device, route)
        print(f"{route.name}: error of a product {error:.1e}, of a step's gradients {step_error:.1e}", flush=True)
        if step_error > TOLERANCE[route.name]:
            sys.exit(f"{route.name}: gradients differ from float64 autograd by more than {TOLERANCE[route.name]}.")
    for shape in shapes_of(arguments):
        for arch in arguments.arch:
            for route in routes:
                measure(arch, shape, route, arguments, speed)


if __name__ == "__main__":
    main()
