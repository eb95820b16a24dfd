"""Settings of `fastcache steer` and `fastcache steer find`."""

from dataclasses import dataclass
from typing import NamedTuple

from fastcache.config import Settings, option

PAPER_ALPHAS = (0.0, 15.0, 25.0, 50.0, 100.0, 150.0, 200.0)


@dataclass(frozen=True)
class SteerConfig(Settings):
    """What is done to the residual stream, and for which prompts."""

    sae: str = option(help="Folder of a trained SAE.")
    latent: tuple[int, ...] = option(help="Latent to steer with. Repeatable: each by itself.", at_least=0)
    alpha: tuple[float, ...] = option(
        PAPER_ALPHAS, help="Strengths, such as 0,15,50: add so many times the latent's decoder row, or clamp to it."
    )
    mode: str = option(
        "add",
        choices=("add", "clamp", "ablate"),
        help="add alpha times the decoder row; clamp the latent's activation to alpha; ablate it, which takes no alpha.",
    )
    together: bool = option(False, help="All latents at a time instead of each by itself.")
    positions: str = option(
        "all", choices=("all", "generated"), help="Where: prompt and generated tokens, or generated ones alone."
    )
    prompt: tuple[str, ...] = option((), help="What the user says. Repeatable.")
    prompts: str | None = option(None, help="Text file with a prompt a line.")
    system: str | None = option(None, help="A system turn before the prompt.")
    default_system: bool = option(True, help="Keep the system turn that a template adds by itself.")
    fold_system: bool = option(
        False,
        help="Put a system turn that the chat template refuses or leaves out at the beginning of the first user turn.",
    )
    max_new_tokens: int = option(128, help="Tokens to generate, at most.", at_least=1, at_most=2**20)
    temperature: float = option(0.0, help="0 takes the most likely token.", at_least=0)
    seed: int = option(42, help="Seed, where the temperature isn't 0.", at_least=0)
    model: str | None = option(
        None, help="Where the SAE's model is: a folder or a name on the hub. Default: as the SAE has it."
    )
    model_dtype: str | None = option(
        None,
        choices=("float32", "bfloat16", "float16"),
        help="Dtype the model runs in. Default: bfloat16 on a GPU, float32 on a CPU.",
    )
    backend: str = option(
        "transformers",
        choices=("transformers", "vllm"),
        help="What runs the model; vllm (extra `vllm`) takes all prompts at a time, and gives no KL.",
    )
    device: str | None = option(None, help="Device. Default: cuda where there is one, else cpu.")
    trust_remote_code: bool = option(False, help="Run code that comes with the model.")


class Setting(NamedTuple):
    """What is generated with; no latents is the model by itself."""

    latents: tuple[int, ...]
    alpha: float | None


def settings_of(config: SteerConfig) -> list[Setting]:
    """The model by itself, then every latent, or all together, with every strength."""
    groups = [config.latent] if config.together else [(latent,) for latent in config.latent]
    alphas = (None,) if config.mode == "ablate" else config.alpha
    return [Setting((), None), *(Setting(latents, alpha) for latents in groups for alpha in alphas)]


@dataclass(frozen=True)
class FindConfig(Settings):
    """Where latents to steer with are looked for."""

    sae: str = option(help="Folder of a trained SAE.")
    cache: str = option(help="Cache of dialogues, such as of `fastcache extract --split steer`; method fast.")
    allow_train: bool = option(False, help="Accept a cache of training rows: what is found is then not held out.")
    max_instances: int = option(1000, help="Dialogues to look at, from the beginning of the cache.", at_least=1)
    top: int = option(5, help="Latents to give for each special token.", at_least=1, at_most=10_000)
    device: str | None = option(None, help="Device. Default: cuda where there is one, else cpu.")
