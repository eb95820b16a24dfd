"""Stage one: cached values against an independent plain loop, neighbours, ledger, methods."""

import json
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import edit_manifest, run_extract, tree_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastcache
from fastcache.cache_format.schema import TokenType, select
from fastcache.corpus import Corpus
from fastcache.errors import InputError, IntegrityError, MismatchError, ModelError, NonFiniteError, SpaceError
from fastcache.llm.loading import ModelSource
from fastcache.llm.parity import check_parity, reference_residuals, spread
from fastcache.llm.transformers_backend import TransformersBackend


def plain_residuals(model_path, token_ids, layer):
    """The residual stream by a plain forward pass of the whole model, hooked on nothing of ours."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    caught = []
    model.model.layers[layer].register_forward_hook(lambda _m, _i, out: caught.append(out))
    with torch.no_grad():
        model(torch.tensor([token_ids.tolist()]))
    return (caught[0][0] if isinstance(caught[0], tuple) else caught[0])[0].numpy()


def test_values_equal_a_plain_loop_for_every_instance(tiny_model, chat_corpus, tmp_path):
    cache = run_extract(tiny_model, chat_corpus, tmp_path / "cache", layer=(0, 2, 3))
    for index in range(0, cache.n_instances, 7):
        instance = cache.instance(index)
        for layer in (0, 2, 3):
            expected = plain_residuals(tiny_model, instance.token_ids, layer)
            assert np.abs(instance.residuals(f"resid_post.{layer}") - expected).max() < 1e-5


def test_top_layer_is_the_residual_and_not_the_final_norm(tiny_qwen):
    backend = TransformersBackend(ModelSource(str(tiny_qwen)), ["resid_post.1"], "float32", "cpu")
    ids = np.arange(20, dtype=np.int32)
    found = next(backend.residuals([ids]))["resid_post.1"]
    assert np.abs(found - plain_residuals(tiny_qwen, ids, 1)).max() < 1e-5
    root_mean_square = np.sqrt((found**2).mean(1))
    assert np.abs(root_mean_square - 1).min() > 1e-3  # a normed tensor would have 1


def test_tokens_are_those_of_the_template_in_corpus_order(tiny_model, chat_corpus, tmp_path):
    cache = run_extract(tiny_model, chat_corpus, tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = list(Corpus(chat_corpus).rows("train"))
    assert [instance.instance_id for instance in cache.instances()] == [row.row for row in rows]
    for instance, row in zip(cache.instances(), rows, strict=True):
        assert instance.token_ids.tolist() == tokenizer.apply_chat_template(row.messages, return_dict=False)[:256]
        assert instance.corpus_rows == [row.row]


def test_an_instance_does_not_depend_on_its_neighbours(tiny_model, chat_corpus, tmp_path):
    together = run_extract(tiny_model, chat_corpus, tmp_path / "cache")
    backend = TransformersBackend(ModelSource(str(tiny_model)), ["resid_post.1"], "float32", "cpu")
    for index in (5, 0, 11):
        alone = next(backend.residuals([together.instance(index).token_ids]))["resid_post.1"]
        assert np.array_equal(together.instance(index).residuals("resid_post.1"), alone)


def test_capturing_more_layers_changes_nothing(tiny_qwen, chat_corpus, tmp_path):
    one = run_extract(tiny_qwen, chat_corpus, tmp_path / "one", layer=(1,))
    many = run_extract(tiny_qwen, chat_corpus, tmp_path / "many", layer=(3, 1, 0))
    assert np.array_equal(
        one.residuals("resid_post.1", 0, one.n_tokens), many.residuals("resid_post.1", 0, one.n_tokens)
    )


def test_bfloat16_is_torchs_rounding(tiny_qwen, chat_corpus, small_cache, tmp_path):
    exact = run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", layer=(3,))
    rounded = fastcache.open_cache(small_cache)
    expected = torch.from_numpy(exact.residuals("resid_post.3", 0, exact.n_tokens)).bfloat16().float().numpy()
    assert np.array_equal(rounded.residuals("resid_post.3", 0, exact.n_tokens), expected)


def test_units_do_not_change_what_is_stored(tiny_qwen, chat_corpus, tmp_path):
    few = run_extract(tiny_qwen, chat_corpus, tmp_path / "few", unit_tokens=100_000)
    many = run_extract(tiny_qwen, chat_corpus, tmp_path / "many", unit_tokens=300)
    assert len(few.parts) == 1
    assert len(many.parts) > 5
    assert np.array_equal(
        few.residuals("resid_post.1", 0, few.n_tokens), many.residuals("resid_post.1", 0, few.n_tokens)
    )


def test_the_ledger_accounts_for_every_row(tiny_qwen, chat_corpus, tmp_path):
    cache = run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", max_length=64, tokens=1500)
    ledger = cache.manifest.ledger
    n_rows = Corpus(chat_corpus).n_rows("train")
    assert ledger["stored"] + ledger["truncated"] + sum(ledger["skipped"].values()) + ledger["not reached"] == n_rows
    assert ledger["stored"] + ledger["truncated"] == cache.n_instances
    assert sum(ledger["truncated_by_source"].values()) == ledger["truncated"]
    assert ledger["truncated"] == sum(len(instance) == 64 for instance in cache.instances()) > 0
    assert cache.n_tokens <= 1500


def test_truncation_keeps_the_head(tiny_qwen, chat_corpus, tmp_path):
    whole = run_extract(tiny_qwen, chat_corpus, tmp_path / "whole")
    cut = run_extract(tiny_qwen, chat_corpus, tmp_path / "cut", max_length=32)
    for long, short in zip(whole.instances(), cut.instances(), strict=True):
        assert np.array_equal(long.token_ids[:32], short.token_ids)
        assert np.abs(long.residuals("resid_post.1")[: len(short)] - short.residuals("resid_post.1")).max() < 1e-5


@pytest.mark.parametrize("method", ["bt-f", "bt-p"])
def test_blocks_hold_the_concatenated_rows(method, tiny_qwen, chat_corpus, text_corpus, tmp_path):
    corpus = chat_corpus if method == "bt-f" else text_corpus
    cache = run_extract(tiny_qwen, corpus, tmp_path / "cache", method=method, block_size=64)
    lengths = [len(instance) for instance in cache.instances()]
    assert set(lengths[:-1]) == {64}
    assert 0 < lengths[-1] <= 64
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen)
    stream = []
    for row in Corpus(corpus).rows("train"):
        if method == "bt-f":
            stream += tokenizer.apply_chat_template(row.messages, return_dict=False)
        else:
            stream += [*tokenizer.encode(row.text), tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert np.concatenate([instance.token_ids for instance in cache.instances()]).tolist() == stream


def test_blocks_know_their_documents(tiny_qwen, chat_corpus, tmp_path):
    cache = run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", method="bt-f", block_size=64)
    rows = [row for instance in cache.instances() for row in instance.corpus_rows]
    expected = [row.row for row in Corpus(chat_corpus).rows("train")]
    assert list(dict.fromkeys(rows)) == expected  # in order; a row that goes over a cut stands in both blocks
    assert cache.manifest.ledger["stored"] == len(expected)


@pytest.mark.parametrize("tokens", [64, 65, 500, 1023, 1024])
def test_blocks_have_exactly_the_tokens_of_the_budget(tokens, tiny_qwen, chat_corpus, tmp_path):
    options = {"method": "bt-f", "block_size": 64, "tokens": tokens, "parity": 0}
    cache = run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", **options)
    lengths = [len(instance) for instance in cache.instances()]
    assert sum(lengths) == tokens
    assert set(lengths[:-1]) <= {64}
    assert cache.manifest.totals["last_block_tokens"] == lengths[-1] == (tokens % 64 or 64)


def test_dialogues_miss_the_budget_by_less_than_the_next_one(tiny_qwen, chat_corpus, tmp_path):
    whole = run_extract(tiny_qwen, chat_corpus, tmp_path / "whole", parity=0)
    cut = run_extract(tiny_qwen, chat_corpus, tmp_path / "cut", parity=0, tokens=1000)
    assert cut.n_tokens <= 1000 < cut.n_tokens + len(whole.instance(cut.n_instances))
    assert [len(one) for one in cut.instances()] == [len(one) for one in whole.instances()][: cut.n_instances]


def test_blocks_can_have_as_many_tokens_as_a_cache_of_dialogues(tiny_qwen, chat_corpus, tmp_path):
    fast = run_extract(tiny_qwen, chat_corpus, tmp_path / "fast", parity=0, tokens=1000)
    options = {"method": "bt-f", "block_size": 64, "tokens": fast.n_tokens, "parity": 0}
    assert run_extract(tiny_qwen, chat_corpus, tmp_path / "blocks", **options).n_tokens == fast.n_tokens


def test_a_partial_block_is_marked_and_shown(tiny_qwen, chat_corpus, tmp_path, capsys):
    from fastcache.pipeline.cli import main

    for tokens in (100, 128):
        options = {"method": "bt-f", "block_size": 64, "tokens": tokens, "parity": 0}
        run_extract(tiny_qwen, chat_corpus, tmp_path / str(tokens), **options)
        main(["inspect", str(tmp_path / str(tokens))])
        shown = capsys.readouterr().out
        assert ("partial: 36 of 64 tokens" in shown) == (tokens == 100)
        assert "separator_policy template" in shown


@pytest.mark.parametrize(
    ("changed", "policy"),
    [
        ({}, "endoftext"),
        ({"bos_token": "the"}, "bos"),
        ({"vocabulary": {}}, "eos"),
        ({"vocabulary": {}, "eos_token": None}, "none"),
    ],
)
def test_the_separator_is_recorded_with_what_chose_it(changed, policy, tiny_qwen, text_corpus):
    from fastcache.stages.extract.config import ExtractConfig
    from fastcache.stages.extract.job import make_job

    job = make_job(ExtractConfig(str(tiny_qwen), (1,), method="bt-p"), lambda: text_corpus)
    known = changed.pop("vocabulary", job.tokenizer.get_vocab())
    for name, token in changed.items():
        setattr(job.tokenizer, name, token)
    job.tokenizer.get_vocab = lambda: known
    tokens = {
        "bos": job.tokenizer.bos_token_id,
        "endoftext": known.get("<|endoftext|>"),
        "eos": job.tokenizer.eos_token_id,
    }
    method = job.identity()["method"]
    assert (method["separator_policy"], method["separator"]) == (policy, tokens.get(policy))


def test_a_row_that_the_budget_cuts_is_truncated(tiny_qwen, chat_corpus, tmp_path):
    cache = run_extract(
        tiny_qwen, chat_corpus, tmp_path / "cache", method="bt-f", block_size=16, tokens=500, unit_tokens=64
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen)
    total, whole = 0, 0
    for row in Corpus(chat_corpus).rows("train"):
        total += len(tokenizer.apply_chat_template(row.messages, return_dict=False))
        whole += total <= cache.n_tokens
    assert total > cache.n_tokens
    assert cache.manifest.ledger["stored"] == whole
    assert cache.manifest.ledger["truncated"] == 1
    assert (
        sum(cache.manifest.ledger[name] for name in ("stored", "truncated", "not reached"))
        == cache.manifest.ledger["rows"]
    )


def test_a_document_of_many_blocks_is_cut_into_them(tiny_qwen, tmp_path):
    from fastcache.progress import Silent
    from fastcache.stages.prepare.config import PrepareConfig
    from fastcache.stages.prepare.run import prepare

    (tmp_path / "book.jsonl").write_text(json.dumps({"text": "the owl sat " * 400}))
    prepare(PrepareConfig(source=(str(tmp_path / "book.jsonl"),)), tmp_path / "corpus", Silent())
    cache = run_extract(tiny_qwen, tmp_path / "corpus", tmp_path / "cache", method="bt-p", block_size=4, parity=0)
    assert cache.n_instances > 256
    assert cache.manifest.ledger["stored"] == 1


def test_missing_corpus_rows_are_noticed(tiny_qwen, chat_corpus, tmp_path):
    import shutil

    import pyarrow.parquet as pq

    shutil.copytree(chat_corpus, tmp_path / "corpus")
    shard = tmp_path / "corpus/train-00000.parquet"
    pq.write_table(pq.read_table(shard).slice(0, 5), shard)
    with pytest.raises(IntegrityError, match="has 5 rows in the split 'train'"):
        run_extract(tiny_qwen, tmp_path / "corpus", tmp_path / "cache")


def test_a_part_of_other_sequences_is_not_gone_on_with(tiny_qwen, chat_corpus, tmp_path, monkeypatch):
    run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", unit_tokens=400)
    edit_manifest(tmp_path / "cache", state="writing")
    from fastcache.stages.extract import job as extract_job

    original = extract_job.fast_items
    monkeypatch.setattr(extract_job, "fast_items", lambda *given: islice(original(*given), 1, None))
    with pytest.raises(MismatchError, match="a package changed"):
        run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", unit_tokens=400)


def test_a_block_has_one_first_position(tiny_qwen, chat_corpus, tmp_path):
    cache = run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", method="bt-f", block_size=64)
    for instance in cache.instances():
        assert np.flatnonzero(instance.token_types & TokenType.FIRST_POSITION).tolist() == [0]


def test_splits_share_no_dialogue(small_cache, held_out_cache):
    train, held_out = (fastcache.open_cache(path) for path in (small_cache, held_out_cache))
    assert not {i.instance_id for i in train.instances()} & {i.instance_id for i in held_out.instances()}


def test_parity_is_in_the_manifest(small_cache):
    parity = fastcache.open_cache(small_cache).manifest.parity
    assert parity["hook_points"]["resid_post.3"]["max_abs_difference"] < 1e-4
    assert len(parity["lengths"]) == 2


def test_a_backend_that_is_wrong_fails_the_parity_check(tiny_qwen):
    source = ModelSource(str(tiny_qwen))
    reference = reference_residuals(source, ["resid_post.1"])
    other = TransformersBackend(source, ["resid_post.0"], "float32", "cpu")
    wrong = SimpleNamespace(
        residuals=lambda sequences: ({"resid_post.1": r["resid_post.0"]} for r in other.residuals(sequences))
    )
    with pytest.raises(MismatchError, match="Parity"):
        check_parity(wrong, reference, [np.arange(9, dtype=np.int32)], "float32")


def test_parity_sequences_span_the_lengths():
    assert spread([5, 9, 1, 7, 3], 3) == [2, 0, 1]


def test_the_manifest_counts_tokens_by_type(small_cache):
    cache = fastcache.open_cache(small_cache)
    types = np.concatenate([instance.token_types for instance in cache.instances()])
    counts = cache.manifest.totals["tokens_by_type"]
    assert counts["SPECIAL"] + counts["ROLE_WORD"] == int(select(types, "special").sum())
    assert counts["FIRST_POSITION"] == cache.n_instances


def test_a_finished_cache_is_left_alone(tiny_qwen, chat_corpus, tmp_path):
    run_extract(tiny_qwen, chat_corpus, tmp_path / "cache")
    before = tree_bytes(tmp_path / "cache")
    run_extract(tiny_qwen, chat_corpus, tmp_path / "cache")
    assert tree_bytes(tmp_path / "cache") == before


def test_resuming_with_other_settings_names_the_field(tiny_qwen, chat_corpus, tmp_path):
    run_extract(tiny_qwen, chat_corpus, tmp_path / "cache")
    with pytest.raises(MismatchError, match="max_length: 8192 -> 99"):
        run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", max_length=99)


def test_resuming_with_another_tokenizer_names_the_field(tiny_qwen, chat_corpus, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_qwen, model)
    run_extract(model, chat_corpus, tmp_path / "cache")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("'\\n' }}", "'\\n\\n' }}"))
    with pytest.raises(MismatchError, match="chat_template_sha256"):
        run_extract(model, chat_corpus, tmp_path / "cache")


def test_nan_activations_name_the_instance_and_leave_no_part(tiny_qwen, chat_corpus, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    import shutil

    shutil.copytree(tiny_qwen, model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"Instance \d+ has NaN"):
        run_extract(model, chat_corpus, tmp_path / "cache", parity=0)
    assert fastcache.open_cache(tmp_path / "cache").n_tokens == 0


def test_a_model_without_chat_template_is_refused(tiny_qwen, chat_corpus, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_qwen, model)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        run_extract(model, chat_corpus, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"layer": (4,)}, InputError, "goes from 0 to 3"),
        ({"method": "bt-p"}, InputError, "needs a text corpus"),
        ({"split": "evil"}, InputError, "no rows in the split 'evil'"),
        ({"tokens": 1}, InputError, "no room"),
    ],
)
def test_bad_settings_say_what_is_wrong(settings, error, words, tiny_qwen, chat_corpus, tmp_path):
    with pytest.raises(error, match=words):
        run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", **settings)


def test_too_little_disk_is_told_before_the_start(tiny_qwen, chat_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    with pytest.raises(SpaceError, match="needs about"):
        run_extract(tiny_qwen, chat_corpus, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_foreign_folder_is_refused_and_left_alone(tiny_qwen, chat_corpus, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds no run\.json"):
        run_extract(tiny_qwen, chat_corpus, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt"]


def test_run_json_tells_how_the_cache_was_made(small_cache):
    run = json.loads((small_cache / "run.json").read_text())
    assert run["command"] == "extract"
    assert run["settings"]["layer"] == [1, 3]
    assert "torch" in run["versions"]
