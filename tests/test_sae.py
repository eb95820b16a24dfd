"""SAEs: closed-form gradients against float64 autograd and finite differences, initialisation, schedules, files."""

import math

import pytest
import torch

from fastcache.errors import FormatError, NonFiniteError
from fastcache.sae.architectures import (
    ARCHITECTURES,
    BatchTopKSae,
    JumpReluSae,
    LogJumpReluSae,
    StandardSae,
    StepInputs,
    TopKSae,
)  # fmt: skip
from fastcache.sae.init import geometric_median, initialise, thresholds_for
from fastcache.sae.metrics import Metrics
from fastcache.sae.schedules import LearningRate, sparsity_coefficient
from fastcache.sae.storage import load_sae, save_sae

COEFFICIENT = 0.3
INPUTS = StepInputs(COEFFICIENT)


def make(cls, d_in=8, d_sae=16):
    return cls(d_in, d_sae, **({"k": 4} if issubclass(cls, (TopKSae, BatchTopKSae)) else {}))


def random_sae(cls, **keywords):
    generator = torch.Generator().manual_seed(0)
    sae = cls(6, 20, **keywords).double()
    for value in sae.parameters():
        value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.double) * 0.5)
    return sae, torch.randn(50, 6, generator=generator, dtype=torch.double)


def test_standard_gradients_equal_finite_differences():
    sae, x = random_sae(StandardSae)
    sae.loss_and_grads(x, INPUTS)
    step = 1e-6
    for value in sae.parameters():
        grad, flat = value.grad.flatten(), value.data.view(-1)
        for index in (0, len(flat) // 2, len(flat) - 1):
            kept = flat[index].item()
            losses = []
            for shift in (step, -step):
                flat[index] = kept + shift
                f = sae.encode(x)
                losses.append(((sae.decode(f) - x) ** 2).sum(1).mean() + COEFFICIENT * f.sum(1).mean())
            flat[index] = kept
            assert math.isclose((losses[0] - losses[1]) / (2 * step), grad[index], rel_tol=1e-5, abs_tol=1e-8)


def test_jumprelu_encoder_is_zero_up_to_the_threshold():
    sae = JumpReluSae(1, 3)
    sae.W_enc.fill_(1.0)
    sae.set_threshold(torch.tensor([0.5, 1.0, 2.0]))
    assert sae.encode(torch.tensor([[1.0]])).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("cls", ARCHITECTURES.values())
def test_initial_decoder_rows_are_unit_vectors(cls):
    sae = make(cls, 16, 64)
    initialise(sae, torch.randn(16), torch.Generator().manual_seed(1))
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-6)
    assert not any(getattr(sae, name).any() for name in sae.latent_parameters if name.startswith("b_"))


