"""Steering: what is done to the residual stream, what is said then, and which latents special tokens have."""

import csv
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import run_extract
from test_metrics import provenance, trained_like
from transformers import AutoTokenizer

from fastcache.assets import DEMO
from fastcache.cache_format.reader import open_cache
from fastcache.cache_format.schema import TokenType
from fastcache.errors import InputError, MismatchError
from fastcache.llm.loading import ModelSource
from fastcache.llm.splicing import SplicedModel
from fastcache.pipeline.cli import cli, main
from fastcache.progress import Silent
from fastcache.sae.storage import save_sae
from fastcache.stages.steer.config import FindConfig, SteerConfig, settings_of
from fastcache.stages.steer.find import find
from fastcache.stages.steer.generators import Said, TransformersGenerator, VllmGenerator
from fastcache.stages.steer.interventions import add, clamp, make
from fastcache.stages.steer.measures import mean_kl, repetition
from fastcache.stages.steer.run import steer

LAYER = 2
PROMPTS = ("What does str.join do?", "How is a list sorted?")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of the demo's model, whose answers end."""
    folder = tmp_path_factory.mktemp("steer")
    main(["prepare", "--source", "demo", "--max-rows", "300", "--out", str(folder / "corpus")])
    run_extract(DEMO, folder / "corpus", folder / "cache", layer=(LAYER,), parity=0, split="steer")
    return folder / "cache"


@pytest.fixture(scope="module")
def sae(cache):
    return trained_like(d_in=160, d_sae=64)


@pytest.fixture(scope="module")
def folder(cache, sae, tmp_path_factory):
    out = tmp_path_factory.mktemp("sae") / "sae"
    save_sae(out, sae, {**provenance(cache), "hook_point": f"resid_post.{LAYER}"})
    return out


@pytest.fixture(scope="module")
def model():
    return SplicedModel(ModelSource(str(DEMO)), [f"resid_post.{LAYER}"], torch.float32, "cpu")


def run(folder, out, **settings):
    common = {"latent": (3,), "prompt": PROMPTS, "max_new_tokens": 12, "alpha": (0.0, 40.0)}
    return steer(SteerConfig(sae=str(folder), **{**common, **settings}), out, Silent())


