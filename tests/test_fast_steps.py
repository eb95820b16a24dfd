"""Fast training steps: each pass against float64 autograd and against the other passes, and the same in every run."""

import copy
from unittest.mock import patch

import pytest
import reference_sae
import torch
from test_gradients import CASES, DEAD, random_sae

from fastcache.sae.architectures import StandardSae, StepInputs
from fastcache.sae.fast import sparse, threads
from fastcache.sae.fast.adam import FastAdam
from fastcache.sae.fast.buffers import Buffers
from fastcache.sae.fast.dense import CompiledOps, TorchOps
from fastcache.sae.fast.products import ROUTES
from fastcache.sae.fast.sparse import OFF, ON, Entries, wins
from fastcache.sae.fast.step import fast_step

CPU = torch.device("cpu")
BANDWIDTH = 0.6
needs_compiler = pytest.mark.skipif(not threads.compiles, reason="nothing can be compiled here")
OPS = [pytest.param(CompiledOps, marks=needs_compiler), TorchOps]


def numbers(*shape, seed=0, dtype=torch.double):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(dtype)


class Jump(torch.autograd.Function):
    """f = z H(z - theta) and H(z - theta), with the straight-through gradients of both."""

    @staticmethod
    def forward(ctx, z, theta):
        ctx.save_for_backward(z, theta)
        active = (z > theta).to(z)
        return z * active, active

    @staticmethod
    def backward(ctx, grad_acts, grad_l0):
        z, theta = ctx.saved_tensors
        rectangle = (((z - theta) / BANDWIDTH).abs() < 0.5).to(z)
        return grad_acts * (z > theta), (-(grad_acts * theta + grad_l0) * rectangle / BANDWIDTH).sum(0)


class Problem:
    """A batch and weights with a tenth of the latents active; what autograd finds in float64 for its loss."""

    def __init__(self, jump, n=70, d_in=24, d_sae=100, dtype=torch.double):
        self.dtype, self.jump, self.n, self.d_sae = dtype, jump, n, d_sae
        wide = {
            "x": numbers(n, d_in), "W_enc": numbers(d_sae, d_in, seed=1) / 5, "W_dec": numbers(d_sae, d_in, seed=2) / 5,
            "b_dec": numbers(d_in, seed=3), "b_enc": numbers(d_sae, seed=4) / 10 - (0 if jump else 1.2),
        }  # fmt: skip
        wide["theta"] = 1.0 + numbers(d_sae, seed=5).abs() / 3
        self.penalty = (numbers(n, seed=6).abs() if jump else numbers(d_sae, seed=6).abs()) / n
        self.given = {name: value.to(dtype) for name, value in wide.items()}
        self.wanted = self._autograd()

    def _autograd(self):
        p = {name: value.double().clone().requires_grad_(name != "x") for name, value in self.given.items()}
        z = p["x"] @ p["W_enc"].T + p["b_enc"]
        if self.jump:
            f, active = Jump.apply(z, p["theta"])
            sparsity = (active * self.penalty[:, None]).sum()
        else:
            f = z.relu()
            sparsity = (f * self.penalty).sum()
        squared_error = (f @ p["W_dec"] + p["b_dec"] - p["x"]).square().sum()
        (squared_error / self.n + sparsity).backward()
        grads = {name: value.grad for name, value in p.items() if value.grad is not None}
        return grads | {"squared_error": squared_error.detach(), "counts": (f > 0).sum(0)}

    @property
    def pre_acts(self):
        return torch.addmm(self.given["b_enc"], self.given["x"], self.given["W_enc"].T)

    def dense(self, ops):
        p, penalty = self.given, self.penalty.to(self.dtype)
        z = self.pre_acts
        forward = ops.jump(z, p["theta"], BANDWIDTH) if self.jump else ops.relu(z)
        errors = torch.addmm(p["b_dec"], z, p["W_dec"])
        squared_error, b_dec = ops.residual(errors, p["x"], 2 / self.n)
        found = {"squared_error": squared_error, "b_dec": b_dec, "counts": forward.counts, "W_dec": z.T @ errors}
        if self.jump:
            grad = errors @ p["W_dec"].T
            found["b_enc"], found["theta"] = ops.jump_backward(grad, z, p["theta"], BANDWIDTH, penalty)
        else:
            grad = torch.addmm(penalty, errors, p["W_dec"].T)
            found["b_enc"] = ops.relu_backward(grad, z)
        return found | {"W_enc": grad.T @ p["x"]}

    def sparse(self):
        p = self.given
        zero = torch.zeros(self.d_sae, dtype=self.dtype)
        theta, low = (p["theta"], p["theta"] - BANDWIDTH / 2) if self.jump else (zero, zero)
        with patch.object(sparse, "CAPACITY", 0.5):
            entries = Entries(Buffers(CPU), self.n, self.d_sae, self.dtype)
        assert entries.extract(self.pre_acts, low, theta)
        jump = (theta, BANDWIDTH) if self.jump else None
        found = entries.backward(p["x"], p["W_dec"], p["b_dec"], self.penalty.to(self.dtype), jump)
        return found._asdict() | ({"theta": found.more} if self.jump else {})


