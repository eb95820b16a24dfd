"""Tiny models, corpora and the shared test data."""

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from browser import start_browser

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here asks the hub
# As the backend sets it: MKL asks once, at its first product, whichever test makes that.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# Triton asks when it is first imported, by whichever package: GPU kernels are tested without a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

from fastcache.assets import DEMO
from fastcache.progress import Silent

with suppress(ImportError):  # the environment of vLLM's tests has no hypothesis, which they don't use
    from hypothesis import HealthCheck, settings

    # How long an example takes says something about the machine's load, and nothing about the code.
    settings.register_profile("fastcache", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("fastcache")

TEXT = "the cat sat on a mat while seven grey owls counted stars over the quiet northern harbour again"
WORDS = TEXT.split()
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)


LONG_TEST_SECONDS, VLLM_TEST_SECONDS = 3600, 1200


def pytest_collection_modifyitems(items):
    """Every test has a time limit (`timeout` in pyproject.toml); for those that take long it is longer."""
    for item in items:
        if item.get_closest_marker("timeout") is None:
            if item.get_closest_marker("long") is not None:
                item.add_marker(pytest.mark.timeout(LONG_TEST_SECONDS))
            elif "with_vllm" in item.path.parts:  # engines take minutes to start
                item.add_marker(pytest.mark.timeout(VLLM_TEST_SECONDS))


@pytest.fixture(scope="module")
def browser():
    """Not the session's: while it runs, this thread has an event loop, and whoever wants one of their own is refused."""
    with start_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """What `interpret` leaves, made up: latents 0 to 29; those that 5 divides are active in 4 dialogues, too few to qualify."""
    from latents import make_results

    return make_results(tmp_path_factory.mktemp("results") / "latents", 30)


@pytest.fixture(scope="session")
def scored_latents(tmp_path_factory):
    """200 latents, of which 3 are dead and 3 scored; a fourth answer could not be read."""
    from latents import add_scores, make_results, scored

    results = make_results(tmp_path_factory.mktemp("dashboard") / "latents", 200, dead=(3, 77, 199))
    rows = [scored(7, 5, "names of seas"), scored(11, 2, "nothing much"), scored(150, 4, "Zürich & <b>more</b>")]
    add_scores(results, [*rows, {"latent": 12, "failure": "empty", "answer": ""}])
    return results


@pytest.fixture(scope="session")
def dashboard(scored_latents):
    from fastcache.stages.interpret.dashboard.build import build

    return build(scored_latents, None, scored_latents / "dashboard", Silent())


