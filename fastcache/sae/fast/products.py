"""Ways for torch to multiply matrices, and the rule by which a machine gets one of them.

On some CPUs oneDNN multiplies float32 twice as fast as MKL does, and is reached by a switch that is meant for bfloat16; on
others the same switch really rounds to bfloat16. TF32 is the same question on a GPU, and bfloat16 products are fast where the
hardware has them and hundreds of times slower where it has not.

The way decides the last bits of an SAE. So the rule looks at the machine alone: at what hardware it has, and at the error
of a product of fixed matrices. It measures no time, because a time depends on what else the machine does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from fastcache.sae.fast.cpu import this_cpu

ERROR_LIMITS = {"float32": 1e-6, "tf32": 2e-3, "bf16": 1e-2}
"""By `--precision`: largest Frobenius norm of a product's error, relative to that of the product in float64."""

AMD, WIDE_FAMILY = "AuthenticAMD", 26
"""AMD's CPUs from this family on (Zen 5) have 512-bit multipliers. MKL leaves them half idle and oneDNN uses them: 225 instead
of 105 GFLOP/s a core. On the family before, which splits 512-bit operations, both reach 100 (docs/benchmarks/train.md)."""

BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Extensions of x86 and ARM that multiply bfloat16."""

AMPERE = (8, 0)
"""Compute capability of the first GPUs with TF32 and bfloat16 products."""


class Route(NamedTuple):
    """A way of multiplying."""

    name: str
    dtype: torch.dtype
    """Of the factors and the result."""
    switch: str
    """What torch's `fp32_precision` is set to."""

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Multiply this way within the block. The switch is the process's: other threads see it too."""
        backend = _backend(device)
        before = getattr(backend, "fp32_precision", None)
        if before in (None, self.switch):
            yield
            return
        backend.fp32_precision = self.switch
        try:
            yield
        finally:
            backend.fp32_precision = before


ROUTES = {
    route.name: route
    for route in (
        Route("float32", torch.float32, "ieee"),
        Route("onednn", torch.float32, "bf16"),
        Route("tf32", torch.float32, "tf32"),
        Route("bf16", torch.bfloat16, "ieee"),
    )
}
PLAIN = ROUTES["float32"]


def _backend(device: torch.device) -> Any:
    if device.type == "cuda":
        return torch.backends.cuda.matmul
    return getattr(torch.backends.mkldnn, "matmul", None)


def candidates(device: torch.device) -> list[Route]:
    """The ways there are on `device`, the plain one first."""
    names = ["float32", "tf32", "bf16"] if device.type == "cuda" else ["float32", "onednn", "bf16"]
    if not hasattr(_backend(device), "fp32_precision"):  # torch before 2.9
        names = ["float32", "bf16"]
    return [ROUTES[name] for name in names]


def product_error(route: Route, device: torch.device) -> float:
    """Error of a product of random matrices with 512 terms a sum, relative to float64, by the Frobenius norm."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(128, 512, generator=generator).to(device) for _ in range(2))
    with route.active(device):
        product = a.to(route.dtype) @ b.to(route.dtype).T
    exact = a.double() @ b.double().T
    return float((product.double() - exact).norm() / exact.norm())


def choose_route(precision: str, device: torch.device) -> Route:
    """The way to multiply on `device` whose error is within `ERROR_LIMITS[precision]`; the same whenever it is asked for."""
    return next((r for r in _faster(precision, device) if within_limit(r, precision, device)), PLAIN)


def within_limit(route: Route, precision: str, device: torch.device) -> bool:
    """Whether the error of `route` on `device` is one that `precision` allows."""
    return product_error(route, device) <= ERROR_LIMITS[precision]


def _faster(precision: str, device: torch.device) -> list[Route]:
    """The ways that the hardware of `device` makes clearly faster than the plain one, the fastest first."""
    names = []
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE:
        names = {"bf16": ["bf16", "tf32"], "tf32": ["tf32"]}.get(precision, [])
    if device.type == "cpu":
        cpu = this_cpu()
        if precision == "bf16" and cpu.features & BF16_FEATURES:
            names.append("bf16")
        if cpu.vendor == AMD and cpu.family >= WIDE_FAMILY and "avx512f" in cpu.features:
            names.append("onednn")
    there = candidates(device)
    return [ROUTES[name] for name in names if ROUTES[name] in there]


def confirm_route(name: str, precision: str, device: torch.device) -> Route | None:
    """The way that a checkpoint names, if it is exact enough on this machine too."""
    route = next((route for route in candidates(device) if route.name == name), None)
    return route if route and within_limit(route, precision, device) else None
