"""Exported SAEs, loaded by the real SAELens, give our reconstructions."""

import pytest
import torch

pytest.importorskip("sae_lens", reason="sae-lens is not installed here: `make test-interop` has it")

from fastcache.progress import Silent
from fastcache.sae.architectures import ARCHITECTURES, BatchTopKSae, LogJumpReluSae, StepInputs, TopKSae
from fastcache.sae.storage import load_sae, save_sae
from fastcache.stages.export.config import ExportConfig
from fastcache.stages.export.run import export

INFO = {
    "hook_point": "resid_post.12",
    "model": {"name": "Qwen/Qwen2.5-0.5B-Instruct"},
    "method": {"name": "fast", "max_length": 8192},
    "corpus": {"fingerprint": "abc"},
}
D_IN, D_SAE = 24, 96


def random_sae(name, unit):
    generator = torch.Generator().manual_seed(3)
    cls = LogJumpReluSae if name == "log theta" else ARCHITECTURES[name]
    options = {"widths": (10, 40)} if name == "matryoshka" else {}
    sae = cls(D_IN, D_SAE, **options, **({"k": 9} if issubclass(cls, (TopKSae, BatchTopKSae)) else {}))
    for key, value in sae.named_parameters():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.4)
        if key == "threshold":
            value.abs_()
    if unit:
        sae.normalise_decoder()
    x = 2 * torch.randn(300, D_IN, generator=generator)
    for _ in range(3):
        sae.loss_and_grads(0.9 * x, StepInputs())
    return sae.folded(0.3), x


@pytest.mark.parametrize("unit", [True, False], ids=["unit rows", "free rows"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "log theta"])
def test_an_exported_sae_gives_the_same_reconstructions(name, unit, tmp_path):
    from sae_lens import SAE

    sae, x = random_sae(name, unit)
    save_sae(tmp_path / "ours", sae, INFO)
    export(ExportConfig(sae=str(tmp_path / "ours")), tmp_path / "theirs", Silent())
    theirs, ours = SAE.load_from_disk(str(tmp_path / "theirs")), load_sae(tmp_path / "ours")[0]
    with torch.no_grad():
        found, expected = theirs(x), ours(x)
        latents = theirs.encode(x)
    assert 0 < float((latents != 0).float().mean()) < 0.9
    assert ((latents != 0) == (ours.encode(x) != 0)).all()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    if name != "topk":
        assert torch.allclose(theirs.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)


def test_where_it_came_from_is_kept(tmp_path):
    from sae_lens import SAE

    save_sae(tmp_path / "ours", random_sae("jumprelu", True)[0], INFO)
    export(ExportConfig(sae=str(tmp_path / "ours")), tmp_path / "theirs", Silent())
    config = SAE.load_from_disk(str(tmp_path / "theirs")).cfg
    assert config.metadata.model_name == "Qwen/Qwen2.5-0.5B-Instruct"
    assert config.metadata.hook_name == "blocks.12.hook_resid_post"
    assert config.metadata.context_size == 8192
    assert config.metadata.prepend_bos is False
    assert config.apply_b_dec_to_input is False
