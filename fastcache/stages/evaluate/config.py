"""Settings of `fastcache evaluate`."""

from dataclasses import dataclass

from fastcache.config import Settings, option


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Which SAEs are measured on which held-out cache."""

    sae: tuple[str, ...] = option(help="Folder of a trained SAE. Repeatable: all are measured in one pass.")
    cache: str = option(help="Held-out cache (`fastcache extract --split eval`), method fast.")
    max_instances: int = option(5000, help="Dialogues to evaluate on, from the beginning of the cache.", at_least=1)
    allow_train: bool = option(False, help="Accept a cache of training rows: the figures are then not held out.")
    with_model: bool = option(
        False, help="Also run the model with the reconstructions in its residual stream: loss recovered, KL."
    )
    model: str | None = option(
        None, help="Where the cache's model is now: a folder or a name on the hub. Default: as the cache has it."
    )
    model_instances: int = option(200, help="Dialogues to run the model on, from the beginning.", at_least=1)
    model_dtype: str = option("float32", choices=("float32", "bfloat16", "float16"), help="Dtype of the model.")
    model_backend: str = option(
        "transformers", choices=("transformers", "vllm"), help="What runs the model; vllm (extra `vllm`) gives no KL."
    )
    trust_remote_code: bool = option(False, help="Run code that comes with the model.")
    device: str | None = option(None, help="Device. Default: cuda where there is one, else cpu.")