def assert_equal(found, wanted, tolerance):
    for name, value in wanted.items():
        error, norm = (found[name].double() - value).norm(), value.double().norm()
        assert error <= tolerance * norm, f"{name}: {error:.1e} of {norm:.1e}"


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-14), (torch.float32, 3e-7)])
def test_dense_passes_equal_autograd(ops, jump, dtype, tolerance):
    problem = Problem(jump, dtype=dtype)
    assert 0.02 < problem.wanted["counts"].sum() / problem.n / problem.d_sae < 0.3
    assert_equal(problem.dense(ops(Buffers(CPU))), problem.wanted, tolerance)


@needs_compiler
@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-14), (torch.float32, 3e-7)])
def test_sparse_passes_equal_autograd(jump, dtype, tolerance):
    problem = Problem(jump, dtype=dtype)
    assert_equal(problem.sparse(), problem.wanted, tolerance)


@needs_compiler
@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_threads_change_no_bit(jump, way):
    problem = Problem(jump, n=200, dtype=torch.float32)
    found, before = [], torch.get_num_threads()
    z = problem.pre_acts
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            ops = CompiledOps(Buffers(CPU))
            acts, grad = z.clone(), numbers(*z.shape, seed=9, dtype=torch.float32)
            if way == "sparse":
                found.append({name: value.clone() for name, value in problem.sparse().items() if name != "b_dec"})
            elif jump:
                theta, penalty = problem.given["theta"], problem.penalty.float()
                ops.jump(acts, theta, BANDWIDTH)
                sums = ops.jump_backward(grad, acts, theta, BANDWIDTH, penalty)
                found.append({"acts": acts, "grad": grad, "sums": sums[0], "theta": sums[1]})
            else:
                ops.relu(acts)
                found.append({"acts": acts, "sums": ops.relu_backward(grad, acts), "grad": grad})
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@needs_compiler
def test_entries_that_dont_fit_leave_the_pre_activations_alone():
    assert sparse.CAPACITY < 0.3
    z, zero = numbers(40, 64), torch.zeros(64, dtype=torch.double)
    kept = z.clone()
    assert not Entries(Buffers(CPU), 40, 64, torch.double).extract(z, zero, zero)
    assert torch.equal(z, kept)


def test_the_sparse_path_is_chosen_with_hysteresis():
    between = (ON + OFF) / 2
    assert wins(ON / 2, used=False, fast_products=False)
    assert not wins(between, used=False, fast_products=False)
    assert wins(between, used=True, fast_products=False)
    assert not wins(OFF * 1.01, used=True, fast_products=False)


def test_the_sparse_path_is_chosen_less_often_where_products_are_fast():
    assert wins(0.9 * ON, used=False, fast_products=False)
    assert not wins(0.9 * ON, used=False, fast_products=True)
    assert wins(ON / 2, used=False, fast_products=True)


@needs_compiler
@pytest.mark.parametrize(("share", "is_sparse"), [(0.02, True), (0.5, False)])
def test_the_first_step_is_sparse_where_there_is_room(share, is_sparse, monkeypatch):
    extract, fitted = Entries.extract, []
    monkeypatch.setattr(Entries, "extract", lambda *given: fitted.append(extract(*given)) or fitted[-1])
    sae = StandardSae(8, 256).double()
    sae.b_enc.data.fill_(torch.special.ndtri(torch.tensor(share, dtype=torch.double)))
    torch.nn.init.normal_(sae.W_enc, std=8**-0.5)
    fast_step(sae)(torch.randn(64, 8, dtype=torch.double), StepInputs(0.1))
    assert fitted == [is_sparse]


FAST = [name for name in CASES if fast_step(random_sae(name)[0])]
WAYS = [pytest.param("dense", marks=needs_compiler), pytest.param("sparse", marks=needs_compiler), "torch"]


def step_of(sae, way, monkeypatch):
    """The fast step of `sae`, made to go one way."""
    monkeypatch.setattr(sparse, "CAPACITY", 1.0)
    monkeypatch.setattr("fastcache.sae.fast.step.compiles", way != "torch")
    monkeypatch.setattr("fastcache.sae.fast.step.wins", lambda share, used, fast_products: way == "sparse")
    step = fast_step(sae)
    step.sparse = way == "sparse"
    return step


@pytest.mark.parametrize("dead", [None, DEAD], ids=["none dead", "some dead"])
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("way", WAYS)
def test_fast_steps_equal_autograd(way, name, dead, monkeypatch):
    sae, x = random_sae(name)
    inputs = StepInputs(0.3, 0.2, dead)
    figures = step_of(sae, way, monkeypatch)(x, inputs)
    loss, grads = reference_sae.loss_and_grads(sae, x, inputs)
    assert torch.allclose(figures.loss, loss, rtol=1e-12)
    for key, value in sae.named_parameters():
        assert torch.allclose(value.grad, grads[key], rtol=1e-10, atol=1e-12), key


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("way", WAYS)
def test_fast_steps_equal_the_plain_one(way, name, monkeypatch):
    sae, x = random_sae(name)
    sae, x = sae.float(), x.float()
    other = copy.deepcopy(sae)
    step, inputs = step_of(sae, way, monkeypatch), StepInputs(0.3, 0.2, DEAD)
    for n in (len(x), 20, len(x)):  # a smaller batch uses the same memory
        found, wanted = step(x[:n], inputs), other.loss_and_grads(x[:n], inputs)
        assert_equal(found._asdict(), {k: v for k, v in wanted._asdict().items() if k != "fired"}, 1e-6)
        assert torch.equal(found.fired, wanted.fired)
        assert_equal(*({k: v.grad for k, v in s.named_parameters()} for s in (sae, other)), 1e-6)