def test_normalising_the_initial_decoder_keeps_the_function():
    median, x = torch.randn(16), torch.randn(40, 16)
    sae, raw = LogJumpReluSae(16, 64), JumpReluSae(16, 64)
    initialise(sae, median, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.kaiming_uniform_(raw.W_enc, generator=generator)
    torch.nn.init.kaiming_uniform_(raw.W_dec, generator=generator)
    raw.b_dec.copy_(sae.b_dec)
    assert torch.allclose(sae(x), raw(x), atol=1e-5)
    assert torch.allclose(sae.theta, 0.001 * raw.W_dec.norm(dim=1))


def test_only_jumprelu_has_the_decoders_norms_in_its_encoder():
    raw = torch.nn.init.kaiming_uniform_(torch.empty(16, 64), generator=torch.Generator().manual_seed(1))
    for cls in ARCHITECTURES.values():
        sae = make(cls, 16, 64)
        initialise(sae, torch.randn(16), torch.Generator().manual_seed(1))
        assert torch.equal(sae.W_enc, raw) == (cls is not JumpReluSae), cls


def test_a_tied_encoder_is_the_decoder_that_sees_what_b_dec_leaves():
    for cls in ARCHITECTURES.values():
        sae, median, x = make(cls, 16, 64), torch.randn(16), torch.randn(5, 16)
        initialise(sae, median, torch.Generator().manual_seed(1), tied=True)
        bias = sae.b_gate if cls.architecture == "gated" else sae.b_enc
        assert torch.allclose(x @ sae.W_enc + bias, (x - median) @ sae.W_dec.T, atol=1e-5)
        if cls.architecture == "gated":
            assert torch.equal(sae.b_gate, sae.b_mag)


def test_initial_thresholds_make_each_latent_active_on_its_share_of_the_sample(monkeypatch):
    monkeypatch.setattr("fastcache.sae.init.THRESHOLD_LATENTS", 13)
    sae, sample = JumpReluSae(8, 32), torch.randn(1000, 8)
    sae.W_enc.copy_(torch.randn(8, 32))
    sae.b_enc.fill_(3.0)  # so that no threshold has to be below 0
    sae.set_threshold(thresholds_for(sae, sample, l0=4.0))
    shares = (sae.encode(sample) > 0).float().mean(0)
    assert torch.allclose(shares, torch.full((32,), 4 / 32), atol=2e-3)
    assert (thresholds_for(sae, sample, l0=32.0) >= 0).all()
    assert (thresholds_for(sae, sample - 100 * sae.W_enc.sum(1), l0=4.0) >= 0).all()


@pytest.mark.parametrize("n", [1, 2, 7, 500])
@pytest.mark.parametrize("l0", [0.5, 5.0, 31.0, 32.0, 40.0])
def test_initial_thresholds_are_quantiles_of_rows_from_the_whole_sample(monkeypatch, n, l0):
    monkeypatch.setattr("fastcache.sae.init.THRESHOLD_ROWS", 100)
    generator = torch.Generator().manual_seed(0)
    sae, sample = JumpReluSae(8, 32), torch.randn(n, 8, generator=generator)
    sae.W_enc.copy_(torch.randn(8, 32, generator=generator))
    rows = sample[[int(i * (n - 1) / (min(n, 100) - 1)) if n > 1 else 0 for i in range(min(n, 100))]]
    expected = (rows @ sae.W_enc).quantile(max(0.0, 1 - l0 / 32), dim=0).clamp(min=0)
    assert torch.allclose(thresholds_for(sae, sample, l0), expected, atol=1e-5)
    sae.b_enc.fill_(-100.0)
    assert not thresholds_for(sae, sample, l0).any()


def test_geometric_median_of_a_line_is_its_median():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [100.0, 0.0]])
    assert torch.allclose(geometric_median(points, 2000), torch.tensor([2.0, 0.0]), atol=0.05)


def test_the_geometric_median_stops_where_it_no_longer_moves(monkeypatch):
    from fastcache.sae import init

    objectives, weighted_distance = [], init._weighted_distance
    monkeypatch.setattr(
        init, "_weighted_distance", lambda *args: objectives.append(weighted_distance(*args)) or objectives[-1]
    )
    points = torch.tensor([[5.0, 1.0], [7.0, 1.0], [6.0, 0.0], [6.0, 2.0]])
    assert torch.equal(geometric_median(points), torch.tensor([6.0, 1.0]))
    assert objectives == [1.0, 1.0]  # summed distance over the number of points; the second look ends it


def test_initialising_forgets_what_the_biases_were():
    for cls in ARCHITECTURES.values():
        sae = make(cls)
        for value in sae.parameters():
            value.fill_(0.7)
        initialise(sae, torch.zeros(8), torch.Generator().manual_seed(0))
        assert not any(getattr(sae, name).any() for name in ("b_dec", *sae.latent_parameters) if name.startswith("b_"))


def test_geometric_median_minimises_the_summed_distance():
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1])
    median = geometric_median(points)
    best = (points - median).norm(dim=1).sum()
    for shift in torch.eye(3):
        assert (points - median - 0.05 * shift).norm(dim=1).sum() > best