@pytest.fixture(scope="session")
def served(dashboard):
    from fastcache.stages.interpret.dashboard.serve import make_server

    with make_server(dashboard.parent, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture
def quick_judge(monkeypatch):
    """A judge is asked again at once; there is a key."""
    from judging import KEY

    monkeypatch.setattr("fastcache.stages.interpret.judge.endpoint.FIRST_WAIT", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="session")
def testdata() -> Path:
    """Real tokenizers and dialogues, read in place."""
    folder = Path(os.environ.get("FASTCACHE_TESTDATA", Path(__file__).parents[1] / "../shared/testdata"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder} (set FASTCACHE_TESTDATA)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_waiting():
    """Nothing here cuts the power, so this process need not wait for the disk; those that are killed do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


def make_dialogues(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, 30)))

    roles = ("user", "assistant")
    return [
        [{"role": roles[turn % 2], "content": sentence()} for turn in range(2 * int(rng.integers(1, 4)))]
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in make_dialogues(60)))
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, rng.integers(5, 200))) for _ in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _save_tokenizer(folder: Path, kind: str) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    if kind == "llama":
        special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer.add_special_tokens(
            {"bos_token": special[0], "eos_token": special[3], "additional_special_tokens": special}
        )
        tokenizer.chat_template = LLAMA_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.fixture(scope="session", params=["qwen2", "llama"])
def tiny_model(request, tmp_path_factory) -> Path:
    """A random-weight model with 4 layers, with a tokenizer and a chat template."""
    return _make_model(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory) -> Path:
    return _make_model("qwen2", tmp_path_factory)


def _make_model(kind: str, tmp_path_factory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp(kind)
    n_vocabulary = _save_tokenizer(folder, kind)
    config_class, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[
        kind
    ]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=n_vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    model_class(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_corpus(chat_file, tmp_path_factory) -> Path:
    from fastcache.progress import Silent
    from fastcache.stages.prepare.config import PrepareConfig
    from fastcache.stages.prepare.run import prepare

    out = tmp_path_factory.mktemp("corpora") / "chat"
    prepare(PrepareConfig(source=(str(chat_file),)), out, Silent())
    return out


@pytest.fixture(scope="session")
def text_corpus(text_file, tmp_path_factory) -> Path:
    from fastcache.progress import Silent
    from fastcache.stages.prepare.config import PrepareConfig
    from fastcache.stages.prepare.run import prepare

    out = tmp_path_factory.mktemp("corpora") / "text"
    prepare(PrepareConfig(source=(str(text_file),)), out, Silent())
    return out


def run_extract(model: Path, corpus: Path, out: Path, **settings):
    """An extract run with small defaults."""
    from fastcache.progress import Silent
    from fastcache.stages.extract.config import ExtractConfig
    from fastcache.stages.extract.run import extract

    defaults = {"layer": (1,), "dtype": "float32", "parity": 2, "unit_tokens": 1000}
    config = ExtractConfig(model=str(model), **{**defaults, **settings})
    return extract(config, lambda: corpus, out, Silent())


@pytest.fixture(scope="session")
def small_cache(tiny_qwen, chat_corpus, tmp_path_factory) -> Path:
    """A bfloat16 cache of two layers in several parts."""
    out = tmp_path_factory.mktemp("caches") / "small"
    run_extract(tiny_qwen, chat_corpus, out, layer=(1, 3), dtype="bfloat16")
    return out


@pytest.fixture(scope="session")
def held_out_cache(tiny_qwen, chat_corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "held-out"
    run_extract(tiny_qwen, chat_corpus, out, layer=(1, 3), dtype="bfloat16", split="eval")
    return out


def edit_manifest(root: Path, **changes) -> None:
    """Change fields of a cache's manifest, with a new checksum."""
    from crc32c import crc32c

    from fastcache.files import canonical_json

    raw = {**json.loads((root / "manifest.json").read_text()), **changes}
    del raw["checksum"]
    checksum = f"{crc32c(canonical_json(raw).encode()):08x}"
    (root / "manifest.json").write_text(json.dumps({**raw, "checksum": checksum}))


def tree_bytes(root: Path) -> dict[str, bytes]:
    """Every file below `root` but run.json and the lock."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in files
        if path.name not in ("run.json", "status.json", ".lock")
    }


@pytest.fixture(scope="session")
def command_inputs(chat_file, tiny_qwen, chat_corpus, small_cache, held_out_cache, latents, tmp_path_factory):
    """What the commands of `commands.py` read."""
    import shutil

    from commands import Inputs
    from judge_server import serve
    from judging import KEY, good

    from fastcache.pipeline.cli import main

    folder = tmp_path_factory.mktemp("inputs")
    sae = folder / "sae"
    options = [
        "--layer",
        "1",
        "--arch",
        "topk",
        "--k",
        "4",
        "--expansion",
        "2",
        "--tokens",
        "640",
        "--batch-size",
        "32",
    ]
    main(["train", "--cache", str(small_cache), *options, "--buffer-tokens", "300", "--out", str(sae)])
    shutil.copytree(latents, folder / "latents")
    with serve(good) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        options = ["--judge-url", server.url, "--judge-model", "scripted", "--count", "2"]
        main(["interpret", "judge", "--latents", str(folder / "latents"), *options])
        given = (chat_file, tiny_qwen, chat_corpus, small_cache, held_out_cache, sae, folder / "latents")
        yield Inputs(*given, server.url)


@pytest.fixture(scope="session")
def undisturbed(command_inputs, tmp_path_factory):
    """A function that runs a command of `commands.py` once; returns what it leaves."""
    from commands import COMMANDS, Undisturbed, files_of, sizes_of
    from recorder import Recorder

    from fastcache.pipeline.cli import main

    done = {}

    def run(name):
        if name not in done:
            command, folder = COMMANDS[name], tmp_path_factory.mktemp("undisturbed")
            command.before(command_inputs, folder)
            before = files_of(folder, command)
            begun = time.monotonic()
            with Recorder(folder) as recorder:
                main([str(word) for word in command.words(command_inputs, folder)])
            files, sizes = files_of(folder, command), sizes_of(folder)
            written = {name: sizes[name] for name, data in files.items() if data != before.get(name)}
            done[name] = Undisturbed(files, written, recorder, time.monotonic() - begun)
        return done[name]

    return run
