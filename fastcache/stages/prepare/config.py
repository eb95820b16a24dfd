"""Settings of `fastcache prepare`."""

from dataclasses import dataclass

from fastcache.config import option


@dataclass(frozen=True)
class PrepareConfig:
    """How a corpus is made."""

    source: tuple[str, ...] = option(
        help="File (.jsonl, .json, .parquet, also .gz), `demo`, `demo-text`, or a data set on the hub. Repeatable."
    )
    column: str | None = option(None, help="Column to read; found by itself where it has a known name.")
    split_name: str = option("train", help="Split to read of a data set on the hub.")
    ngram: int = option(20, help="Length of the n-grams of the deduplication; 0 turns it off.")
    unit: str = option("word", choices=("word", "character"), help="Unit of the n-grams.")
    ngram_system: bool = option(False, help="Count system turns in: a shared system prompt makes all rows duplicates.")
    exact: bool = option(True, help="Drop exact duplicates of whole dialogues too.")
    eval_rows: int = option(5000, help="Rows held out for evaluation, at most a tenth of the corpus.")
    max_rows: int = option(0, help="Read at most so many rows of each source; 0 reads all.")
    seed: int = option(42, help="Seed of the permutation.")
    strict: bool = option(False, help="Stop at the first malformed row instead of counting it.")
