"""Ways to multiply: none is chosen whose error is above what was asked for."""

import pytest
import torch

from fastcache.sae.fast import products
from fastcache.sae.fast.products import ERROR_LIMITS, PLAIN, ROUTES, choose_route, confirm_route, product_error

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_anew():
    """The choice is made once in a process."""
    choose_route.cache_clear()
    yield
    choose_route.cache_clear()


@pytest.mark.parametrize("precision", ERROR_LIMITS)
def test_the_chosen_way_is_exact_enough(precision):
    route = choose_route(precision, CPU, 64, 256)
    assert product_error(route, CPU) <= ERROR_LIMITS[precision]


def test_bfloat16_is_never_taken_for_float32(monkeypatch):
    monkeypatch.setattr(products, "_times", lambda routes, *_: {r: 1.0 if r is PLAIN else 1e-3 for r in routes})
    assert choose_route("float32", CPU, 64, 256).dtype == torch.float32
    assert choose_route("bf16", CPU, 64, 256) is not PLAIN


def test_a_switch_that_rounds_is_refused(monkeypatch):
    monkeypatch.setattr(products, "_times", lambda routes, *_: {r: 1.0 if r is PLAIN else 1e-3 for r in routes})
    monkeypatch.setattr(products, "product_error", lambda route, _: 2e-3 if route is ROUTES["onednn"] else 2e-7)
    monkeypatch.setattr(products, "candidates", lambda _: [PLAIN, ROUTES["onednn"]])
    assert choose_route("float32", CPU, 64, 256) is PLAIN
    assert confirm_route("onednn", "float32", CPU) is None
    assert confirm_route("onednn", "tf32", CPU) is ROUTES["onednn"]


def test_a_way_that_is_hardly_faster_is_left(monkeypatch):
    monkeypatch.setattr(products, "_times", lambda routes, *_: {r: 1.0 if r is PLAIN else 0.8 for r in routes})
    assert choose_route("bf16", CPU, 64, 256) is PLAIN


def test_the_switch_is_set_within_the_block_only():
    backend = products._backend(CPU)
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("this torch has no such switch")
    before = backend.fp32_precision
    with ROUTES["onednn"].active(CPU):
        assert backend.fp32_precision == "bf16"
    assert backend.fp32_precision == before


def test_a_way_that_isnt_here_is_not_confirmed():
    assert confirm_route("tf32", "tf32", CPU) is None
    assert confirm_route("float32", "float32", CPU) is PLAIN
