"""Folders of evaluated SAEs with figures that a test chooses, as `train` and `evaluate` leave them."""

import json

from fastcache.cache_format.schema import SPLITS
from fastcache.sae.metrics import DENSITY_EDGES

D_IN = 896
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def figures(fvu, l0):
    """Of a set of tokens, each with an interval of a tenth around it."""
    of = {"fvu": fvu, "l0": l0, "mse": fvu, "log2_mse": -2.0 + fvu, "mse_pooled": fvu, "log2_mse_pooled": -2.0}
    of |= {"cosine": 0.9, "relative_norm": 0.9}
    intervals = {name: [value - abs(value) / 10, value + abs(value) / 10] for name, value in of.items()}
    return {
        "n_tokens": 100,
        "n_dialogues": 10,
        **of,
        "intervals": intervals,
        "share_of_squared_error": 0.25,
        "l0_quantiles": {"0.5": 3},
    }


def write_run(
    folder, fvu=0.2, l0=20.0, *, method="fast", arch="jumprelu", layer=4, model=MODEL, recovered=None, **settings
):
    """One run; `settings` are of training."""
    folder.mkdir(parents=True)
    expansion = settings.get("expansion", 8)
    shared = {"arch": arch, "layer": layer, "expansion": expansion, "cache": f"cache-{method}", **settings}
    resolved = {"steps": 100, "batch_size": 64, "d_sae": expansion * D_IN, "d_in": D_IN}
    (folder / "run.json").write_text(json.dumps({"command": "train", "settings": {**shared, "resolved": resolved}}))
    (folder / "sae.json").write_text(json.dumps({"model": {"name": model}, "hook_point": f"resid_post.{layer}"}))
    result = {
        "sae": str(folder),
        "architecture": arch,
        "hook_point": f"resid_post.{layer}",
        "trained_on": method,
        "training": {"tokens": 6400},
        "held_out": {"cache": "held-out", "fingerprint": model, "split": "eval", "dialogues": 10},
        "d_sae": expansion * D_IN,
        "dead_latents": 3,
        "dead_share": 0.01,
        "density": {"log10_edges": DENSITY_EDGES, "counts": [3] * (len(DENSITY_EDGES) - 1)},
        "splits": {name: figures(fvu, l0) for name in (*SPLITS, "first")},
    }
    if recovered is not None:
        result["with_model"] = {"splits": {"all": {"n_tokens": 90, "delta_loss": 1.0, "loss_recovered": recovered}}}
    (folder / "evaluation.json").write_text(json.dumps(result))
    return str(folder)