def next_layers_input(model, ids, splice, first=0):
    """What enters the layer after the hook point, `[n, d_in]`."""
    seen = []

    def look(_module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    with model._layers[LAYER + 1].register_forward_pre_hook(look, with_kwargs=True):
        model.log_probs(ids, splice, first)
    return seen[0]


def test_alpha_0_is_the_model_by_itself_exactly(folder, tmp_path):
    rows = run(folder, tmp_path / "out")
    for plain, zero, strong in (rows[:3], rows[3:]):
        assert (plain["latents"], plain["alpha"], plain["kl"]) == ([], None, 0.0)
        assert {key: zero[key] for key in ("text", "n_tokens", "kl")} == {
            key: plain[key] for key in ("text", "n_tokens", "kl")
        }
        assert strong["text"] != plain["text"]
        assert strong["kl"] > 0


def test_the_shift_is_alpha_times_the_decoder_rows(model, sae):
    ids = np.arange(5, 25, dtype=np.int32)
    hook = f"resid_post.{LAYER}"
    plain = next_layers_input(model, ids, (hook, lambda x: x))
    changed = next_layers_input(model, ids, (hook, add(sae, [3, 7], 25.0)))
    torch.testing.assert_close(
        changed - plain, (25 * (sae.W_dec[3] + sae.W_dec[7])).expand_as(plain), atol=2e-5, rtol=0
    )


def test_a_position_before_the_first_is_left_as_it_was(model, sae):
    ids = np.arange(5, 25, dtype=np.int32)
    hook = f"resid_post.{LAYER}"
    plain = next_layers_input(model, ids, None)
    changed = next_layers_input(model, ids, (hook, add(sae, [3], 25.0)), first=8)
    torch.testing.assert_close(changed[:8], plain[:8], atol=0, rtol=0)
    assert ((changed[8:] - plain[8:]).norm(dim=1) > 20).all()


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_generations_are_those_of_a_loop_without_a_cache(model, sae, positions):
    ids = np.arange(5, 25, dtype=np.int32)
    splice, first = (f"resid_post.{LAYER}", add(sae, [3], 25.0)), 0 if positions == "all" else len(ids)
    found = model.generate(ids, 10, splice, first)
    tokens = ids
    for _ in range(len(found)):
        following = int(model.log_probs(tokens, splice, first)[-1].argmax())
        tokens = np.append(tokens, np.int32(following))
    assert found.tolist() == tokens[len(ids) :].tolist()
    assert len(found) == 10 or model.ends_turn(int(found[-1]))


def test_clamping_adds_what_is_missing_and_ablation_takes_all(sae):
    x = torch.randn(9, 160, generator=torch.Generator().manual_seed(0))
    acts = sae.encode(x)[:, 3]
    assert 0 < (acts > 0).sum() < 9
    torch.testing.assert_close(clamp(sae, [3], 4.0)(x) - x, (4 - acts)[:, None] * sae.W_dec[3], atol=1e-5, rtol=1e-5)
    ablated = clamp(sae, [3], 0.0)(x)
    assert torch.equal(ablated[acts == 0], x[acts == 0])
    assert not torch.equal(ablated[acts > 0], x[acts > 0])


@pytest.mark.parametrize("mode", ["add", "clamp", "ablate"])
def test_a_worker_of_vllm_makes_the_intervention_from_words_and_numbers(folder, sae, mode):
    asked = []

    class Engine:
        def generate(self, prompts, max_new_tokens, splice, *_sampling):
            asked.append(splice)
            return [(place, prompt[:2], True) for place, prompt in enumerate(prompts)]

    config = SteerConfig(sae=str(folder), latent=(3, 7), alpha=(4.0,), mode=mode, together=True, positions="generated")
    generate = VllmGenerator(config, f"resid_post.{LAYER}", Engine())
    prompts = [np.arange(5, dtype=np.int32), np.arange(3, dtype=np.int32)]
    for setting in settings_of(config):
        assert [(said.place, said.ended, said.kl) for said in generate(prompts, setting)] == [
            (0, True, None),
            (1, True, None),
        ]
    by_itself, splice = asked
    assert by_itself is None
    assert (splice.hook_point, splice.generated_only) == (f"resid_post.{LAYER}", True)
    x = torch.randn(9, 160, generator=torch.Generator().manual_seed(0))
    found = splice.maker(json.loads(json.dumps(splice.argument)), "cpu")(x)
    assert torch.equal(found, make(sae, mode, [3, 7], 4.0)(x))


def test_latents_go_each_by_itself_or_together(folder, tmp_path):
    apart = run(folder, tmp_path / "apart", latent=(3, 7), alpha=(40.0,), prompt=PROMPTS[:1])
    assert [row["latents"] for row in apart] == [[], [3], [7]]
    both = run(folder, tmp_path / "both", latent=(3, 7), alpha=(40.0,), prompt=PROMPTS[:1], together=True)
    assert [row["latents"] for row in both] == [[], [3, 7]]
    ablated = run(folder, tmp_path / "ablated", mode="ablate", prompt=PROMPTS[:1])
    assert [(row["latents"], row["alpha"]) for row in ablated] == [([], None), ([3], None)]


def test_drawn_generations_hang_on_the_seed_alone(folder, tmp_path):
    one, same, other = (
        [row["text"] for row in run(folder, tmp_path / str(n), temperature=1.5, seed=seed, prompt=PROMPTS[:1])]
        for n, seed in enumerate((1, 1, 2))
    )
    assert one == same != other


def test_a_stopped_run_goes_on_and_pays_for_nothing_twice(folder, tmp_path, monkeypatch):
    out, expected = tmp_path / "out", run(folder, tmp_path / "whole")
    run(folder, out)
    lines = (out / "steering.jsonl").read_bytes().splitlines(keepends=True)
    (out / "steering.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])
    called, generate = [], TransformersGenerator.__call__

    def counting(self, prompts, setting):
        called.extend((prompt.tobytes(), setting) for prompt in prompts)
        return generate(self, prompts, setting)

    monkeypatch.setattr(TransformersGenerator, "__call__", counting)
    assert run(folder, out) == expected
    assert len(called) == 2
    assert len((out / "steering.jsonl").read_text().splitlines()) == 6
    with pytest.raises(MismatchError, match="alpha"):
        run(folder, out, alpha=(1.0,))


def test_repetition_counts_n_grams_that_were_there():
    assert repetition(np.array([1, 2, 3, 4, 5])) == 0
    assert repetition(np.array([1] * 7)) == pytest.approx(3 / 4)
    assert repetition(np.array([1, 2])) == 0


def test_kl_of_known_distributions():
    plain, changed = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert mean_kl(changed, plain) == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2), rel=1e-5)


