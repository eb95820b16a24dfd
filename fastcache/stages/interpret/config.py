"""Settings of `fastcache interpret` and of what goes on with its tables."""

from dataclasses import dataclass

from fastcache.config import Settings, option

FREE_ON_RESUME = ("sae", "cache", "device", "model", "allow_train")
"""Settings that may differ on resume: SAE and cache go by their fingerprints."""


@dataclass(frozen=True)
class InterpretConfig(Settings):
    """Which dialogues are looked at, and what is kept of them."""

    sae: str = option(help="Folder of a trained SAE.")
    cache: str = option(help="Held-out cache, such as of `fastcache extract --split interpret`; method fast.")
    allow_train: bool = option(False, help="Accept a cache of training rows: what is found is then not held out.")
    max_instances: int = option(10_000, help="Dialogues to look at, from the beginning of the cache.", at_least=1)
    top: int = option(
        10,
        help="Contexts with the highest activation to keep of each latent, each of another dialogue.",
        at_least=1,
        at_most=10_000,
    )
    window: int = option(16, help="Tokens to keep on each side of a context's token.", at_least=0, at_most=1024)
    neighbours: int = option(
        5, help="Latents with the most similar decoder rows to give for each.", at_least=0, at_most=10_000
    )
    unembedding: bool = option(
        False, help="Also load the model, for the output tokens that each latent promotes and suppresses."
    )
    model: str | None = option(
        None, help="Where the cache's model is: a folder or a name on the hub. Default: as the cache has it."
    )
    seed: int = option(42, help="Seed of the samples.", at_least=0)
    device: str | None = option(None, help="Device. Default: cuda where there is one, else cpu.")
    trust_remote_code: bool = option(False, help="Run code that comes with the model.")


JUDGE_FREE_ON_RESUME = (
    "latents", "judge", "judge_url", "judge_key_env", "count", "detection", "answers", "concurrency", "retries", "timeout",
    "price_in", "price_out", "max_cost", "max_requests",
)  # fmt: skip
"""Settings that may differ on resume: none of them changes what a prompt asks."""


@dataclass(frozen=True)
class JudgeConfig(Settings):
    """Which latents are judged, by whom, and at what cost."""

    latents: str = option(help="Output folder of `fastcache interpret`.")
    judge: str = option(
        "api",
        choices=("api", "none"),
        help="api asks --judge-url; none writes the prompts to a file, and takes --answers to them.",
    )
    judge_url: str | None = option(
        None, help="OpenAI-compatible endpoint, such as http://localhost:8000/v1 or https://api.openai.com/v1."
    )
    judge_model: str | None = option(None, help="The judge, as the endpoint names it.")
    judge_key_env: str = option("OPENAI_API_KEY", help="Environment variable that holds the endpoint's key.")
    judge_body: str | None = option(
        None, help='JSON object that changes the request, null taking a field out: {"temperature": null, "seed": 1}.'
    )
    answers: tuple[str, ...] = option(
        (),
        help='With --judge none: file of answers, of a batch run or as lines {"id": ..., "answer": ...}. Repeatable.',
    )
    count: int = option(128, help="Latents to judge, drawn from those that are active in 5 dialogues.", at_least=1)
    detection: bool = option(
        False, help="Also score how well the judge, by the name it gave, tells contexts with the latent from others."
    )
    seed: int = option(42, help="Seed of what is drawn.", at_least=0)
    max_answer_tokens: int = option(512, help="Tokens of an answer, at most.", at_least=1, at_most=2**31)
    concurrency: int = option(8, help="Requests at a time.", at_least=1, at_most=1024)
    retries: int = option(
        5, help="How often a request that failed for the time being is sent again.", at_least=0, at_most=100
    )
    timeout: float = option(120.0, help="Seconds to wait for an answer.", at_least=0.001, at_most=1e6)
    price_in: float | None = option(None, help="Price of a million tokens of prompts, for the cost.", at_least=0)
    price_out: float | None = option(None, help="Price of a million tokens of answers, for the cost.", at_least=0)
    max_cost: float | None = option(
        None, help="Never spend more than this, over all runs into this output.", at_least=0
    )
    max_requests: int | None = option(
        None, help="Never send more requests than this, over all runs into this output.", at_least=0
    )


@dataclass(frozen=True)
class ScoresConfig(Settings):
    """Judged SAEs to compare."""

    judged: tuple[str, ...] = option(help="Output folder of `fastcache interpret judge`. Repeatable.")
    html: str = option("scores.html", help="Page to write.")
    csv: str = option("scores.csv", help="Table of all scores to write.")


@dataclass(frozen=True)
class DashboardConfig(Settings):
    """Latents to look at."""

    latents: str = option(help="Output folder of `fastcache interpret`.")
    judged: str | None = option(
        None,
        help="Output folder of `fastcache interpret judge`. Default: judge/ below the latents, where there is one.",
    )
    port: int = option(
        8742, help="Port of localhost to show the page at; 0 takes a free one.", at_least=0, at_most=65535
    )
    serve: bool = option(True, help="Show the page until Ctrl-C; it also works as a file.")