@pytest.mark.parametrize("cls", ARCHITECTURES.values())
def test_nothing_is_made_on_another_device(cls):
    sae, x, generator = make(cls), torch.randn(30, 8), torch.Generator().manual_seed(0)
    with torch.device("meta"):  # what is made without saying where would land there, and fail
        initialise(sae, geometric_median(x), generator)
        sae.loss_and_grads(x, StepInputs(0.1))
        metrics = Metrics(("all",), 8, 16)
        metrics.update(sae, x, x.new_ones(1, 30).bool(), x.new_zeros(30).long())
    assert metrics.result()["splits"]["all"]["n_tokens"] == 30


def test_learning_rate_has_the_papers_three_phases():
    rate = LearningRate(peak=7e-5, end=7e-6, warm_up_steps=16_000, decay_steps=64_000, total_steps=320_000)
    assert rate.at(0) == pytest.approx(7e-5 / 16_000)
    assert rate.at(7_999) == pytest.approx(3.5e-5)
    assert rate.at(16_000) == pytest.approx(7e-5)
    middle = 16_000 + (320_000 - 64_000 - 16_000) // 2
    assert rate.at(middle) == pytest.approx((7e-5 + 7e-6) / 2)
    assert rate.at(256_000) == pytest.approx(7e-6)
    assert rate.at(288_000) == pytest.approx(3.5e-6)
    assert 0 < rate.at(319_999) < 2e-10


def test_sparsity_coefficient_rises_linearly_from_zero():
    values = [sparsity_coefficient(5.0, 10_000, step) for step in (0, 2_500, 10_000, 20_000)]
    assert values == [0.0, 1.25, 5.0, 5.0]


@pytest.mark.parametrize("cls", ARCHITECTURES.values())
def test_a_saved_sae_comes_back_exactly(cls, tmp_path):
    sae = make(cls)
    initialise(sae, torch.randn(8), torch.Generator().manual_seed(0))
    save_sae(tmp_path / "sae", sae, {"hook_point": "resid_post.1"})
    loaded, info = load_sae(tmp_path / "sae")
    assert info["hook_point"] == "resid_post.1"
    assert all(torch.equal(value, sae.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_nan_weights_are_not_saved(tmp_path):
    sae = StandardSae(8, 16)
    sae.W_dec[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="W_dec"):
        save_sae(tmp_path, sae, {})
    assert not list(tmp_path.iterdir())


def test_nan_weights_are_not_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    save_sae(tmp_path, StandardSae(8, 16), {})
    weights = load_file(tmp_path / "sae.safetensors")
    weights["W_dec"][0, 0] = float("nan")
    save_file(weights, tmp_path / "sae.safetensors")
    with pytest.raises(NonFiniteError, match="W_dec"):
        load_sae(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    save_sae(tmp_path / "a", StandardSae(8, 16), {})
    save_sae(tmp_path / "b", StandardSae(8, 32), {})
    (tmp_path / "b/sae.safetensors").replace(tmp_path / "a/sae.safetensors")
    with pytest.raises(FormatError, match="should hold"):
        load_sae(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("topk", {"k": "4"}), ("topk", {"k": 0}), ("topk", {"k": 17}), ("topk", {"k": 4.0}), ("topk", {"kk": 4}),
        ("topk", {}), ("batchtopk", {"k": True}), ("standard", {"k": 4}), ("topk", [4]),
        ("matryoshka", {"k": 4, "widths": [9, 3]}), ("matryoshka", {"k": 4, "widths": [99]}),
    ],
)  # fmt: skip
def test_options_that_are_not_the_architectures_are_refused(name, options, tmp_path):
    import json

    save_sae(tmp_path, make(ARCHITECTURES[name]), {})
    info = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps({**info, "options": options}))
    with pytest.raises(FormatError, match="options"):
        load_sae(tmp_path)
