"""Ways to multiply: each machine gets one by a rule, and none whose error is above what was asked for."""

import time

import pytest
import torch

from fastcache.sae.fast import products
from fastcache.sae.fast.cpu import Cpu, parse_cpuinfo, this_cpu
from fastcache.sae.fast.products import ERROR_LIMITS, PLAIN, ROUTES, choose_route, confirm_route, product_error

CPU = torch.device("cpu")
ZEN_4 = Cpu("AuthenticAMD", 25, "AMD EPYC 9354", frozenset({"avx2", "avx512f", "avx512_bf16"}))
ZEN_5 = Cpu("AuthenticAMD", 26, "AMD EPYC 9355", frozenset({"avx2", "avx512f", "avx512_bf16"}))
ZEN_5_WITHOUT = ZEN_5._replace(features=frozenset({"avx2"}))
SAPPHIRE_RAPIDS = Cpu("GenuineIntel", 6, "Xeon 8480", frozenset({"avx512f", "avx512_bf16", "amx_bf16"}))
SKYLAKE = Cpu("GenuineIntel", 6, "Xeon 6148", frozenset({"avx512f"}))
GRAVITON_3 = Cpu(features=frozenset({"asimd", "sve", "bf16"}))

EXACT = {"float32": 2e-7, "onednn": 4e-7, "bf16": 3e-3}
ROUNDING = EXACT | {"onednn": 3e-3}
"""Errors of the ways: where oneDNN multiplies float32 as such, and where it rounds the factors to bfloat16."""


@pytest.fixture
def machine(monkeypatch):
    """A function that gives this machine another CPU, and its ways other errors."""

    def change(cpu, errors=EXACT):
        monkeypatch.setattr(products, "this_cpu", lambda: cpu)
        monkeypatch.setattr(products, "product_error", lambda route, _device: errors[route.name])
        monkeypatch.setattr(products, "candidates", lambda _: [ROUTES[name] for name in errors])

    return change


@pytest.mark.parametrize("precision", ERROR_LIMITS)
def test_the_chosen_way_is_exact_enough(precision):
    route = choose_route(precision, CPU)
    assert product_error(route, CPU) <= ERROR_LIMITS[precision]


@pytest.mark.parametrize(
    ("cpu", "errors", "float32", "bf16"),
    [
        (ZEN_4, EXACT, "float32", "bf16"),
        (ZEN_5, EXACT, "onednn", "bf16"),
        (ZEN_5, ROUNDING, "float32", "bf16"),
        (ZEN_5_WITHOUT, EXACT, "float32", "float32"),
        (SAPPHIRE_RAPIDS, ROUNDING, "float32", "bf16"),
        (SKYLAKE, EXACT, "float32", "float32"),
        (GRAVITON_3, ROUNDING, "float32", "bf16"),
        (Cpu(), EXACT, "float32", "float32"),
    ],
)
def test_a_cpu_gets_what_its_hardware_is_fast_at(machine, cpu, errors, float32, bf16):
    machine(cpu, errors)
    assert choose_route("float32", CPU) is ROUTES[float32]
    assert choose_route("tf32", CPU) is ROUTES[float32]
    assert choose_route("bf16", CPU) is ROUTES[bf16]


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [((7, 5), ("float32", "float32", "float32")), ((9, 0), ("float32", "tf32", "bf16"))],
)
def test_a_gpu_gets_what_was_asked_for_where_it_has_it(monkeypatch, capability, chosen):
    errors = {"float32": 3e-7, "tf32": 4e-4, "bf16": 3e-3}
    monkeypatch.setattr(products, "product_error", lambda route, _device: errors[route.name])
    monkeypatch.setattr(products, "candidates", lambda _: [ROUTES[name] for name in errors])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert tuple(choose_route(precision, torch.device("cuda")).name for precision in ERROR_LIMITS) == chosen


def test_a_torch_without_the_switch_stays_with_the_plain_way(machine):
    machine(ZEN_5, {"float32": 2e-7})
    assert choose_route("float32", CPU) is PLAIN


@pytest.mark.parametrize("precision", ERROR_LIMITS)
def test_no_clock_is_read_for_the_choice(machine, monkeypatch, precision):
    def fails():
        raise AssertionError("the time of day must not matter")

    for name in ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time", "process_time", "thread_time"):
        monkeypatch.setattr(time, name, fails)
    choose_route(precision, CPU)
    for cpu in (ZEN_4, ZEN_5, SAPPHIRE_RAPIDS):
        machine(cpu)
        choose_route(precision, CPU)


def test_the_error_of_a_way_is_the_same_whenever_it_is_asked_for():
    assert len({product_error(PLAIN, CPU) for _ in range(3)}) == 1


def test_a_checkpoints_way_is_refused_where_it_rounds(machine):
    machine(SAPPHIRE_RAPIDS, {"float32": 2e-7, "onednn": 1.5e-3})
    assert confirm_route("onednn", "float32", CPU) is None
    assert confirm_route("onednn", "tf32", CPU) is ROUTES["onednn"]


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


X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC 9355 32-Core Processor
flags\t\t: fpu avx2 avx512f avx512_bf16

processor\t: 1
vendor_id\t: Other
"""
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd bf16\nCPU implementer\t: 0x41\n"


def test_linux_says_which_cpu_this_is():
    found = parse_cpuinfo(X86)
    assert found == Cpu(
        "AuthenticAMD", 26, "AMD EPYC 9355 32-Core Processor", frozenset(X86.splitlines()[5].split()[2:])
    )
    assert parse_cpuinfo(ARM) == Cpu(features=frozenset({"fp", "asimd", "bf16"}))
    assert parse_cpuinfo("") == parse_cpuinfo("cpu family : unknown\n") == Cpu()
    assert this_cpu() is this_cpu()
