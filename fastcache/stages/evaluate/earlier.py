"""Earlier evaluations of an SAE: those that are still valid are kept, and the others are reported.

`evaluation.json` is the newest. One on other dialogues, or whose figures with the model were measured otherwise, is copied to a
name that follows from what it was measured on, so that going back and forth between two caches doesn't add files.
"""

from pathlib import Path
from typing import Any

from fastcache.errors import FormatError
from fastcache.files import fingerprint, read_json, write_bytes_atomic
from fastcache.progress import Progress

EVALUATION_FILE = "evaluation.json"
EARLIER_FILES = "evaluation-*.json"
Evaluation = dict[str, Any]


def with_earlier(folder: Path, result: Evaluation, progress: Progress) -> Evaluation:
    """`result`, with the figures with the model of an earlier evaluation where it has none and they are still valid.

    Makes room for it in `folder`. Valid is what was measured on the same weights and, to be taken over, the same cache.
    """
    newest = _read(folder / EVALUATION_FILE, progress)
    if newest is None:
        return result
    if newest.get("sae_fingerprint") != result["sae_fingerprint"]:
        progress.say(f"{folder / EVALUATION_FILE} is replaced: it {_why_stale(newest)}.")
        return result
    archived = [_read(path, progress) for path in sorted(folder.glob(EARLIER_FILES))]
    valid = [earlier for earlier in (newest, *archived) if earlier and _same(earlier, result)]
    if "with_model" not in result:
        measured = [earlier["with_model"] for earlier in valid if isinstance(earlier.get("with_model"), dict)]
        if measured:
            most = max(measured, key=_n_dialogues)
            result = {**result, "with_model": most}
            progress.say(f"{folder}: the figures with the model, of {_n_dialogues(most)} dialogues, are kept.")
    if _measured_on(newest) not in (_measured_on(result), {**_measured_on(result), "with_model": None}):
        kept = folder / f"evaluation-{fingerprint(_measured_on(newest))[:12]}.json"
        # A copy: killed before the new one is written, evaluation.json is still there.
        write_bytes_atomic(kept, (folder / EVALUATION_FILE).read_bytes())
        progress.say(f"The earlier evaluation, {_described(newest)}, is kept in {kept}.")
    return result


def _read(path: Path, progress: Progress) -> Evaluation | None:
    if not path.is_file():
        return None
    try:
        evaluation = read_json(path)
    except FormatError as error:
        progress.say(f"{error} It is left out.")
        return None
    return evaluation if isinstance(evaluation.get("held_out"), dict) else None


def _same(earlier: Evaluation, result: Evaluation) -> bool:
    """Whether both are of the same weights on the same cache."""
    held_out = earlier["held_out"].get("fingerprint") == result["held_out"]["fingerprint"]
    return held_out and earlier.get("sae_fingerprint") == result["sae_fingerprint"]


def _measured_on(evaluation: Evaluation) -> dict[str, Any]:
    """What tells an evaluation of an SAE from another."""
    held_out, with_model = evaluation["held_out"], evaluation.get("with_model")
    if isinstance(with_model, dict):
        with_model = {name: with_model.get(name) for name in ("dialogues", "model_dtype", "model_backend")}
    return {"cache": held_out.get("fingerprint"), "dialogues": held_out.get("dialogues"), "with_model": with_model}


def _n_dialogues(with_model: dict[str, Any]) -> int:
    number = with_model.get("dialogues")
    return number if isinstance(number, int) else 0


def _why_stale(evaluation: Evaluation) -> str:
    lost = ", with the figures with the model that it had (--with-model measures them again)"
    why = "is of other weights" if "sae_fingerprint" in evaluation else "doesn't say which weights it is of"
    return why + (lost if "with_model" in evaluation else "")


def _described(evaluation: Evaluation) -> str:
    held_out = evaluation["held_out"]
    model = ", with the model" if "with_model" in evaluation else ""
    return f"on {held_out.get('dialogues')} dialogues of {held_out.get('cache')}{model}"
