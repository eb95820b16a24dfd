"""Whatever is wrong in an SAE folder is reported in one paragraph, before anything is allocated."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fastcache
from fastcache.errors import FastcacheError, FormatError, IntegrityError, MismatchError, NonFiniteError, SpaceError
from fastcache.pipeline.cli import main
from fastcache.progress import Silent
from fastcache.sae.architectures import ARCHITECTURES, BatchTopKSae, JumpReluSae, StandardSae, TopKSae
from fastcache.sae.info import OPTIONS, read_info
from fastcache.sae.storage import load_sae, sae_fingerprint, save_sae
from fastcache.stages.export.config import ExportConfig
from fastcache.stages.export.run import export
from fastcache.stages.report.runs import read_runs

INFO = {
    "hook_point": "resid_post.1",
    "model": {"name": "m"},
    "tokenizer": {},
    "method": {"name": "fast", "max_length": 99},
    "corpus": {"fingerprint": "ab", "split": "train"},
    "training": {"steps": 3, "tokens": 12, "batch_size": 4, "widths": [1, 2]},
    "cache_fingerprint": "cd",
    "tokens": {"of": "all"},
}


def make(cls, d_in=8, d_sae=16):
    sae = cls(d_in, d_sae, **{name: 4 for name in OPTIONS[cls.architecture] if name == "k"})
    for value in sae.parameters():
        value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(0)))
    return sae


@pytest.fixture
def folder(tmp_path):
    save_sae(tmp_path / "sae", make(StandardSae), INFO)
    return tmp_path / "sae"


def change_info(folder, **changes):
    path = folder / "sae.json"
    info = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in info.items() if value != "absent"}))


def change_weights(folder, **changes):
    path = folder / "sae.safetensors"
    weights = {**load_file(path), **changes}
    save_file({name: value for name, value in weights.items() if value is not None}, path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_the_reader_expects_is_what_is_saved(name, tmp_path):
    sae = make(ARCHITECTURES[name])
    assert set(sae.options) == set(OPTIONS[name])
    stored = {key: tuple(value.shape) for key, value in sae.state_dict().items()}
    assert {key: shape for key, (_, shape) in sae.layout(8, 16).items()} == stored
    save_sae(tmp_path, sae, INFO)
    loaded, info = load_sae(tmp_path, ("hook_point", "model.name", "training"))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in sae.state_dict().items())
    assert {name: info[name] for name in INFO} == INFO


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 10**12}, "d_sae should be a whole number from 1 to"),
        ({"d_sae": 10**9}, "should hold W_dec as F32 .1000000000, 8."),
        ({"d_in": 10**9}, "should hold W_dec as F32 .16, 1000000000."),
        ({"d_in": -5}, "d_in should be a whole number from 1"),
        ({"d_in": 0}, "d_in"),
        ({"d_in": 8.0}, "d_in"),
        ({"d_in": True}, "d_in"),
        ({"d_in": "8"}, "d_in"),
        ({"d_in": None}, "d_in"),
        ({"d_in": [8]}, "d_in"),
        ({"d_sae": "absent"}, "lacks d_sae"),
        ({"options": "absent"}, "lacks options"),
        ({"options": []}, "options should be an object"),
        ({"options": {"norm_weighted": True}}, "options of standard should be empty"),
        ({"architecture": "relu"}, "architecture should be one of standard"),
        ({"architecture": ["topk"]}, "architecture"),
        ({"architecture": {}}, "architecture"),
        ({"architecture": "jumprelu"}, "should hold threshold as F32 .16. to go with sae.json, found no threshold"),
        ({"architecture": "topk", "options": {}}, "options of topk should be k"),
        ({"architecture": "topk", "options": {"k": 10**400}}, "k should be a number from 1 to 16"),
        ({"format": "other"}, "format should be 'fastcache-sae'"),
        ({"format": "absent"}, "lacks format"),
        ({"format_version": "3.0"}, "version 2.x"),
        ({"format_version": "2."}, "version 2.x"),
        ({"format_version": 2.0}, "version 2.x"),
        ({"training": [1]}, "training should be an object"),
        ({"training": {"steps": "many"}}, "training.steps"),
        ({"training": {"lr": {"a": 1}}}, "training"),
        ({"training": {"batch_size": 0}}, "training.batch_size"),
        ({"hook_point": "resid_pre.1"}, "hook_point should be resid_post"),
        ({"hook_point": 3}, "hook_point"),
        ({"model": "m"}, "model should be an object"),
        ({"model": {"name": 3}}, "model.name"),
        ({"method": []}, "method"),
        ({"method": {"name": "fast", "max_length": "long"}}, "method.max_length"),
        ({"corpus": {"fingerprint": 1}}, "corpus.fingerprint"),
        ({"tokens": 3}, "tokens"),
        ({"skipped_units": {}}, "skipped_units"),
        ({"cache_fingerprint": 5}, "cache_fingerprint"),
    ],
)
def test_a_wrong_sae_json_is_refused_before_anything_is_allocated(folder, changes, message, monkeypatch):
    change_info(folder, **changes)
    shapes = []
    monkeypatch.setattr(torch, "zeros", lambda *shape, **_: shapes.append(shape) or torch.empty(0))
    with pytest.raises(FormatError, match=message) as caught:
        load_sae(folder)
    assert not shapes
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_a_reader_needs_must_be_there(folder):
    for name in ("hook_point", "model", "training"):
        change_info(folder, **{name: "absent"})
        load_sae(folder)
        with pytest.raises(FormatError, match=f"lacks {name}"):
            load_sae(folder, (name,))
    change_info(folder, method={})
    with pytest.raises(FormatError, match=r"lacks method\.name"):
        load_sae(folder, ("method", "method.name"))


DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float64,
          torch.float16, torch.bfloat16]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_another_dtype_are_refused(folder, dtype):
    change_weights(folder, b_enc=torch.zeros(16).to(dtype))
    with pytest.raises((FormatError, IntegrityError), match=r"b_enc as F32 \[16\]|can't be read"):
        load_sae(folder)


def test_numbers_that_float32_does_not_hold_are_refused(folder, tmp_path):
    change_weights(folder, W_enc=torch.full((8, 16), 1e300, dtype=torch.float64))
    with pytest.raises(FormatError, match=r"W_enc as F32 \[8, 16\] to go with sae.json, found W_enc as F64"):
        load_sae(folder)
    save_sae(tmp_path / "b", make(BatchTopKSae), INFO)
    change_weights(tmp_path / "b", threshold=torch.tensor(1e300, dtype=torch.float64))
    with pytest.raises(NonFiniteError, match="threshold"):
        load_sae(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_enc": None}, r"should hold b_enc as F32 \[16\] to go with sae.json, found no b_enc"),
        ({"more": torch.zeros(3)}, r"should hold no more to go with sae.json, found more as F32 \[3\]"),
        ({"b_enc": torch.zeros(16, 1)}, r"found b_enc as F32 \[16, 1\]"),
        ({"x" * 5000: torch.zeros(1)}, "found x{40} as"),
    ],
)
def test_other_tensors_are_refused(folder, changes, message):
    change_weights(folder, **changes)
    with pytest.raises(FormatError, match=message):
        load_sae(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("cls", [StandardSae, JumpReluSae, BatchTopKSae])
def test_weights_that_are_not_finite_are_refused(cls, value, tmp_path):
    for name in make(cls).state_dict():
        save_sae(tmp_path / name, make(cls), INFO)
        weights = load_file(tmp_path / name / "sae.safetensors")
        weights[name].view(-1)[-1] = value
        change_weights(tmp_path / name, **weights)
        with pytest.raises(NonFiniteError, match=name):
            load_sae(tmp_path / name)


@pytest.mark.parametrize("cls", [JumpReluSae, BatchTopKSae])
def test_negative_thresholds_are_refused(cls, tmp_path):
    save_sae(tmp_path, make(cls), INFO)
    weights = load_file(tmp_path / "sae.safetensors")
    weights["threshold"].view(-1)[-1] = -1e-3
    change_weights(tmp_path, **weights)
    with pytest.raises(FormatError, match=r"thresholds should be 0 or more, found -0\.001"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 7, b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0[]", b"\x04\0\0\0\0\0\0\0{{{{"]
)
def test_a_file_of_something_else_is_refused(folder, content):
    (folder / "sae.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match="can't be read"):
        load_sae(folder)


def test_a_pipe_a_folder_and_nothing_are_refused(folder):
    path = folder / "sae.safetensors"
    path.unlink()
    for create in (lambda: None, lambda: os.mkfifo(path), lambda: (path.unlink(), path.mkdir())):
        create()
        with pytest.raises(FormatError, match="is missing, or no plain file"):
            load_sae(folder)


def test_weights_that_do_not_fit_into_the_memory_are_not_read(folder, monkeypatch):
    monkeypatch.setattr("fastcache.sae.storage.free_memory", lambda: 2000)
    monkeypatch.setattr("fastcache.sae.storage.load_file", lambda _: pytest.fail("they were read"))
    with pytest.raises(SpaceError, match="GB of memory are free"):
        load_sae(folder)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from([*INFO, "format", "format_version", "architecture", "d_in", "d_sae", "options", "other"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(fields, values, min_size=1, max_size=3), st.sampled_from(sorted(ARCHITECTURES)))
def test_any_sae_json_is_loaded_or_refused(changes, name):
    with TemporaryDirectory() as text:
        folder = Path(text)
        save_sae(folder, make(ARCHITECTURES[name]), INFO)
        change_info(folder, **changes)
        for read in (lambda: load_sae(folder), lambda: read_info(folder), lambda: read_runs((text,))):
            try:
                read()
            except FastcacheError as error:
                message = str(error)
                if len(message) > 1000 or "\n" in message:
                    pytest.fail(message)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_change_of_a_byte_of_the_weights_is_loaded_or_refused(data):
    with TemporaryDirectory() as text:
        folder = Path(text)
        save_sae(folder, make(JumpReluSae), INFO)
        raw = bytearray((folder / "sae.safetensors").read_bytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        (folder / "sae.safetensors").write_bytes(raw)
        try:
            sae = load_sae(folder)[0]
        except FastcacheError:
            return
    assert all(torch.isfinite(value).all() for value in sae.state_dict().values())
    assert sae.threshold.min() >= 0


def test_what_isnt_finite_as_another_library_has_it_is_not_exported(tmp_path):
    sae = make(StandardSae)
    sae.W_dec.mul_(1e25)  # the norms of its rows are beyond float32
    save_sae(tmp_path / "sae", sae, INFO)
    with pytest.raises(NonFiniteError, match=r"W_enc of .* has NaN or infinity as saelens has it"):
        export(ExportConfig(sae=str(tmp_path / "sae")), tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_is_of_what_the_folder_holds(folder, tmp_path):
    before = sae_fingerprint(folder)
    folder.rename(tmp_path / "moved")
    assert sae_fingerprint(tmp_path / "moved") == before
    change_weights(tmp_path / "moved", b_enc=torch.full((16,), 0.5))
    changed = sae_fingerprint(tmp_path / "moved")
    change_info(tmp_path / "moved", hook_point="resid_post.2")
    assert len({before, changed, sae_fingerprint(tmp_path / "moved")}) == 3


@pytest.mark.parametrize("fault", ["d_sae", "training", "float64", "nan"])
@pytest.mark.parametrize("command", ["export", "evaluate", "interpret", "steer", "steer find"])
def test_every_command_refuses_it_in_one_paragraph(tmp_path, held_out_cache, capsys, command, fault):
    identity = fastcache.open_cache(held_out_cache).manifest.identity
    shared = {name: identity[name] for name in ("model", "tokenizer", "method", "corpus")}
    sae = make(TopKSae, 32, 64)
    save_sae(tmp_path / "sae", sae, {**INFO, **shared})
    if fault == "d_sae":
        change_info(tmp_path / "sae", d_sae=10**12)
    elif fault == "training":
        change_info(tmp_path / "sae", training=[1])
    else:
        value, dtype = (1e300, torch.float64) if fault == "float64" else (np.nan, torch.float32)
        change_weights(tmp_path / "sae", b_dec=torch.full((32,), value, dtype=dtype))
    words = {
        "export": "",
        "evaluate": f"--cache {held_out_cache}",
        "interpret": f"--cache {held_out_cache}",
        "steer": "--latent 1 --prompt hello",
        "steer find": f"--cache {held_out_cache}",
    }[command]
    out = "" if command in ("evaluate", "steer find") else f"--out {tmp_path / 'out'}"
    with pytest.raises(SystemExit) as exit_info:
        main(f"{command} --sae {tmp_path / 'sae'} {words} {out}".split())
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("Error:")
    assert message.count("\n\n") == 0
    assert not (tmp_path / "out").exists()
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {"sae.json", "sae.safetensors"}


def test_inspect_and_report_read_it_as_strictly(folder, capsys):
    change_info(folder, training=[1])
    for words in (f"inspect {folder}", f"report --sae {folder} --format json"):
        with pytest.raises(SystemExit) as exit_info:
            main(words.split())
        assert exit_info.value.code == 2
        assert "training should be an object" in " ".join(capsys.readouterr().err.split())


def test_an_export_of_other_weights_is_not_taken_for_this_one(folder, tmp_path):
    export(ExportConfig(sae=str(folder)), tmp_path / "out", Silent())
    before = (tmp_path / "out/sae_weights.safetensors").read_bytes()
    change_weights(folder, b_dec=torch.full((8,), 0.5))  # sae.json stays what it was
    with pytest.raises(MismatchError, match="sae_fingerprint"):
        export(ExportConfig(sae=str(folder)), tmp_path / "out", Silent())
    assert (tmp_path / "out/sae_weights.safetensors").read_bytes() == before
