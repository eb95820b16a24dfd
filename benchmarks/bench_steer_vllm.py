"""Tokens a second of steered generations: vLLM, all prompts at a time, beside transformers, a prompt at a time.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/bench_steer_vllm.py
    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/bench_steer_vllm.py --hidden 768 --prompts 16
    python benchmarks/bench_steer_vllm.py --model Qwen/Qwen2.5-7B-Instruct --layer 18 --device cuda --prompts 256

The generators of `steer` with the same prompts, the beginnings of the demo's dialogues, and one latent of a random SAE added;
the models are loaded already, and vLLM's engine waits while the other one works. By default the model is Qwen2-shaped, of
8 layers, with random weights, which never end an answer: both sides generate as many tokens, and the script says how many
of the answers are equal. transformers stands there also without KL, which vLLM doesn't give. Rounds go through all in turn;
ratios are taken within a round. CPU seconds are those of all processes, vLLM's waiting for each other included. Without
vllm there is nothing to compare, and the script says so.
"""

import argparse
import gzip
import json
import statistics
import tempfile
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from fastcache.assets import DEMO, DEMO_CHAT
from fastcache.cache_format.schema import hook_point
from fastcache.devices import choose_device
from fastcache.llm.backend import TokenIds
from fastcache.llm.loading import ModelSource, load_config, load_tokenizer
from fastcache.sae.architectures import StandardSae
from fastcache.sae.init import initialise
from fastcache.sae.storage import save_sae
from fastcache.stages.steer.config import Setting, SteerConfig
from fastcache.stages.steer.generators import Generator, Said, TransformersGenerator, open_generator

TRANSFORMERS, VLLM, WITHOUT_KL = "transformers", "vllm", "transformers, without KL"


class Speed(NamedTuple):
    """Tokens a second."""

    wall: float
    cpu: float


class WithoutKl(TransformersGenerator):
    """Generates only."""

    def _kl(self, *_given: object) -> float:
        return 0.0


def random_model(folder: Path, hidden: int) -> Path:
    """Qwen2-shaped, with heads of 64 and the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=8,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), initializer_range=hidden**-0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def make_prompts(source: ModelSource, count: int) -> list[TokenIds]:
    """The first turns of the demo's dialogues, in the model's chat template."""
    tokenizer = load_tokenizer(source)
    with gzip.open(DEMO_CHAT, "rt") as lines:
        turns = [json.loads(line)["messages"][0] for line in islice(lines, count)]
    texts = [tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True) for turn in turns]
    return [np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in texts]


def open_all(
    folder: Path, source: ModelSource, hook: str, device: str, prompts: list[TokenIds], given: argparse.Namespace
) -> dict[str, Generator]:
    """Loaded models by name; vLLM's worker reads the SAE from `folder`."""
    sae = StandardSae(load_config(source).hidden_size, 4096)
    initialise(sae, torch.zeros(sae.d_in), torch.Generator().manual_seed(0))
    save_sae(folder, sae, {"hook_point": hook, "training": {}})
    common = {"sae": str(folder), "latent": (0,), "max_new_tokens": given.new_tokens}
    opened = {
        name: open_generator(SteerConfig(**common, backend=name), sae, hook, source, device, prompts)
        for name in (TRANSFORMERS, VLLM)
    }
    plain = opened[TRANSFORMERS]
    return {WITHOUT_KL: WithoutKl(plain._config, plain._sae, hook, plain._model), **opened}


def timed(generate: Generator, prompts: list[TokenIds], alpha: float) -> tuple[Speed, dict[int, Said]]:
    """Its speed, and what was said to each prompt."""
    from vllm_cache import cpu_seconds

    begun, cpu = time.perf_counter(), cpu_seconds()
    found = {said.place: said for said in generate(prompts, Setting((0,), alpha))}
    n_tokens = sum(len(said.token_ids) for said in found.values())
    return Speed(n_tokens / (time.perf_counter() - begun), n_tokens / (cpu_seconds() - cpu)), found


def main() -> None:
    """Print each one's tokens a second, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: random weights")
    parser.add_argument("--hidden", type=int, default=256, help="of the model of random weights")
    parser.add_argument("--layer", type=int, default=4)
    parser.add_argument("--device")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--alpha", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if find_spec("vllm") is None:
        print("vllm is not installed: run this in the environment of `make test-vllm`.")
        return
    with tempfile.TemporaryDirectory() as folder:
        source = ModelSource(given.model or str(random_model(Path(folder) / "model", given.hidden)))
        prompts = make_prompts(source, given.prompts)
        hook, device = hook_point(given.layer), choose_device(given.device)
        opened = open_all(Path(folder) / "sae", source, hook, device, prompts, given)
        for generate in opened.values():
            timed(generate, prompts[:2], given.alpha)  # warms up
        speeds: dict[str, list[Speed]] = {name: [] for name in opened}
        said: dict[str, dict[int, Said]] = {}
        for _ in range(given.rounds):
            for name, generate in opened.items():
                speed, said[name] = timed(generate, prompts, given.alpha)
                speeds[name].append(speed)
        opened[VLLM].close()
    equal = sum(
        said[VLLM][place].token_ids.tolist() == each.token_ids.tolist() for place, each in said[TRANSFORMERS].items()
    )
    print(f"{len(prompts)} prompts, up to {given.new_tokens} new tokens; medians of {given.rounds} rounds")
    for kind, place in (("second", 0), ("CPU second", 1)):
        print(f"tokens a {kind}")
        for name, of_name in speeds.items():
            ratio = statistics.median(ours[place] / own[place] for ours, own in zip(speeds[VLLM], of_name, strict=True))
            median = statistics.median(speed[place] for speed in of_name)
            print(f"  {name:26}{median:8,.0f}   vllm over it {ratio:6.2f}")
    print(f"equal answers {equal} of {len(prompts)}")


if __name__ == "__main__":
    main()
