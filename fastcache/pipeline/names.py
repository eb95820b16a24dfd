"""Names of default output directories: readable, the same each time, and different for different inputs.

A name is what it is made from where that can be a part of a file name as it stands. Where something of it has to go (a
folder, a capital letter, a blank), a short hash of all of it follows, so that `a/b.jsonl` and `a-b.jsonl` have two names.
"""

import hashlib
import json
import os
import re
import unicodedata
from pathlib import Path

from fastcache.assets import RECIPES

RUNS = Path("fastcache-runs")
"""Where everything goes unless the user says otherwise."""

MAX_BYTES = 100
"""The longest name in bytes: with what is added to it, it must fit into the 255 bytes that file systems allow."""

KINDS = ("cache-", "corpus-", "sae-", "sweep-", "latents-", "steer-")
"""How the names in RUNS begin."""

_HUB = re.compile(r"(?!.*--)[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")


def slug(text: str) -> str:
    """`text` as part of a file name: ASCII's letters, digits and dots, in lower case, what else can be seen beyond ASCII,
    and dashes for the rest."""
    lower = unicodedata.normalize("NFC", text).lower()
    kept = "".join(c if c == "." or c.isalnum() or (c.isprintable() and not c.isascii()) else "-" for c in lower)
    return re.sub("-+", "-", kept).strip("-.") or "x"


def _with_hash(readable: str, whole: str) -> str:
    """A readable name, made unique by a hash of `whole`."""
    short = slug(readable).encode()[-MAX_BYTES:].decode(errors="ignore").strip("-.")
    return f"{short}-{hashlib.sha256(whole.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _real(path: Path) -> Path:
    """The absolute path with its links followed, as far as they lead anywhere: `resolve` raises at a loop of links."""
    return Path(os.path.realpath(path))


def _is_faithful(text: str) -> bool:
    """Whether a text can be a part of a file name as it stands."""
    return slug(text) == text and len(text.encode()) <= MAX_BYTES


def _is_on_hub(text: str) -> bool:
    """Whether a text may be a name on the hub, as opposed to a path."""
    return _HUB.fullmatch(text) is not None and not Path(text).exists()


def source_name(*sources: str) -> str:
    """A name for what is made from data sets: files, folders, names on the hub (`org/name` becomes `org--name`)."""
    if len(sources) != 1:
        return _with_hash("-".join(sources), json.dumps(sources))
    text = sources[0]
    if _is_on_hub(text):
        return text.lower().replace("/", "--")
    path = str(Path(text))  # without ./ and doubled slashes
    return path if _is_faithful(path) else _with_hash(path, path)


def model_name(model: str) -> str:
    """A name for what is made from a model: of `Qwen/Qwen2.5-7B` the second half, which has the first in it already."""
    if Path(model).exists():
        path = Path(model)
        return _with_hash(_real(path).name, str(path))
    if not _is_on_hub(model):
        return model if _is_faithful(model) else _with_hash(model, model)
    owner, name = model.lower().split("/")
    first_word = re.match("[a-z]*", name)
    redundant = first_word is not None and first_word[0] == owner and _is_faithful(name)
    return name if redundant else f"{owner}--{name}"


def output_name(output: str) -> str:
    """A name for what is made from an output directory of fastcache, such as a cache or an SAE.

    One in RUNS, or in the working directory, is called by its path there.
    """
    if "://" in output:
        return _with_hash(output, output)
    path = _real(Path(output))
    for base in (_real(RUNS), Path.cwd()):
        if path != base and path.is_relative_to(base):
            parts = path.relative_to(base).parts
            name = "--".join(parts)
            taken = base == Path.cwd() and parts[0].startswith(KINDS)  # as one in RUNS is called
            if all(map(_is_faithful, parts)) and len(name.encode()) <= MAX_BYTES and not taken:
                return name
            break
    return _with_hash(path.name, str(path))


def study_name(file: Path) -> str:
    """A name for what is made from a study file: that of the file, for one in the working directory or of fastcache."""
    is_near = _real(file).parent == Path.cwd() or file.is_relative_to(RECIPES)
    return file.stem if is_near and _is_faithful(file.stem) else _with_hash(file.stem, str(_real(file)))
