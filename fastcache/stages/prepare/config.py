"""Settings of `fastcache prepare`."""

from dataclasses import dataclass

from fastcache.config import option

FREE_ON_RESUME = ("workers", "memory_gib")
"""Settings that don't change the corpus."""


@dataclass(frozen=True)
class PrepareConfig:
    """How a corpus is made."""

    source: tuple[str, ...] = option(
        (),
        help="A file or folder (.jsonl, .json, .parquet, .arrow; .gz, .zst), a known set (wildchat, infinity-instruct, "
        "tulu-3, orca-agentinstruct, lmsys-chat, pile), NAME=PATH for a local copy of one, `demo`, `demo-text`, or a data "
        "set on the hub. Repeatable, in order.",
    )
    recipe: str | None = option(None, choices=("fast-paper",), help="The paper's five sets, in its order.")
    column: str | None = option(None, help="Column to read; found by itself where it has a known name.")
    split_name: str = option("train", help="Split to read of a data set on the hub.")
    ngram: int = option(
        20, help="Length of the n-grams of the deduplication; 0 turns it off.", at_least=0, at_most=10_000
    )
    unit: str = option("word", choices=("word", "character"), help="Unit of the n-grams.")
    lowercase: bool = option(False, help="Compare n-grams without regard to case.")
    ngram_system: bool = option(False, help="Count system turns in: a shared system prompt makes all rows duplicates.")
    exact: bool = option(True, help="Drop exact duplicates of whole dialogues too.")
    exclude: tuple[str, ...] = option(
        (), help="Drop what shares an n-gram with this source, such as a test set. Repeatable."
    )
    minhash: float = option(
        0.0,
        help="Drop near duplicates of at least this Jaccard similarity too, by MinHash; 0 is off.",
        at_least=0,
        at_most=0.98,  # above it, 128 permutations make a single band, which datasketch refuses
    )
    model: str | None = option(
        None, help="Count token lengths, on a sample, as this model's chat template renders them."
    )
    alternating: bool = option(False, help="Drop dialogues whose user and assistant turns don't alternate.")
    max_turn_chars: int = option(0, help="Drop dialogues with a longer turn; 0 drops none.", at_least=0)
    eval_rows: int = option(5000, help="Rows held out for evaluation, at most a tenth of the corpus.", at_least=0)
    interpret_rows: int = option(10_000, help="Rows held out for interpretation, at most a tenth.", at_least=0)
    steer_rows: int = option(1010, help="Rows held out for steering, at most a twentieth.", at_least=0)
    max_rows: int = option(0, help="Read at most so many rows of each source; 0 reads all.", at_least=0)
    seed: int = option(42, help="Seed of the permutation.", at_least=0)
    strict: bool = option(False, help="Stop at the first malformed row instead of counting it.")
    workers: int = option(0, help="Processes; 0 takes one a core.", at_least=0, at_most=1024)
    memory_gib: float = option(4.0, help="Memory that all processes together may take.", at_least=1e-6, at_most=1e9)
