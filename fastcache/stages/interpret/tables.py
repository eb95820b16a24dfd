"""What was collected as Parquet: a line for each latent, for each context, and for each window that was drawn."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastcache.cache_format.reader import Cache
from fastcache.files import atomic_file
from fastcache.stages.interpret.collect import NOWHERE, Collector, Contexts
from fastcache.stages.interpret.decoder import Ranked

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of a latent's activations: for each the context that was drawn from its bin."""
LATENTS_TOGETHER = 1024

_SHOWN: list[tuple[str, Any]] = [
    ("dialogue", pa.int32()), ("corpus_row", pa.int64()), ("position", pa.int32()), ("start", pa.int32()),
    ("text", pa.string()), ("tokens", pa.list_(pa.string())), ("token_types", pa.list_(pa.uint8())),
]  # fmt: skip
WINDOW_SCHEMA = pa.schema([("window", pa.int32()), *_SHOWN])
_ranked = pa.list_(pa.struct([("index", pa.int32()), ("value", pa.float32())]))
_ranked_tokens = pa.list_(pa.struct([("token", pa.string()), ("value", pa.float32())]))
CONTEXT_SCHEMA = pa.schema(
    [
        ("latent", pa.int32()), ("kind", pa.string()), ("rank", pa.int32()), ("value", pa.float32()),
        *_SHOWN, ("activations", pa.list_(pa.float32())),
    ]
)  # fmt: skip


class Texts:
    """Dialogues of a cache as pieces of text."""

    def __init__(self, cache: Cache, tokenizer: Any) -> None:
        """`tokenizer` None: tokens are shown by their numbers."""
        self._cache, self._tokenizer = cache, tokenizer
        self._pieces: dict[int, str] = {}
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"] if tokenizer else []

    def piece(self, token: int) -> str:
        """A token's text, as it is behind another: some decoders take the space from a first token."""
        if token not in self._pieces:
            before = self._decode(self._before)
            self._pieces[token] = self._decode([*self._before, token])[len(before) :]
        return self._pieces[token]

    def _decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, tokens))
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def window(self, dialogue: int, position: int, window: int) -> dict[str, Any]:
        """Pieces and types of the tokens around a position."""
        instance = self._cache.instance(dialogue)
        start, stop = max(0, position - window), min(len(instance), position + window + 1)
        tokens = instance.token_ids[start:stop].tolist()
        return {
            "dialogue": dialogue,
            "corpus_row": instance.instance_id,
            "position": position,
            "start": start,
            "text": self._decode(tokens),
            "tokens": [self.piece(token) for token in tokens],
            "token_types": instance.token_types[start:stop].tolist(),
        }


def write_contexts(path: Path, collected: Collector, texts: Texts) -> None:
    """The contexts of every latent: the highest by rank, then those that were drawn, by quantile."""
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, CONTEXT_SCHEMA, compression="zstd") as writer:
        for first in range(0, len(collected.histogram), LATENTS_TOGETHER):
            latents = range(first, min(first + LATENTS_TOGETHER, len(collected.histogram)))
            rows = [row for latent in latents for row in _contexts(latent, collected, texts)]
            writer.write_table(pa.Table.from_pylist(rows, CONTEXT_SCHEMA))


def _contexts(latent: int, collected: Collector, texts: Texts) -> Iterator[dict[str, Any]]:
    values, dialogues = collected.top.value[latent].tolist(), collected.top.dialogue[latent].tolist()
    order = sorted(range(len(values)), key=lambda place: (-values[place], dialogues[place]))
    yield from _rows(latent, "top", collected.top, order, texts)
    yield from _rows(latent, "drawn", collected.drawn, quantile_bins(collected.histogram[latent].tolist()), texts)


def quantile_bins(histogram: Sequence[int]) -> list[int]:
    """The bins that hold the quantiles of what was counted, each once."""
    total, cumulated, bins = sum(histogram), 0, []
    wanted = [share * total for share in QUANTILES] if total else []
    for place, count in enumerate(histogram):
        cumulated += count
        if wanted and cumulated >= wanted[0]:
            bins.append(place)
            wanted = [each for each in wanted if each > cumulated]
    return bins


def _rows(latent: int, kind: str, contexts: Contexts, places: Sequence[int], texts: Texts) -> Iterator[dict[str, Any]]:
    window = contexts.around.shape[2] // 2
    for rank, place in enumerate(places):
        dialogue, position = int(contexts.dialogue[latent, place]), int(contexts.position[latent, place])
        if position == NOWHERE:
            continue
        shown = texts.window(dialogue, position, window)
        first = window - (position - shown["start"])
        around = contexts.around[latent, place, first : first + len(shown["tokens"])].tolist()
        value = float(contexts.value[latent, place])
        yield {"latent": latent, "kind": kind, "rank": rank, "value": value, **shown, "activations": around}


def write_windows(path: Path, collected: Collector, window: int, texts: Texts) -> None:
    """The windows that were drawn; `silent_windows` of a latent are those in which it is not active."""
    places = zip(collected.window_of, collected.window_position.tolist(), strict=True)
    rows = [{"window": n, **texts.window(*place, window)} for n, place in enumerate(places)]
    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, WINDOW_SCHEMA), temporary, compression="zstd")


def write_latents(path: Path, columns: dict[str, Any]) -> None:
    """A line for each latent."""
    with atomic_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def latent_columns(collected: Collector, sets: Sequence[str]) -> dict[str, Any]:
    """How often and how strongly each latent is active."""
    active, n_tokens = collected.active.cpu().numpy(), collected.n_tokens.cpu().numpy()
    n_active = active[:, 0]
    columns = {
        "latent": pa.array(range(len(active)), pa.int32()),
        "n_active": pa.array(n_active),
        "max_activation": pa.array(collected.top.value.amax(1).cpu().numpy()),
        "mean_activation": pa.array(collected.total.cpu().numpy() / n_active.clip(min=1)),
    }
    for place, name in enumerate(sets):
        columns[f"density_{name}"] = pa.array(active[:, place] / max(int(n_tokens[place]), 1))
    columns["histogram"] = pa.array(collected.histogram.tolist(), pa.list_(pa.int64()))
    silent = [[window for window, active in enumerate(row) if not active] for row in collected.active_in.tolist()]
    return {**columns, "silent_windows": pa.array(silent, pa.list_(pa.int32()))}


def ranked_column(ranked: Ranked) -> Any:
    """Latents with a value each."""
    return pa.array([[{"index": index, "value": value} for index, value in each] for each in ranked], _ranked)


def tokens_column(ranked: Ranked, texts: Texts) -> Any:
    """Tokens with a value each."""
    return pa.array(
        [[{"token": texts.piece(index), "value": value} for index, value in each] for each in ranked], _ranked_tokens
    )
