"""Ways for torch to multiply matrices, and a probe that picks the fastest one that is exact enough here.

On some CPUs oneDNN multiplies float32 twice as fast as MKL does, and is reached by a switch that is meant for bfloat16; on
others the same switch really rounds to bfloat16. TF32 is the same question on a GPU, and bfloat16 products run fast where the
hardware has them and are hundreds of times slower where it hasn't. So every way is measured, and its error first.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

ERROR_LIMITS = {"float32": 1e-6, "tf32": 2e-3, "bf16": 1e-2}
"""By `--precision`: largest Frobenius norm of a product's error, relative to that of the product in float64."""

REPEATS = 5
CLEARLY_FASTER = 0.75
"""Less isn't worth a choice that hangs on the time of day: two runs with one seed should give the same bits."""

WORTH_MEASURING = 2e9
"""Tokens x d_in x d_sae of a run. The products of a shorter one take no longer than those that would be measured, and it
can do without a choice that hangs on the time of day."""

HOPELESS = 3.0
"""A way that takes so many times as long in the first round isn't measured further."""


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
        found = a.to(route.dtype) @ b.to(route.dtype).T
    exact = a.double() @ b.double().T
    return float((found.double() - exact).norm() / exact.norm())


@cache
def choose_route(precision: str, device: torch.device, d_in: int, d_sae: int) -> Route:
    """The fastest way to multiply on `device` whose error is within `ERROR_LIMITS[precision]`.

    The plain way stays unless another is clearly faster. The choice depends on the time of day: it is made once in a process,
    and kept for a resumed run.
    """
    within = [r for r in candidates(device) if product_error(r, device) <= ERROR_LIMITS[precision]]
    if len(within) < 2:
        return PLAIN
    times = _times(within, device, _factors(device, min(max(d_in, 256), 1024), min(max(d_sae, 2048), 4096)))
    best = min(times, key=lambda route: times[route])
    return best if times[best] < times[PLAIN] * CLEARLY_FASTER else PLAIN


def confirm_route(name: str, precision: str, device: torch.device) -> Route | None:
    """The way that a checkpoint names, if it is exact enough on this machine too."""
    found = next((route for route in candidates(device) if route.name == name), None)
    return found if found and product_error(found, device) <= ERROR_LIMITS[precision] else None


def _factors(device: torch.device, d_in: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    n = 256
    return tuple(torch.randn(shape, device=device) for shape in ((n, d_in), (d_sae, d_in), (n, d_sae)))  # type: ignore[return-value]


def _times(routes: list[Route], device: torch.device, factors: tuple[Tensor, Tensor, Tensor]) -> dict[Route, float]:
    """Least seconds of a step's three kinds of product, as other work only adds. All take turns: it may come and go."""

    def products(x: Tensor, weights: Tensor, latent_acts: Tensor) -> None:
        _ = x @ weights.T, latent_acts @ weights, latent_acts.T @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    given = {route: [factor.to(route.dtype) for factor in factors] for route in routes}
    least = dict.fromkeys(routes, float("inf"))
    for number in range(REPEATS + 1):
        for route in routes:
            if number and least[route] > least[PLAIN] * HOPELESS:
                continue
            with route.active(device):
                least[route] = min(least[route], _seconds(lambda route=route: products(*given[route])))  # type: ignore[misc]
    return least


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
