"""The export stage: writes a trained SAE as another library loads it."""

from pathlib import Path

import torch
from safetensors.torch import save

from fastcache.config import as_dict
from fastcache.errors import NonFiniteError
from fastcache.files import write_bytes_atomic, write_json_atomic
from fastcache.origins import cache_of_sae, corpus_sources
from fastcache.progress import Progress
from fastcache.rundir import output_directory
from fastcache.sae.storage import load_sae, sae_fingerprint
from fastcache.stages.export.config import ExportConfig
from fastcache.stages.export.saelens import CONFIG_FILE, WEIGHTS_FILE, config, weights


def export(settings: ExportConfig, out: Path, progress: Progress, fresh: bool = False) -> None:
    """Write the SAE in `settings.sae` into `out`.

    Raises `FormatError` if there is none, `NonFiniteError` if it isn't finite, `InputError` for a foreign `out`.
    """
    folder = Path(settings.sae)
    sae, info = load_sae(folder, ("hook_point", "model.name", "method", "corpus.fingerprint"))
    architecture, tensors = weights(sae)
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise NonFiniteError(
                f"{name} of {folder} has NaN or infinity as {settings.format} has it, with decoder rows of norm 1: its numbers "
                "are out of range, so nothing was written. Train the SAE again, with a lower --lr."
            )
    run = {**as_dict(settings), "sae_fingerprint": sae_fingerprint(folder)}
    with output_directory(out, "export", run, (CONFIG_FILE, WEIGHTS_FILE), free=("sae",), fresh=fresh):
        if (out / CONFIG_FILE).exists():
            progress.say(f"{out} is there; nothing to do (--fresh starts over).")
            return
        write_bytes_atomic(out / WEIGHTS_FILE, save({name: value.contiguous() for name, value in tensors.items()}))
        cache = cache_of_sae(folder)
        sources = corpus_sources(cache, info["corpus"]["fingerprint"]) if cache else []
        write_json_atomic(out / CONFIG_FILE, config(sae, architecture, info, sources))
    progress.say(f"{sae.architecture} SAE as SAELens's {architecture}: SAE.load_from_disk({str(out)!r})")
