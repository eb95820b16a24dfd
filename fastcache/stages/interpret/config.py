"""Settings of `fastcache interpret`."""

from dataclasses import dataclass

from fastcache.config import option

FREE_ON_RESUME = ("sae", "cache", "device", "model")
"""Settings that may differ on resume: SAE and cache go by their fingerprints."""


@dataclass(frozen=True)
class InterpretConfig:
    """Which dialogues are looked at, and what is kept of them."""

    sae: str = option(help="Folder of a trained SAE.")
    cache: str = option(help="Held-out cache, such as of `fastcache extract --split interpret`; method fast.")
    max_instances: int = option(10_000, help="Dialogues to look at, from the beginning of the cache.", at_least=1)
    top: int = option(
        10, help="Contexts with the highest activation to keep of each latent, each of another dialogue.", at_least=1
    )
    window: int = option(16, help="Tokens to keep on each side of a context's token.", at_least=0)
    neighbours: int = option(5, help="Latents with the most similar decoder rows to give for each.", at_least=0)
    unembedding: bool = option(
        False, help="Also load the model, for the output tokens that each latent promotes and suppresses."
    )
    model: str | None = option(
        None, help="Where the cache's model is: a folder or a name on the hub. Default: as the cache has it."
    )
    seed: int = option(42, help="Seed of the samples.", at_least=0)
    device: str | None = option(None, help="Device. Default: cuda where there is one, else cpu.")
    trust_remote_code: bool = option(False, help="Run code that comes with the model.")