def test_bfloat16_products_come_near():
    sae, x = StandardSae(32, 64), numbers(100, 32, dtype=torch.float32)
    for i, value in enumerate(sae.parameters()):
        value.copy_(numbers(*value.shape, seed=i, dtype=torch.float32) / 5)
    other, step = copy.deepcopy(sae), fast_step(sae)
    step.route = ROUTES["bf16"]
    found, wanted = step(x, StepInputs(0.1)), other.loss_and_grads(x, StepInputs(0.1))
    assert abs(found.loss - wanted.loss) < 0.02 * wanted.loss
    assert_equal(*({k: v.grad for k, v in s.named_parameters()} for s in (sae, other)), 0.03)
    assert all(value.grad.dtype == torch.float32 for value in sae.parameters())


@needs_compiler
def test_few_active_latents_turn_the_sparse_path_on_and_many_off():
    sae, x = StandardSae(32, 256), numbers(100, 32, dtype=torch.float32)
    sae.W_enc.copy_(numbers(32, 256, seed=1, dtype=torch.float32))
    step, chosen = fast_step(sae), []
    for bias in (0.0, -14.0, -14.0, 0.0, 0.0):
        sae.b_enc.fill_(bias)
        step(x, StepInputs())
        chosen.append(step.sparse)
    assert chosen == [False, True, True, False, False]


def two_optimisers(dtype, clip_norm, unit_rows, steps=5):
    """Parameters after steps of torch's Adam with its surroundings, and after those of the fast one."""
    shapes = {"W_enc": (40, 12), "W_dec": (40, 12), "b": (40,)}
    results = []
    for fast in (False, True):
        values = {
            name: torch.nn.Parameter(numbers(*shape, seed=i, dtype=dtype))
            for i, (name, shape) in enumerate(shapes.items())
        }
        values["W_enc"] = torch.nn.Parameter(values["W_enc"].data.T)
        W_dec = values["W_dec"]
        W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)
        optimizer = FastAdam(values.values(), lr=0.01)
        for step in range(steps):
            for i, value in enumerate(values.values()):
                value.grad = numbers(*value.shape, seed=100 * step + i + 50, dtype=dtype)
            values["W_enc"].grad = values["W_enc"].grad.T.contiguous().T
            if fast:
                optimizer.clipped_step(clip_norm, W_dec if unit_rows else None)
                continue
            with torch.no_grad():
                if clip_norm:
                    torch.nn.utils.clip_grad_norm_(values.values(), clip_norm)
                if unit_rows:
                    W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
                optimizer.step()
                if unit_rows:
                    W_dec /= W_dec.norm(dim=1, keepdim=True)
        results.append((values, optimizer))
    return results


@needs_compiler
@pytest.mark.parametrize("clip_norm", [0, 1.0, 1e6])
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-12), (torch.float32, 1e-6)])
def test_fast_adam_equals_torch(dtype, tolerance, clip_norm, unit_rows):
    (wanted, plain), (found, fast) = two_optimisers(dtype, clip_norm, unit_rows)
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= tolerance * value.norm()
        for moment in ("exp_avg", "exp_avg_sq"):
            a, b = fast.state[found[name]][moment], plain.state[value][moment]
            assert (a - b).norm() <= 3 * tolerance * b.norm()


@needs_compiler
def test_a_gradient_that_is_nan_is_not_clipped_away():
    (_, _), (values, optimizer) = two_optimisers(torch.float32, 1.0, unit_rows=False, steps=1)
    values["b"].grad[3] = float("nan")
    optimizer.clipped_step(1.0, None)
    assert values["W_dec"].isnan().all()


@needs_compiler
def test_fast_adam_goes_on_from_a_state_laid_out_otherwise():
    (_, _), (values, optimizer) = two_optimisers(torch.float32, 1.0, unit_rows=True)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["exp_avg"], entry["exp_avg_sq"] = (
            entry["exp_avg"].contiguous().clone(),
            entry["exp_avg_sq"].contiguous().clone(),
        )
    others = {
        name: torch.nn.Parameter(value.data.clone(memory_format=torch.preserve_format))
        for name, value in values.items()
    }
    again = FastAdam(others.values(), lr=0.01)
    again.load_state_dict(state)
    for name, value in values.items():
        others[name].grad = value.grad = numbers(*value.shape, seed=77, dtype=torch.float32)
    optimizer.clipped_step(1.0, values["W_dec"])
    again.clipped_step(1.0, others["W_dec"])
    assert all(torch.equal(values[name], others[name]) for name in values)
