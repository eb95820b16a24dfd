"""What a study will cost, before anything is there: disk, arithmetic, and hours at a given speed."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcache import figures
from fastcache.cache_format.schema import STORED_DTYPES
from fastcache.corpus import CORPUS_FILE, Corpus
from fastcache.llm.loading import ModelSource, load_config
from fastcache.llm.sizes import count_parameters
from fastcache.pipeline.names import RUNS
from fastcache.pipeline.study import ModelSize, Study
from fastcache.stages.extract.plan import TOKEN_BYTES
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.train.recipe import PAPER_TOKENS

HELD_OUT_TOKENS = 500
"""Of a held-out dialogue: assumed, as the mean of the paper's sets is near."""
PRODUCT_SIZE, PRODUCTS = 1024, 5


@dataclass(frozen=True)
class Costs:
    """Of one study."""

    name: str
    n_saes: int
    n_caches: int
    cache_bytes: int
    extract_flop: float
    """Of the decoder layers' products, up to the deepest that is captured; attention between tokens isn't counted."""
    train_flop: float
    """Of the five products of every step; steps that leave out inactive latents need less."""
    held_out: str
    """How many held-out dialogues were counted or assumed."""

    def hours(self, flop_per_second: float) -> float:
        """At this speed."""
        return (self.extract_flop + self.train_flop) / flop_per_second / 3600


def costs(study: Study) -> Costs:
    """What the study will cost; raises `ModelError` where it says no `size` and the model can't be read."""
    size, config = study.size or _size(study), study.extract
    held_out_tokens, held_out = _held_out(study)
    tokens = config.tokens * len(study.methods) + held_out_tokens
    layers = set(config.layer)
    row_bytes = np.dtype(STORED_DTYPES[config.dtype]).itemsize * size.d_in * len(layers)
    through = size.parameters * (max(layers) + 1) / size.n_layers
    members = study.members(Path("cache"), min(config.tokens, PAPER_TOKENS)).members.values()
    latents_seen = sum(member.expansion * size.d_in * (member.tokens or 0) for member in members)
    return Costs(
        name=study.name,
        n_saes=len(members) * len(study.methods),
        n_caches=len(study.caches),
        cache_bytes=tokens * (row_bytes + TOKEN_BYTES),
        extract_flop=2.0 * through * tokens,
        train_flop=10.0 * size.d_in * latents_seen * len(study.methods),
        held_out=held_out,
    )


def _held_out(study: Study) -> tuple[int, str]:
    """Tokens of the held-out cache, and from how many dialogues they are estimated."""
    chat = study.corpora["chat"]
    folder = chat if isinstance(chat, Path) else RUNS / study.name / "corpus-chat"
    if (folder / CORPUS_FILE).is_file():
        n_dialogues = Corpus(folder).n_rows("eval")
        source = f"as in the corpus {folder}"
    else:
        config = PrepareConfig() if isinstance(chat, Path) else chat
        n_dialogues = config.eval_rows
        if config.max_rows:
            n_dialogues = min(n_dialogues, config.max_rows * max(1, len(config.source)) // 10)
        source = "an assumption: the corpus is not prepared yet"
    limit = study.extract.tokens
    tokens = min(limit, n_dialogues * HELD_OUT_TOKENS)
    text = f"{figures.count(n_dialogues)} ({source}) of about {HELD_OUT_TOKENS} tokens"
    return tokens, text + (f", but at most the {figures.count(limit)} tokens of a cache" if tokens == limit else "")


def _size(study: Study) -> ModelSize:
    source = ModelSource(study.extract.model, study.extract.revision, study.extract.trust_remote_code)
    config = load_config(source)
    n_layers = config.num_hidden_layers
    embeddings = config.vocab_size * config.hidden_size
    return ModelSize(config.hidden_size, n_layers, count_parameters(source, n_layers) - embeddings)


def measured_speed() -> float:
    """FLOP a second of products on this machine's device, as they run there by default; the fastest of a few."""
    import torch

    from fastcache.devices import choose_device

    device = choose_device(None)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    size = PRODUCT_SIZE * (8 if device.startswith("cuda") else 1)
    a = torch.randn(size, size, device=device, dtype=dtype)
    least = float("inf")
    for _ in range(PRODUCTS):
        begun = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        least = min(least, time.perf_counter() - begun)
    return 2.0 * size**3 / least
