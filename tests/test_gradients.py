"""Closed-form gradients of every architecture against autograd, in float64."""

import pytest
import reference_sae
import torch

from fastcache.sae.architectures import (
    BatchTopKSae,
    GatedSae,
    JumpReluSae,
    LogJumpReluSae,
    MatryoshkaSae,
    StandardSae,
    StepInputs,
    TopKSae,
)  # fmt: skip

D_IN, D_SAE, BATCH = 6, 20, 50
CASES = {
    "standard": (StandardSae, {}),
    "standard, norm-weighted": (StandardSae, {"norm_weighted": True}),
    "jumprelu, log theta": (LogJumpReluSae, {"bandwidth": 0.7, "initial_threshold": 0.3}),
    "jumprelu": (JumpReluSae, {"bandwidth": 0.7}),
    "jumprelu, target L0": (JumpReluSae, {"bandwidth": 0.7, "target_l0": 3.0}),
    "topk": (TopKSae, {"k": 5}),
    "batchtopk": (BatchTopKSae, {"k": 5}),
    "gated": (GatedSae, {}),
    "gated, norm-weighted": (GatedSae, {"norm_weighted": True}),
    "matryoshka": (MatryoshkaSae, {"k": 5, "widths": (3, 9)}),
}
DEAD = torch.tensor([1, 4, 5, 11, 17])


def random_sae(name):
    cls, keywords = CASES[name]
    generator = torch.Generator().manual_seed(0)
    sae = cls(D_IN, D_SAE, **keywords).double()
    for key, value in sae.named_parameters():
        value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.double) * 0.5)
        if key == "threshold":
            value.abs_()
    return sae, torch.randn(BATCH, D_IN, generator=generator, dtype=torch.double)


@pytest.mark.parametrize("dead", [None, DEAD, DEAD[:2]], ids=["none dead", "5 dead", "2 dead"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_autograd(name, dead):
    sae, x = random_sae(name)
    if name.startswith("gated") and dead is not None:
        pytest.skip("gated SAEs have no auxiliary loss")
    inputs = StepInputs(0.3, 0.2, dead)
    figures = sae.loss_and_grads(x, inputs)
    loss, grads = reference_sae.loss_and_grads(sae, x, inputs)
    assert torch.allclose(figures.loss, loss, rtol=1e-12)
    for key, value in sae.named_parameters():
        assert value.grad.abs().sum() > 0
        assert torch.allclose(value.grad, grads[key], rtol=1e-10, atol=1e-12), key


@pytest.mark.parametrize("name", CASES)
def test_a_step_leaves_its_batch_and_parameters_alone(name):
    sae, x = random_sae(name)
    before = {key: value.clone() for key, value in sae.named_parameters()}, x.clone()
    sae.loss_and_grads(x, StepInputs(0.3))
    assert torch.equal(x, before[1])
    assert all(torch.equal(value, before[0][key]) for key, value in sae.named_parameters())


@pytest.mark.parametrize("name", CASES)
def test_figures_are_of_the_latents_in_training(name):
    sae, x = random_sae(name)
    figures = sae.loss_and_grads(x, StepInputs(0.3))
    f = reference_sae.latents(sae, dict(sae.named_parameters()), x)[1]
    assert float(figures.l0) == pytest.approx((f > 0).sum(1).double().mean().item())
    assert figures.fired.tolist() == (f > 0).any(0).tolist()
    assert float(figures.squared_error) == pytest.approx(float(reference_sae.squared(sae.decode(f) - x)))


@pytest.mark.parametrize("scale", [0.01, 0.7, 30.0])
@pytest.mark.parametrize("name", CASES)
def test_a_scale_can_be_folded_in_exactly(name, scale):
    sae, x = random_sae(name)
    sae.calibrate(0.9 * x)  # batchtopk gets its threshold
    folded = sae.folded(scale)
    assert torch.allclose(folded.encode(x / scale) * scale, sae.encode(x), atol=1e-12)
    assert torch.allclose(folded(x / scale) * scale, sae(x), atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_scale_is_folded_in_to_a_millionth_in_float32(name):
    sae, x = random_sae(name)
    sae, x = sae.float(), x.float()
    sae.calibrate(0.9 * x)
    scale = 0.0371
    expected = sae(x * scale) / scale
    found = sae.folded(scale)(x)
    same = (sae.encode(x * scale) > 0) == (sae.folded(scale).encode(x) > 0)  # but where rounding decides at a threshold
    rows = same.all(1)
    assert rows.float().mean() > 0.9
    assert (found - expected)[rows].norm() < 1e-6 * expected[rows].norm()


def test_batchtopk_threshold_gives_about_k_latents_on_new_tokens():
    generator = torch.Generator().manual_seed(1)
    sae = BatchTopKSae(16, 64, k=7)
    for value in sae.parameters():
        value.copy_(torch.randn(value.shape, generator=generator))
    sae.calibrate(torch.randn(25_600, 16, generator=generator))
    l0 = (sae.encode(torch.randn(4096, 16, generator=generator)) > 0).sum(1).float().mean()
    assert float(l0) == pytest.approx(7, rel=0.02)


def test_matryoshka_of_one_width_is_batchtopk():
    sae, x = random_sae("batchtopk")
    other = MatryoshkaSae(D_IN, D_SAE, k=5).double()
    other.load_state_dict(sae.state_dict())
    figures, same = sae.loss_and_grads(x, StepInputs()), other.loss_and_grads(x, StepInputs())
    assert torch.allclose(figures.loss, same.loss, rtol=1e-12)
    for a, b in zip(sae.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12)
