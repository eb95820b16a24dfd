"""What latents are active on, from a cache in one pass, beside running the model again for each latent.

    python benchmarks/bench_interpret.py
    python benchmarks/bench_interpret.py --d-sae 65_536 --instances 20

Ours is `interpret`, whole: both tables written. Beside it stands what is done without a cache: for each latent the dialogues go
through the model again, packed as `extract` packs them, and the latent alone is encoded and its highest activations kept. That
is timed for a few latents, in turn with ours; all latents are these seconds times their number, computed. The SAE is random,
with `--l0` of its latents active. Peak memory is that of the whole process.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fastcache.assets import DEMO
from fastcache.cache_format.reader import Cache
from fastcache.llm.loading import ModelSource
from fastcache.llm.transformers_backend import TransformersBackend
from fastcache.pipeline.places import find_corpus
from fastcache.progress import Silent
from fastcache.sae.architectures import StandardSae
from fastcache.sae.init import initialise
from fastcache.sae.storage import save_sae
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.extract.run import extract
from fastcache.stages.interpret.config import InterpretConfig
from fastcache.stages.interpret.run import interpret

LAYER, TARGET = 2, 50.0
HOOK = f"resid_post.{LAYER}"


def random_sae(cache: Cache, d_sae: int, l0: float) -> StandardSae:
    """An SAE of which about `l0` latents are active."""
    sae = StandardSae(cache.d_in, d_sae)
    initialise(sae, torch.zeros(cache.d_in), torch.Generator().manual_seed(0))
    x = torch.from_numpy(cache.instance(0).residuals(HOOK))
    sae.b_enc -= torch.quantile(sae.pre_acts(x).flatten()[:1_000_000], 1 - l0 / d_sae)
    return sae


def rerun(backend: TransformersBackend, cache: Cache, n_instances: int, sae: StandardSae, latent: int) -> None:
    """The highest activations of one latent, the model run again."""
    instances = [cache.instance(index).token_ids for index in range(n_instances)]
    highest = []
    for residuals in backend.residuals(instances):
        acts = torch.relu(torch.from_numpy(residuals[HOOK]) @ sae.W_enc[:, latent] + sae.b_enc[latent])
        highest.append(float(acts.max()))
    sorted(highest, reverse=True)


def main() -> None:
    """Print both times, the ratio and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--l0", type=float, default=32.0)
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        config = ExtractConfig(model="demo", layer=(LAYER,), split="interpret", parity=0)
        cache = extract(config, lambda: find_corpus(config, Silent()), work / "cache", Silent())
        sae = random_sae(cache, given.d_sae, given.l0)
        identity = cache.manifest.identity
        provenance = {name: identity[name] for name in ("model", "tokenizer", "method")}
        save_sae(work / "sae", sae, {**provenance, "hook_point": HOOK, "training": {}})
        backend = TransformersBackend(ModelSource(str(DEMO)), [HOOK], "float32", "cpu")
        n_instances = min(given.instances, cache.n_instances)
        settings = InterpretConfig(sae=str(work / "sae"), cache=str(cache.path), max_instances=n_instances)
        ours, theirs = [], []
        for number in range(given.rounds):
            begun = time.perf_counter()
            interpret(settings, work / f"out-{number}", Silent())
            ours.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            rerun(backend, cache, n_instances, sae, number)
            theirs.append(time.perf_counter() - begun)
    ratio = statistics.median(given.d_sae * other / own for own, other in zip(ours, theirs, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{given.d_sae:,} latents, {n_instances} dialogues, medians of {given.rounds} rounds")
    print(f"  interpret, all latents        {statistics.median(ours):10.1f} s")
    print(f"  the model again, one latent   {statistics.median(theirs):10.1f} s")
    print(
        f"  ratio over all latents        {ratio:10,.0f}   target {TARGET:g}: {'met' if ratio >= TARGET else 'missed'}"
    )
    print(f"  peak memory of the process    {peak:10.2f} GiB")


if __name__ == "__main__":
    main()
