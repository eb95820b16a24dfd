"""Settings of `fastcache extract`."""

from dataclasses import dataclass

from fastcache.config import option

FREE_ON_RESUME = ("device", "parity")
"""Settings that don't change what the cache holds."""


@dataclass(frozen=True)
class ExtractConfig:
    """What is captured, from which model, over which text."""

    model: str = option(help="Model: a name on the hub, a folder, or `demo`.")
    layer: tuple[int, ...] = option(
        help="Decoder layer after which the residual stream is captured, from 0. Repeatable."
    )
    corpus: str | None = option(
        None,
        help="Corpus directory of `prepare`, or anything that prepare takes. "
        "Default: allenai/tulu-3-sft-mixture, or the demo corpus for the demo model.",
    )
    split: str = option("train", help="Split of the corpus; `eval` makes the held-out cache.")
    method: str = option("fast", choices=("fast", "bt-f", "bt-p"), help="Data method of the paper.")
    tokens: int = option(40_960_000, help="Stop before the sequence that would exceed so many tokens.")
    max_length: int = option(8192, help="Truncate dialogues (fast) to so many tokens; at most the model's context.")
    block_size: int = option(2048, help="Tokens of a block (bt-f, bt-p); at most the model's context.")
    dtype: str = option("bfloat16", choices=("bfloat16", "float16", "float32"), help="Dtype of the cache.")
    model_dtype: str | None = option(
        None,
        choices=("float32", "bfloat16", "float16"),
        help="Dtype the model runs in. Default: bfloat16 on a GPU, float32 on a CPU.",
    )
    backend: str = option("auto", choices=("auto", "transformers"), help="What runs the model.")
    device: str | None = option(None, help="Device of the model. Default: cuda where there is one, else cpu.")
    unit_tokens: int = option(524_288, help="Tokens of a work unit, which becomes a part of the cache.")
    parity: int = option(8, help="Sequences compared with the plain float32 model before the start; 0 compares none.")
    revision: str | None = option(None, help="Revision of the model on the hub.")
    trust_remote_code: bool = option(False, help="Run code that comes with the model.")
