"""What can be said of a model's folder and configuration before any library builds something of their sizes."""

import json
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcache.errors import ModelError, first_line, quoted

MAX_CONFIG_BYTES = 16 * 2**20
MAX_TOKENIZER_BYTES = 512 * 2**20
"""Tokenizers of 262,144 tokens have 33 MB."""

SIZES = {
    "num_hidden_layers": 2000,
    "hidden_size": 2**20,
    "vocab_size": 2**27,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": 2**40,
}
"""The largest value of each that is believed: models have a tenth of it at most."""
NEEDED = ("num_hidden_layers", "hidden_size", "vocab_size")


def require_readable_files(folder: Path, name: str) -> None:
    """Raise `ModelError` for a model's folder with files that reading would wait for, or that are absurdly large.

    `name` is the model's name in messages. Files that are missing are left to those who need them.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin"):
            continue
        try:
            status = path.stat()
        except OSError as error:
            raise ModelError(
                f"Model {name!r}: {path} can't be read: {error.strerror or first_line(error)}. Get the model's files again."
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"Model {name!r}: {path} is no regular file. Get the model's files again.")
        is_text = path.suffix in (".json", ".jinja")
        largest = MAX_TOKENIZER_BYTES if path.name.startswith(("tokenizer", "vocab", "merges")) else MAX_CONFIG_BYTES
        if is_text and not path.name.endswith(".index.json") and status.st_size > largest:
            raise ModelError(
                f"Model {name!r}: {path} has {status.st_size:,} bytes, where {largest:,} are more than any model needs. "
                "Get the model's files again."
            )
    _require_small_numbers(folder / "config.json", name)


def _require_small_numbers(path: Path, name: str) -> None:
    """Raise `ModelError` for sizes in a config.json that a library would make lists and tensors of before it compares them."""
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong
    parts = [raw, *raw.values()] if isinstance(raw, dict) else []  # text_config and its like lie one level below
    for part in parts:
        for field, largest in SIZES.items() if isinstance(part, dict) else ():
            value = part.get(field)
            if isinstance(value, (int, float)) and value > largest:
                raise _unsound(name, f"{field} is {quoted(value)}, but no model has more than {largest:,}")


def setting(config: Any, name: str) -> Any:
    """The value of a configuration for all layers, None if it has none.

    transformers refuses to read such a value from the configuration of a model whose layers differ in it (Gemma 4).
    """
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return config.to_dict().get(name)


def require_sound_config(config: Any, name: str) -> None:
    """Raise `ModelError` for a decoder's configuration with sizes that no model can have; `name` is the model's name."""
    for field, largest in SIZES.items():
        value = setting(config, field)
        if value is None and field not in NEEDED:
            continue
        if isinstance(value, (list, tuple)) and field not in NEEDED:  # one for each layer
            continue
        if type(value) is not int or not 1 <= value <= largest:
            raise _unsound(name, f"{field} is {quoted(value)}, but it should be a whole number from 1 to {largest:,}")
    types = getattr(config, "layer_types", None)
    if isinstance(types, (list, tuple)) and len(types) != config.num_hidden_layers:
        raise _unsound(name, f"it has {config.num_hidden_layers} layers, but its layer_types name {len(types)}")


def require_vocabulary(tokenizer: Any, name: str) -> None:
    """Raise `ModelError` for a tokenizer without tokens of its own, or with an id that no model reaches.

    transformers makes up an empty tokenizer where the files with the vocabulary are missing.
    """
    ids = tokenizer.get_vocab().values()
    if len(ids) <= len(tokenizer.get_added_vocab()):
        raise ModelError(
            f"The tokenizer of model {name!r} has no vocabulary besides its special tokens: tokenizer.json, or the files that "
            "it is made from, are missing or damaged. Get the model's files again."
        )
    if max(ids) >= SIZES["vocab_size"]:
        raise ModelError(
            f"The tokenizer of model {name!r} has a token with the id {max(ids)}; no model has so many. Get the model's files "
            "again."
        )


def _unsound(name: str, reason: str) -> ModelError:
    return ModelError(
        f"The configuration of model {name!r} can't be right: {reason}. Nothing was computed. Get the model's files again, "
        "or correct its config.json."
    )


def require_known_tokens(token_ids: npt.NDArray[np.int32], config: Any, name: str) -> None:
    """Raise `ModelError` for token ids `[n]` that the model has no embedding for; `name` is the model's name."""
    if len(token_ids) and int(token_ids.max()) >= config.vocab_size:
        raise ModelError(
            f"The tokenizer of model {name!r} gives the token {int(token_ids.max())}, but its configuration has embeddings for "
            f"{config.vocab_size} tokens (vocab_size). Nothing was computed. Tokenizer and model don't belong together, or "
            "config.json is damaged."
        )


def reason_of(error: BaseException) -> str:
    """The first line of a library's error, without advice that fastcache doesn't give.

    torch explains how to load a pickle by running what is in it: that advice must not be passed on.
    """
    if re.search(r"weights_only|UnpicklingError|[Pp]ickle", f"{type(error).__name__} {error}"):
        return (
            "its weights are a pickle that holds more than tensors, or a damaged one. fastcache reads no such file, as reading "
            "can run code: use a checkpoint in safetensors"
        )
    return first_line(error)
