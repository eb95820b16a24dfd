"""What latents are active on: collected in one pass, against a loop over everything."""

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from test_metrics import provenance, trained_like
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastcache.cache_format.reader import Cache, open_cache
from fastcache.cache_format.schema import TOKEN_SETS, token_sets
from fastcache.errors import InputError, MismatchError
from fastcache.pipeline.cli import main
from fastcache.progress import Silent
from fastcache.sae.storage import save_sae
from fastcache.stages.interpret import run as interpret_module
from fastcache.stages.interpret.collect import BINS, Collector, Contexts, bin_of, window_dialogues
from fastcache.stages.interpret.config import InterpretConfig
from fastcache.stages.interpret.decoder import nearest_latents, promoted_tokens
from fastcache.stages.interpret.results import Results
from fastcache.stages.interpret.run import interpret
from fastcache.stages.interpret.tables import Texts, quantile_bins
from fastcache.stages.steer.config import FindConfig
from fastcache.stages.steer.find import find

HOOK, TOP, WINDOW = "resid_post.1", 3, 4


@pytest.fixture(scope="module")
def sae():
    sae = trained_like()
    sae.b_enc -= 2.0
    sae.b_enc[:4] -= 100.0  # never active
    return sae


@pytest.fixture(scope="module")
def folder(sae, small_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("sae") / "sae"
    save_sae(out, sae, provenance(small_cache))
    return out


def run(folder, cache, out, **settings):
    defaults = {"top": TOP, "window": WINDOW, "allow_train": True}
    config = InterpretConfig(sae=str(folder), cache=str(cache), **{**defaults, **settings})
    interpret(config, out, Silent())
    return pq.read_table(out / "latents.parquet").to_pylist(), pq.read_table(out / "contexts.parquet").to_pylist()


@pytest.fixture(scope="module")
def found(folder, small_cache, tmp_path_factory):
    return run(folder, small_cache, tmp_path_factory.mktemp("found") / "out")


@pytest.fixture(scope="module")
def small_found(folder, small_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "out"
    run(folder, small_cache, out)
    return Results(out)


@pytest.fixture(scope="module")
def acts(sae, small_cache):
    """Latent activations of every dialogue."""
    instances = open_cache(small_cache).instances()
    return [sae.encode(torch.from_numpy(instance.residuals(HOOK))) for instance in instances]


def test_top_contexts_are_the_highest_of_different_dialogues(found, acts):
    contexts = [row for row in found[1] if row["kind"] == "top"]
    for latent in range(acts[0].shape[1]):
        highest = [(float(each[:, latent].max()), number) for number, each in enumerate(acts)]
        expected = [pair for pair in sorted(highest, key=lambda pair: (-pair[0], pair[1])) if pair[0] > 0][:TOP]
        rows = [row for row in contexts if row["latent"] == latent]
        assert [(row["rank"], row["dialogue"]) for row in rows] == [
            (i, number) for i, (_, number) in enumerate(expected)
        ]
        assert [row["value"] for row in rows] == pytest.approx([value for value, _ in expected])
        for row in rows:
            assert row["position"] == int(acts[row["dialogue"]][:, latent].argmax())


def test_a_context_has_the_tokens_and_activations_around_it(found, acts, small_cache):
    cache = open_cache(small_cache)
    for row in found[1]:
        instance, at = cache.instance(row["dialogue"]), row["position"]
        start, stop = max(0, at - WINDOW), min(len(instance), at + WINDOW + 1)
        assert (row["start"], row["corpus_row"]) == (start, instance.instance_id)
        assert row["token_types"] == instance.token_types[start:stop].tolist()
        assert len(row["tokens"]) == stop - start
        expected = acts[row["dialogue"]][start:stop, row["latent"]]
        np.testing.assert_allclose(row["activations"], expected, rtol=1e-3, atol=1e-6)


def test_drawn_contexts_come_from_the_bins_of_the_quantiles(found, acts):
    everything = torch.cat(acts)
    for latent in range(everything.shape[1]):
        positive = everything[everything[:, latent] > 0, latent]
        drawn = [row["value"] for row in found[1] if row["latent"] == latent and row["kind"] == "drawn"]
        counts = torch.bincount(bin_of(positive), minlength=BINS).tolist()
        assert bin_of(torch.tensor(drawn)).tolist() == quantile_bins(counts)
        assert found[0][latent]["histogram"] == counts


def test_densities_are_shares_of_the_tokens_of_each_set(found, acts, small_cache):
    masks = np.concatenate([token_sets(i.token_types) for i in open_cache(small_cache).instances()], 1)
    everything = torch.cat(acts).numpy()
    for row in found[0]:
        values = everything[:, row["latent"]]
        assert row["n_active"] == (values > 0).sum()
        assert row["max_activation"] == pytest.approx(values.max(initial=0))
        assert row["mean_activation"] == pytest.approx(values.sum() / max(row["n_active"], 1), rel=1e-5)
        for mask, name in zip(masks, TOKEN_SETS, strict=True):
            assert row[f"density_{name}"] == pytest.approx((values[mask] > 0).sum() / max(mask.sum(), 1))
    assert any(row["n_active"] == 0 for row in found[0])
    assert any(0 < row["density_all"] < 0.2 for row in found[0])


def test_a_latent_is_silent_in_the_windows_in_which_it_is_never_active(found, small_found, acts, small_cache):
    windows = small_found.windows()
    assert len({window["dialogue"] for window in windows}) == len(windows) == open_cache(small_cache).n_instances
    for window in windows:
        start, stop = window["start"], window["start"] + len(window["tokens"])
        assert (start, stop) == (
            max(0, window["position"] - WINDOW),
            min(len(acts[window["dialogue"]]), window["position"] + WINDOW + 1),
        )
        active = (acts[window["dialogue"]][start:stop] > 0).any(0).tolist()
        assert [window["window"] not in row["silent_windows"] for row in found[0]] == active
    assert any(0 < len(row["silent_windows"]) < len(windows) for row in found[0])


def test_windows_are_drawn_from_all_dialogues_alike():
    counts = Counter(dialogue for seed in range(300) for dialogue in window_dialogues(200, seed))
    assert set(counts) == set(range(200))
    assert max(counts.values()) < 96 + 5 * 96**0.5  # 300 * 64 / 200, and five standard deviations
    assert len(window_dialogues(10, 0)) == 10


def test_results_tell_what_they_are_of(small_found, folder, small_cache):
    assert small_found.about["sae"]["trained_on"] == "fast"
    assert small_found.about["dialogues"] == open_cache(small_cache).n_instances
    assert small_found.about["tokens"]["all"] == open_cache(small_cache).n_tokens


def test_contexts_can_be_read_of_some_latents_or_one_after_the_other(small_found, found):
    by_latent = dict(small_found.contexts())
    assert [row for rows in by_latent.values() for row in rows] == found[1]
    some = list(by_latent)[3:9]
    assert small_found.contexts_of(some) == {latent: by_latent[latent] for latent in some}
    assert small_found.active_in_dialogues(TOP) == [
        latent for latent, rows in by_latent.items() if sum(row["kind"] == "top" for row in rows) == TOP
    ]


def test_every_activation_of_a_bin_is_as_likely_to_be_drawn():
    acts = torch.full((4, 1), 1.5)
    counts = Counter()
    for seed in range(600):
        collector = Collector(1, 3, 1, TOP, WINDOW, seed, "cpu")
        for dialogue in range(3):
            collector.add(acts, torch.ones(1, 4, dtype=torch.bool), dialogue)
        place = int(bin_of(torch.tensor([1.5])))
        counts[int(collector.drawn.dialogue[0, place]), int(collector.drawn.position[0, place])] += 1
    assert len(counts) == 12
    assert max(counts.values()) < 50 + 5 * 50**0.5  # 600 / 12, and five standard deviations
    assert min(counts.values()) > 50 - 5 * 50**0.5


def test_a_stopped_run_goes_on_to_the_same_tables(found, folder, small_cache, tmp_path, monkeypatch):
    residuals, read = Cache.residuals, []

    def stopping(self, *given):
        read.append(given)
        if len(read) == 17:
            raise KeyboardInterrupt
        return residuals(self, *given)

    monkeypatch.setattr(interpret_module, "CHECKPOINT_EVERY", 5)
    monkeypatch.setattr(Cache, "residuals", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(folder, small_cache, tmp_path / "out")
    assert run(folder, small_cache, tmp_path / "out") == found
    assert len(read) == 17 + open_cache(small_cache).n_instances - 15
    run(folder, small_cache, tmp_path / "out")
    assert len(read) == 17 + open_cache(small_cache).n_instances - 15  # complete: nothing is read again


def test_neighbours_are_the_rows_of_highest_cosine():
    W_dec = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec[None], dim=2).fill_diagonal_(-2)
    for each, row in zip(nearest_latents(W_dec, 4), cosine, strict=True):
        assert [index for index, _ in each] == row.argsort(descending=True)[:4].tolist()
        assert [value for _, value in each] == pytest.approx(row.sort(descending=True).values[:4].tolist(), abs=1e-5)


def test_promoted_and_suppressed_tokens_are_the_ends_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    W_dec, unembedding = (torch.randn(n, 8, generator=generator) for n in (20, 90))
    promoted, suppressed = promoted_tokens(W_dec, unembedding, 3)
    for up, down, logits in zip(promoted, suppressed, W_dec @ unembedding.T, strict=True):
        order = logits.argsort(descending=True).tolist()
        assert [token for token, _ in up] == order[:3]
        assert [token for token, _ in down] == order[::-1][:3]
        assert [value for _, value in down] == pytest.approx(logits.sort().values[:3].tolist(), abs=1e-5)


def test_the_command_shows_the_strongest_and_knows_output_tokens(folder, small_cache, tmp_path, capsys):
    out = tmp_path / "out"
    main(
        [
            "interpret",
            "--sae",
            str(folder),
            "--cache",
            str(small_cache),
            "--out",
            str(out),
            "--unembedding",
            "--allow-train",
        ]
    )
    assert "never active" in capsys.readouterr().out
    latents = pq.read_table(out / "latents.parquet").to_pylist()
    assert all(len(row["promoted"]) == len(row["suppressed"]) == 10 for row in latents)


def test_what_is_written_can_be_judged_and_shown(folder, small_cache, tmp_path):
    out = tmp_path / "out"
    run(folder, small_cache, out, top=5, neighbours=0, window=0)
    main(["interpret", "judge", "--latents", str(out), "--judge", "none", "--judge-model", "m", "--count", "7"])
    assert (out / "judge" / "prompts.jsonl").read_bytes().count(b"\n") == 7
    main(["dashboard", "--latents", str(out), "--no-serve"])
    n_latents = len(Results(out).latents(["latent"]))
    assert len(list((out / "dashboard" / "data").glob("latents-*.js"))) == -(-n_latents // 64)


def test_an_sae_of_another_layer_is_refused(small_cache, tmp_path, sae):
    other = tmp_path / "other"
    save_sae(other, sae, {**provenance(small_cache), "hook_point": "resid_post.7"})
    with pytest.raises(MismatchError, match=r"trained at resid_post\.7"):
        run(other, small_cache, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_activations_beyond_float16_stay_finite():
    contexts = Contexts.empty(1, 1, 1, "cpu")
    acts = torch.tensor([[1.0], [90_000.0], [2.0]])
    one = torch.tensor([0])
    contexts.put(one, one, torch.tensor([1.0]), acts, 0, torch.tensor([1]))
    assert contexts.around[0, 0].tolist() == [1.0, 65504.0, 2.0]
    assert contexts.value[0, 0] == 90_000


def sentencepiece_like():
    """A tokenizer whose decoder takes the space from the first token, as Llama 2's does."""
    words = ["a", "\u2581a", "\u2581the", "\u2581cat", "s"]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, "a"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=model)


def test_tokens_keep_their_spaces_whatever_the_decoder(small_cache):
    texts = Texts(open_cache(small_cache), sentencepiece_like())
    assert [texts.piece(token) for token in (2, 3, 4)] == [" the", " cat", "s"]


def test_a_text_is_whole_where_a_letter_is_of_several_tokens(small_found, small_cache):
    for row in small_found.windows()[:5]:
        instance = open_cache(small_cache).instance(row["dialogue"])
        tokens = instance.token_ids[row["start"] : row["start"] + len(row["tokens"])].tolist()
        assert row["text"] == AutoTokenizer.from_pretrained(
            open_cache(small_cache).manifest.identity["model"]["name"]
        ).decode(tokens)


def test_training_rows_are_refused_as_evaluate_refuses_them(folder, small_cache, held_out_cache, tmp_path):
    with pytest.raises(InputError, match=r"holds training rows.*extract --split interpret.*--allow-train"):
        run(folder, small_cache, tmp_path / "out", allow_train=False)
    with pytest.raises(InputError, match=r"holds training rows.*extract --split steer.*--allow-train"):
        find(FindConfig(sae=str(folder), cache=str(small_cache)), tmp_path / "out.csv", Silent())
    assert not list(tmp_path.iterdir())
    latents, _ = run(folder, held_out_cache, tmp_path / "out", allow_train=False)
    assert latents
