"""Settings of `fastcache extract`."""

from dataclasses import dataclass

from fastcache.cache_format.schema import METHODS
from fastcache.config import option

FREE_ON_RESUME = (
    "corpus", "device", "devices", "workers", "on_nonfinite", "parity", "pack_tokens", "backend", "tensor_parallel",
)  # fmt: skip
"""Settings that may differ on resume: corpus and backend are in the cache's identity by what they come to."""


@dataclass(frozen=True)
class ExtractConfig:
    """What is captured, from which model, over which text."""

    model: str = option(help="Model: a name on the hub, a folder, or `demo`.")
    layer: tuple[int, ...] = option(
        help="Decoder layer after which the residual stream is captured, from 0. Repeatable.", at_least=0
    )
    corpus: str | None = option(
        None,
        help="Corpus directory of `prepare`, or anything that prepare takes. "
        "Default: allenai/tulu-3-sft-mixture, or the demo corpus for the demo model.",
    )
    split: str = option("train", help="Split of the corpus; `eval` makes the held-out cache.")
    method: str = option("fast", choices=METHODS, help="Data method of the paper.")
    tokens: int = option(
        40_960_000,
        help="Tokens of the cache. Blocks (bt-f, bt-p) have exactly so many; fast stops before the dialogue that would "
        "exceed them.",
        at_least=1,
    )
    max_length: int = option(
        8192, help="Truncate dialogues (fast) to so many tokens; at most the model's context.", at_least=1
    )
    block_size: int = option(2048, help="Tokens of a block (bt-f, bt-p); at most the model's context.", at_least=1)
    default_system: bool = option(True, help="Keep the system turn that a template adds by itself.")
    fold_system: bool = option(
        False,
        help="Put a system turn that the chat template refuses or leaves out at the beginning of the first user turn.",
    )
    dtype: str = option(
        "bfloat16",
        choices=("bfloat16", "float16", "float32", "int8"),
        help="Dtype of the cache; int8 takes half of the space of bfloat16 and loses about 1e-4 of the variance.",
    )
    model_dtype: str | None = option(
        None,
        choices=("float32", "bfloat16", "float16"),
        help="Dtype the model runs in. Default: bfloat16 on a GPU, float32 on a CPU.",
    )
    backend: str = option(
        "auto",
        choices=("auto", "transformers", "vllm"),
        help="What runs the model: vllm (extra `vllm`) or transformers; auto says which and why.",
    )
    tensor_parallel: int = option(
        1, help="With vllm: devices that share one copy of the model.", at_least=1, at_most=1024
    )
    device: str | None = option(None, help="Device of the model. Default: cuda where there is one, else cpu.")
    workers: int | None = option(
        None, help="Worker processes, each with a model. Default: one for each of --devices.", at_least=1, at_most=1024
    )
    devices: tuple[str, ...] = option((), help="Devices of the workers, in turn, such as cuda:1. Repeatable.")
    on_nonfinite: str = option(
        "stop", choices=("stop", "skip"), help="At NaN or infinity: stop, or skip the dialogue and count it."
    )
    pack_tokens: int | None = option(
        None,
        help="Tokens that go through the model together; 1 runs one sequence at a time. "
        "Default: 512 on a CPU (vllm: 2,048), 16,384 on a GPU.",
        at_least=1,
    )
    unit_tokens: int = option(524_288, help="Tokens of a work unit, which becomes a part of the cache.", at_least=1)
    parity: int = option(8, help="Sequences compared with the plain float32 model first; 0 compares none.", at_least=0)
    revision: str | None = option(None, help="Revision of the model on the hub.")
    trust_remote_code: bool = option(False, help="Run code that comes with the model.")


@dataclass(frozen=True)
class AddLayerConfig:
    """What `--add-layer` takes; all else is as the cache was made."""

    add_layer: tuple[int, ...] = option(
        (),
        help="Decoder layer to add to the complete cache --cache, with its model and tokens. Repeatable.",
        at_least=0,
    )
    device: str | None = option(None, help="See `ExtractConfig`.")
    devices: tuple[str, ...] = option((), help="See `ExtractConfig`.")
    workers: int | None = option(None, help="See `ExtractConfig`.", at_least=1, at_most=1024)
    parity: int | None = option(None, help="See `ExtractConfig`.", at_least=0)