def test_latents_of_special_tokens_equal_a_loop(cache, folder, sae, tmp_path):
    found = find(
        FindConfig(sae=str(folder), cache=str(cache), top=64, max_instances=9, allow_train=True),
        tmp_path / "out.csv",
        Silent(),
    )
    maxima = {}
    opened = open_cache(cache)
    for index in range(9):
        instance, of_instance = opened.instance(index), {}
        rows = torch.from_numpy(instance.residuals(f"resid_post.{LAYER}"))
        for position, token in enumerate(instance.token_ids.tolist()):
            if instance.token_types[position] & (TokenType.SPECIAL | TokenType.ROLE_WORD):
                acts = sae.encode(rows[position : position + 1])[0]
                of_instance[token] = torch.maximum(of_instance.get(token, acts), acts)
        for token, acts in of_instance.items():
            maxima.setdefault(token, []).append(acts)
    assert {each.token_id: each.n_dialogues for each in found} == {token: len(acts) for token, acts in maxima.items()}
    for each in found:
        mean = torch.stack(maxima[each.token_id]).double().mean(0)
        assert [value for _, value in each.latents] == sorted((value for _, value in each.latents), reverse=True)
        for latent, value in each.latents:
            assert value == pytest.approx(float(mean[latent]), abs=1e-5)
    assert {"<|im_start|>", "user"} <= {each.token for each in found}
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert len(rows) == 64 * len(found)
    assert (int(rows[0]["latent"]), float(rows[0]["value"])) == found[0].latents[0]


def test_the_commands_print_what_was_said(folder, cache, tmp_path):
    words = [
        "steer",
        "--sae",
        str(folder),
        "--latent",
        "3",
        "--alpha",
        "0,40",
        "--prompt",
        "[bold]Hello",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(cli, [*words, "--max-new-tokens", "4"])
    assert done.exit_code == 0, done.output
    assert "[bold]Hello" in done.output
    assert len([json.loads(line) for line in (tmp_path / "out" / "steering.jsonl").open()]) == 3
    done = CliRunner().invoke(
        cli,
        [
            "steer",
            "find",
            "--sae",
            str(folder),
            "--cache",
            str(cache),
            "--out",
            str(tmp_path / "t.csv"),
            "--allow-train",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "<|im_start|>" in done.output


def test_what_cannot_be_steered_is_told(folder, small_cache, tmp_path, monkeypatch):
    for settings, message in (
        ({"latent": (64,)}, "has latents 0 to 63"),
        ({"prompt": ()}, "Steering needs a prompt"),
        ({"prompts": str(tmp_path / "none")}, "there is no such file"),
    ):
        with pytest.raises(InputError, match=message):
            run(folder, tmp_path / "out", **settings)
    monkeypatch.setattr("fastcache.extras.find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"--backend vllm needs vllm: pip install 'fastcache-sae\[vllm\]'"):
        run(folder, tmp_path / "out", backend="vllm")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MismatchError, match=r"trained at resid_post\.2, but"):
        find(FindConfig(sae=str(folder), cache=str(small_cache), allow_train=True), tmp_path / "out.csv", Silent())
    other = open_cache(small_cache).manifest.identity["model"]["name"]
    with pytest.raises(MismatchError, match="is of another model"):
        run(folder, tmp_path / "out", model=other)


def test_the_papers_strengths_are_the_default_and_text_does_not_speak_to_the_terminal(folder, tmp_path, monkeypatch):
    tokens = AutoTokenizer.from_pretrained(DEMO)("\x1b[31mred\x07")["input_ids"]
    said = Said(0, np.array(tokens, np.int32), True, None)
    monkeypatch.setattr(TransformersGenerator, "__call__", lambda *_given: iter([said]))
    words = ["steer", "--sae", str(folder), "--latent", "3", "--prompt", "\x1b[2JHello", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert "red" in done.output
    alphas = [json.loads(line)["alpha"] for line in (tmp_path / "out" / "steering.jsonl").open()]
    assert alphas == [None, 0, 15, 25, 50, 100, 150, 200]
