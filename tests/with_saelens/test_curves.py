"""Training curves step by step beside SAELens and dictionary_learning: same data, same initial weights, same optimiser."""

import importlib

import pytest
import torch

pytest.importorskip("sae_lens", reason="sae-lens is not installed here: `make test-interop` has it")

from fastcache.sae.architectures import BatchTopKSae, GatedSae, MatryoshkaSae, StepInputs, TopKSae
from fastcache.stages.train import trainer as trainer_module
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.recipe import resolve
from fastcache.stages.train.trainer import Trainer

D_IN, D_SAE, BATCH, STEPS, LR = 16, 128, 256, 60, 2e-3


def batches(scale=1.0):
    """Sparse combinations of directions, with noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, D_IN, generator=generator)
    made = []
    for _ in range(STEPS):
        strengths = torch.rand(BATCH, 40, generator=generator)
        strengths *= torch.rand(BATCH, 40, generator=generator) < 0.1
        made.append(scale * (strengths @ directions + 0.05 * torch.randn(BATCH, D_IN, generator=generator)))
    return made


def initial_weights():
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.randn(D_SAE, D_IN, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return {"W_dec": W_dec, "W_enc": 0.7 * W_dec.T, "b_dec": torch.zeros(D_IN)}


SAELENS = {
    "standard": ("Standard", {"l1_coefficient": 0.3}, {"coefficient": 0.3}),
    "jumprelu": (
        "JumpReLU",
        {"l0_coefficient": 0.02, "jumprelu_bandwidth": 0.3, "jumprelu_init_threshold": 0.2},
        {"coefficient": 0.02, "bandwidth": 0.3, "threshold": 0.2, "target_l0": None},
    ),
    "jumprelu, target": (
        "JumpReLU",
        {
            "l0_coefficient": 0.1, "jumprelu_bandwidth": 0.3, "jumprelu_init_threshold": 0.2, "target_l0": 4.0,
            "jumprelu_sparsity_loss_mode": "quadratic",
        },
        {"coefficient": 0.1, "bandwidth": 0.3, "threshold": 0.2, "target_l0": 4.0},
    ),
    "topk": ("TopK", {"k": 3, "aux_loss_coefficient": 0.5, "rescale_acts_by_decoder_norm": False}, {"k": 3}),
    "batchtopk": ("BatchTopK", {"k": 3, "aux_loss_coefficient": 0.5, "rescale_acts_by_decoder_norm": False}, {"k": 3}),
    "matryoshka": (
        "MatryoshkaBatchTopK",
        {
            "k": 3, "aux_loss_coefficient": 0.5, "rescale_acts_by_decoder_norm": False,
            "matryoshka_widths": [16, 50, D_SAE],
        },
        {"k": 3, "widths": (16, 50, D_SAE)},
    ),
}  # fmt: skip


def saelens_curve(name, data):
    from sae_lens import saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kind, options, _ = SAELENS[name]
    config = getattr(saes, f"{kind}TrainingSAEConfig")(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False, **options)
    sae = getattr(saes, f"{kind}TrainingSAE")(config)
    for key, value in initial_weights().items():
        getattr(sae, key).data.copy_(value)
    settings = SAETrainerConfig(
        total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=LR, lr_end=LR, dead_feature_window=5,
        lr_scheduler_name="constant", lr_warm_up_steps=0, lr_decay_steps=0, n_checkpoints=0, feature_sampling_window=10**6,
        autocast=False, device="cpu", checkpoint_path=None, save_final_checkpoint=False,
    )  # fmt: skip
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=iter(()))
    losses = []
    for x in data:
        losses.append(float(trainer.step(x).loss.detach()))
        trainer.n_training_steps += 1
    return losses, sae, int(trainer.dead_neurons.sum())


def our_curve(name, data):
    settings = {
        "tokens": STEPS * BATCH, "batch_size": BATCH, "expansion": D_SAE // D_IN, "lr": LR, "lr_warm_up": 0.0,
        "lr_decay": 0.0, "coefficient_warm_up": 0.0, "scale_activations": False, "decoder_norm": "free",
        "aux_coefficient": 0.0, "dead_window": 5,
    }  # fmt: skip
    arch = name.partition(",")[0]
    options = dict(SAELENS[name][2])
    recipe_name = {}
    if arch == "jumprelu":
        settings["theta_lr"] = 1.0
        if options["target_l0"] is None:
            recipe_name = {"recipe": "fast-paper", "theta": "direct", "lr_end": LR}
    elif arch != "standard":
        settings["aux_coefficient"] = 0.5
    config = TrainConfig(cache="", arch=arch, **{**settings, **options, **recipe_name})
    trainer = Trainer(resolve(config, D_IN, 10**6), "cpu")
    for key, value in initial_weights().items():
        getattr(trainer.sae, key).copy_(value)
    return [float(trainer.step(x).loss) for x in data], trainer.sae


@pytest.mark.parametrize("name", SAELENS)
def test_curve_equals_saelens_step_by_step(name, monkeypatch):
    monkeypatch.setattr(trainer_module, "DEAD_EVERY", 1)
    data = batches()
    theirs, their_sae, n_dead = saelens_curve(name, data)
    ours, our_sae = our_curve(name, data)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < 0.95 * ours[0]
    for key, value in our_sae.named_parameters():
        assert torch.allclose(value, getattr(their_sae, key), atol=2e-4), key
    if name in ("topk", "batchtopk", "matryoshka"):
        assert n_dead  # so the auxiliary loss took part


K, WIDTHS = 3, (16, 50, D_SAE)
DICTIONARY_LEARNING = {
    "topk": ("top_k", "TopKTrainer", lambda: TopKSae(D_IN, D_SAE, K), {"k": K}),
    "batchtopk": ("batch_top_k", "BatchTopKTrainer", lambda: BatchTopKSae(D_IN, D_SAE, K), {"k": K}),
    "matryoshka": (
        "matryoshka_batch_top_k",
        "MatryoshkaBatchTopKTrainer",
        lambda: MatryoshkaSae(D_IN, D_SAE, K, WIDTHS),
        {
            "k": K,
            "group_fractions": [0.125, 34 / 128, 78 / 128],
            "group_weights": [3.0, 3.0, 3.0],
        },  # it averages, we sum
    ),
    "gated": ("gdm", "GatedSAETrainer", lambda: GatedSae(D_IN, D_SAE), {"l1_penalty": 0.3, "sparsity_warmup_steps": 0}),
}


@pytest.mark.parametrize("name", DICTIONARY_LEARNING)
def test_curve_equals_dictionary_learning_step_by_step(name, dictionary_learning):
    """With b_dec held at 0, as it centres the input and we don't; and no gradient clipping, which it does in another order."""
    module, trainer_name, make, options = DICTIONARY_LEARNING[name]
    module = importlib.import_module(f"dictionary_learning.trainers.{module}")
    theirs = getattr(module, trainer_name)(
        steps=1000, activation_dim=D_IN, dict_size=D_SAE, layer=0, lm_name="none", lr=LR, warmup_steps=0, device="cpu",
        **options,
    )  # fmt: skip
    weights, sae = initial_weights(), make()
    for key, value in weights.items():
        getattr(sae, key).copy_(value)
    with torch.no_grad():
        if name == "matryoshka":
            theirs.ae.W_enc.copy_(weights["W_enc"])
            theirs.ae.W_dec.copy_(weights["W_dec"])
        else:
            theirs.ae.encoder.weight.copy_(weights["W_enc"].T)
            theirs.ae.decoder.weight.copy_(weights["W_dec"].T)
    bias = theirs.ae.decoder_bias if name == "gated" else theirs.ae.b_dec
    bias.requires_grad_(False)
    betas = (0.0, 0.999) if name == "gated" else (0.9, 0.999)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, betas=betas)
    for step, x in enumerate(batches(0.02), 1):
        loss = float(theirs.loss(x, step=step))
        figures = sae.loss_and_grads(x, StepInputs(0.3))
        assert float(figures.loss) == pytest.approx(loss, rel=1e-4), step
        theirs.update(step, x)
        sae.b_dec.grad = None
        sae.remove_parallel_decoder_gradient()
        optimizer.step()
        sae.normalise_decoder()
