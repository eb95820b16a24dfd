"""Names, types and limits of the format; docs/FORMAT.md says the same in words, and a test holds them together."""

import re
from enum import IntEnum, IntFlag

import numpy as np
import numpy.typing as npt

from fastcache.errors import FormatError, InputError

FORMAT_NAME = "fastcache"
FORMAT_VERSION = "1.1"

UNIT_ROWS = 256
"""Rows of one inner chunk: the unit of checksums and of shuffling."""

SHARD_BYTES = 117_440_512
"""Aim for the size of one shard file (65,536 rows of 896 bfloat16 values)."""

MANIFEST_FILE = "manifest.json"
LOG_FILE = "parts.jsonl"
PARTS_FOLDER = "parts"

METHODS = ("fast", "bt-f", "bt-p")
"""Data methods of the paper, as a manifest names them."""

TOKEN_ARRAYS: dict[str, str] = {
    "token_ids": "int32",
    "token_types": "uint8",
    "instance_ids": "int64",
    "instance_offsets": "int64",
    "document_ids": "int64",
    "document_offsets": "int64",
}
"""Arrays of every part besides the residuals, and their dtypes."""

STORED_DTYPES: dict[str, str] = {"bfloat16": "uint16", "float16": "float16", "float32": "float32", "int8": "int8"}
"""Logical dtype of residuals -> dtype of the Zarr array."""

ROW_DTYPES: dict[str, str] = {**STORED_DTYPES, "int8": "float32"}
"""Logical dtype of residuals -> dtype of the rows that readers get; `decode` makes float32 of them."""

_HOOK_POINT = re.compile(r"resid_post\.(0|[1-9][0-9]{0,3})")


class TokenType(IntFlag):
    """Flags of one token, in the low five bits of `token_types`."""

    SPECIAL = 1
    """A special token of the chat template, such as `<|im_start|>`, but for begin-of-sequence; or the token that ends
    a document in bt-p."""
    ROLE_WORD = 2
    """The role word in a turn's header: `user`, `assistant`, or Gemma's `model`."""
    TEMPLATE = 4
    """Any other text that the chat template added."""
    CONTENT = 8
    """Text of a turn, or of a document."""
    FIRST_POSITION = 16
    """Position 0 of the sequence that the model saw."""


class TurnRole(IntEnum):
    """Whose turn a token belongs to, in the high three bits of `token_types`."""

    NONE = 0
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TOOL = 4
    REASONING = 5
    """What an assistant thinks before it answers."""


ROLE_SHIFT = 5

SPLITS: dict[str, tuple[int, int]] = {
    "all": (0, 0),
    "special": (TokenType.SPECIAL | TokenType.ROLE_WORD, 0),
    "special_not_first": (TokenType.SPECIAL | TokenType.ROLE_WORD, TokenType.FIRST_POSITION),
    "content": (TokenType.CONTENT, 0),
}
"""Named sets of tokens: (any of these flags, none of these)."""


SPLIT_TITLES = {"all": "all", "special": "special", "special_not_first": "special, not first", "content": "content"}
"""How tables name the splits."""


def select(token_types: npt.NDArray[np.uint8], split: str) -> npt.NDArray[np.bool_]:
    """Mask `[n]` of the tokens of `split`, one of `SPLITS`. The set `special` is that of the paper's Table 11."""
    wanted, unwanted = SPLITS[split]
    mask = np.ones(token_types.shape, bool) if not wanted else (token_types & wanted) != 0
    return mask & ((token_types & unwanted) == 0)


def turn_roles(token_types: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """`TurnRole` of each token `[n]`."""
    return np.right_shift(token_types, ROLE_SHIFT, dtype=np.uint8)


def hook_point(layer: int) -> str:
    """Name of the residual stream after decoder layer `layer` (0-based)."""
    return f"resid_post.{layer}"


def layer_of(name: str) -> int:
    """Layer number of a hook point; raises `InputError` for other names."""
    match = _HOOK_POINT.fullmatch(name)
    if not match:
        raise InputError(f"{name!r} is not a hook point; expected resid_post.<layer>, for example resid_post.18.")
    return int(match[1])


def hook_of_file(name: str) -> str | None:
    """The hook point to one of whose arrays a file of a part belongs; None for all other files."""
    match = _HOOK_POINT.match(name)
    return match[0] if match and name[match.end() : match.end() + 1] in (".", "/") else None


def checksum_array(name: str) -> str:
    """Name of the array that holds the crc32c of each unit of the residual array `name`."""
    return f"{name}.crc32c"


def shard_rows(n_rows: int, n_columns: int, itemsize: int, unit_rows: int = UNIT_ROWS) -> int:
    """Rows of one shard: about `SHARD_BYTES`, whole units, not more than the array needs, at least one unit."""
    wanted = max(1, SHARD_BYTES // (unit_rows * n_columns * itemsize))
    needed = max(1, -(-n_rows // unit_rows))
    return unit_rows * min(wanted, needed)


def encode(residuals: npt.NDArray[np.float32], logical_dtype: str) -> npt.NDArray[np.generic]:
    """Residuals as stored. bfloat16 rounds to nearest even. Raises `FormatError` where a value overflows."""
    if logical_dtype == "float32":
        return residuals
    if logical_dtype == "float16":
        with np.errstate(over="ignore"):
            stored = residuals.astype(np.float16)
        if not np.isfinite(stored).all():
            largest = float(np.abs(residuals).max())
            raise FormatError(
                f"A residual of {largest:.4g} overflows float16 (65,504). Use --dtype bfloat16 or float32."
            )
        return stored
    bits = residuals.view(np.uint32)
    wide = bits >> np.uint32(16)  # in place from here on: new arrays would take longer than the arithmetic
    wide &= np.uint32(1)
    wide += np.uint32(0x7FFF)
    wide += bits
    wide >>= np.uint32(16)
    rounded = wide.astype(np.uint16)
    if ((rounded & np.uint16(0x7F80)) == np.uint16(0x7F80)).any():
        raise FormatError("A residual overflows bfloat16 (3.39e38), or is not finite. Use --dtype float32.")
    return rounded


def decode(stored: npt.NDArray[np.generic], logical_dtype: str) -> npt.NDArray[np.float32]:
    """Stored residuals as float32; exact for every logical dtype."""
    if logical_dtype == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32, copy=False)


_ROLES = {role.name.lower(): role for role in TurnRole if role is not TurnRole.NONE}
TOKEN_SETS = (*SPLITS, "first", *_ROLES)
"""What figures are given of: the splits, position 0, and the turns of each role, with all of their tokens."""


def token_sets(token_types: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Masks `[sets, n]` of the tokens of each of `TOKEN_SETS`."""
    roles = turn_roles(token_types)
    masks = [select(token_types, split) for split in SPLITS]
    masks += [(token_types & TokenType.FIRST_POSITION) != 0, *(roles == role for role in _ROLES.values())]
    return np.stack(masks)
