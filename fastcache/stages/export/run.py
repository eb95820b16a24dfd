"""The export stage: writes a trained SAE as another library loads it."""

from pathlib import Path

from safetensors.torch import save

from fastcache.config import as_dict
from fastcache.files import fingerprint, require_fields, write_bytes_atomic, write_json_atomic
from fastcache.progress import Progress
from fastcache.rundir import output_directory
from fastcache.sae.storage import INFO_FILE, load_sae
from fastcache.stages.export.config import ExportConfig
from fastcache.stages.export.saelens import CONFIG_FILE, WEIGHTS_FILE, config, weights


def export(settings: ExportConfig, out: Path, progress: Progress, fresh: bool = False) -> None:
    """Write the SAE in `settings.sae` into `out`; raises `FormatError` if there is none, `InputError` for a foreign `out`."""
    folder = Path(settings.sae)
    sae, info = load_sae(folder)
    fields = {"hook_point": str, "model": dict, "method": dict, "corpus": dict}
    require_fields(info, fields, folder / INFO_FILE)
    run = {**as_dict(settings), "sae_fingerprint": fingerprint(info)}
    with output_directory(out, "export", run, (CONFIG_FILE, WEIGHTS_FILE), free=("sae",), fresh=fresh):
        if (out / CONFIG_FILE).exists():
            progress.say(f"{out} is there; nothing to do (--fresh starts over).")
            return
        architecture, tensors = weights(sae)
        write_bytes_atomic(out / WEIGHTS_FILE, save({name: value.contiguous() for name, value in tensors.items()}))
        write_json_atomic(out / CONFIG_FILE, config(sae, architecture, info))
    progress.say(f"{sae.architecture} SAE as SAELens's {architecture}: SAE.load_from_disk({str(out)!r})")
