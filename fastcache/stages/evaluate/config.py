"""Settings of `fastcache evaluate`."""

from dataclasses import dataclass

from fastcache.config import option


@dataclass(frozen=True)
class EvaluateConfig:
    """Which SAEs are measured on which held-out cache."""

    sae: tuple[str, ...] = option(help="Folder of a trained SAE. Repeatable: all are measured in one pass.")
    cache: str = option(help="Held-out cache (`fastcache extract --split eval`), method fast.")
    max_instances: int = option(5000, help="Dialogues to evaluate on, from the beginning of the cache.", at_least=1)
    allow_train: bool = option(False, help="Accept a cache of training rows: the figures are then not held out.")
    device: str | None = option(None, help="Device. Default: cuda where there is one, else cpu.")
