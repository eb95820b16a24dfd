"""Settings that make no sense, in YAML files, studies and sweeps: each is an error of ours, or it works."""

import copy
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcache.config import from_mapping
from fastcache.errors import FastcacheError, InputError
from fastcache.pipeline.options import read_config
from fastcache.pipeline.study import SECTIONS, read_study, with_command_line, with_settings
from fastcache.pipeline.study_files import find_study_file, included_studies
from fastcache.stages.evaluate.config import EvaluateConfig
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.interpret.config import InterpretConfig, JudgeConfig
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.steer.config import SteerConfig
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.sweep_config import MOST_MEMBERS, sweep_config
from fastcache.strict_yaml import parse_yaml

CONFIGS = [PrepareConfig, ExtractConfig, TrainConfig, EvaluateConfig, InterpretConfig, JudgeConfig, SteerConfig]
WHOLE = {
    "corpora": {"chat": {"source": ["demo"], "max_rows": 300}, "text": "a-folder"},
    "extract": {"model": "demo", "layer": [1, 2], "tokens": 6000},
    "methods": ["fast", "bt-p"],
    "train": {"base": {"batch_size": 64}, "grid": {"seed": [1, 2]}, "runs": [{"arch": "topk", "k": 4}]},
    "evaluate": {"max_instances": 20},
    "size": {"d_in": 64, "n_layers": 6, "parameters": 1000},
    "title": "a title",
    "note": "a note",
    "memory": "16GB",
}
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 10**23, 2**63, 1e300, -0.5, "", "x", "1e400", "nan", "\0", "demo", "10**9", [], {}])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["base", "seed", "a-b", "a_b", "", "x"]), children, max_size=3)
    ),
    max_leaves=6,
)


def paths_of(value, path=()):
    """The way to every value in a nested mapping."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from paths_of(child, (*path, key))


def replaced(whole, path, value):
    if not path:
        return value
    changed = copy.deepcopy(whole)
    target = changed
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return changed


def works_or_is_refused(action):
    """An error of ours is one short paragraph; any other one fails the test."""
    message = "It works."
    try:
        action()
    except FastcacheError as error:
        message = str(error)
    assert len(message) < 2000
    assert message.endswith((".", "?"))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([path for path in paths_of(WHOLE) if path]), json_values)
def test_any_value_anywhere_in_a_study_is_understood_or_refused(path, value):
    works_or_is_refused(lambda: read_study("name", replaced(WHOLE, path, value), 0.5))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["cache", "base", "grid", "runs", "memory"]), json_values)
def test_any_value_in_a_sweep_is_understood_or_refused(key, value):
    sweep = {"cache": "c", "base": {"arch": "topk"}, "grid": {"seed": [1, 2]}, "runs": [{"k": 4}], key: value}
    works_or_is_refused(lambda: sweep_config(sweep))
    works_or_is_refused(lambda: with_command_line(sweep, {"lr": "1"}, {"k": ["2"]}))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CONFIGS), st.data(), json_values)
def test_any_value_of_any_option_is_understood_or_refused(config, data, value):
    name = data.draw(st.sampled_from(list(config.__dataclass_fields__)))
    needed = {"model": "demo", "layer": 1, "cache": "c", "arch": "topk", "sae": "s", "latents": "l", "latent": 1}
    values = {key: needed[key] for key in needed if key in config.__dataclass_fields__}
    works_or_is_refused(lambda: from_mapping(config, {**values, name: value}, "here"))


@settings(max_examples=200, deadline=None)
@given(json_values)
def test_yaml_gives_back_what_json_would(value):
    def is_plain(value):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return all(map(is_plain, items)) and not (isinstance(value, int) and abs(value) >= 10**999)

    text = yaml.safe_dump(value, allow_unicode=False)
    if is_plain(value):
        assert parse_yaml(text, "here") == value


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab01:-,[]{}&*!?|>'\"# \n\t%@`~.<=", max_size=40))
def test_any_text_is_yaml_or_refused(text):
    works_or_is_refused(lambda: parse_yaml(text, "here"))


HOSTILE_YAML = [
    ("a: 1\nb: 2\na: 3\n", "key 'a' stands twice in one mapping, on lines 1 and 3"),
    ("a: {x: 1, x: 2}", "key 'x' stands twice"),
    ("- {x: 1,\n x: 2}", "key 'x' stands twice.*lines 1 and 2"),
    ("[" * 5000, "nested deeper than 64"),
    ("{a: " * 5000, "nested deeper than 64"),
    ("".join(" " * n + "a:\n" for n in range(200)), "line 65 is nested deeper than 64"),
    ("- " * 5000 + "1", "nested deeper than 64"),
    ("a: !!python/object/apply:os.system [exit]", "line 1 has the tag"),
    ("a: !!binary aGk=", "has the tag"),
    ("a: !!set {x}", "has the tag"),
    ("1: x", "'1' as a key"),
    ("on: x", "'on' as a key"),
    ("? [a]\n: 1", "a list or mapping as a key"),
    ("~: x", "'~' as a key"),
    ("a: .nan", "finite"),
    ("a: [-.inf]", "finite"),
    ("a: 1.0e999", "finite"),
    ("a: " + "9" * 5000, "a number of 5,000 digits"),
    ("&a [*a]", "an alias of itself"),
    ("&a {b: {c: *a}}", "an alias of itself"),
    ("a: &a [" + "1," * 50 + "]\n" + "".join(f"{y}: &{y} [{f'*{x},' * 50}]\n" for x, y in ("ab", "bc", "cd", "de")),
     "stands for more than 1,000,000 values"),
    ("a: *b", "undefined alias"),
    ("a: 1\n---\nb: 2", "another document"),
    ("a: [", "not valid YAML .line 1."),
    ("a: \x07", "not valid YAML"),
    ("<<: 5", "not valid YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), HOSTILE_YAML, ids=range(len(HOSTILE_YAML)))
def test_hostile_yaml_is_refused_with_its_line(text, message, tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_config(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("text", "value"),
    [("2024-01-01", "2024-01-01"), ("010", "010"), ("1:30", "1:30"), ("1_000", 1000), ("1e-4", "1e-4"), ("-.5", -0.5),
     ("1.5e3", 1500.0), ("yes", True), ("0x10", "0x10"), ("=", "=")],
)  # fmt: skip
def test_scalars_mean_what_they_mean_on_the_command_line(text, value):
    assert parse_yaml(f"a: {text}", "here") == {"a": value}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b"[" * 10**5, "not the JSON"),
        (b'{"a": NaN}', "NaN"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b'{"a": "\0"}', "NUL"),
        (b"", "not the JSON"),
    ],
)
def test_hostile_json_files_are_refused(data, message, tmp_path):
    path = tmp_path / "f.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_config(path)


def test_a_json_file_may_be_indented_with_tabs(tmp_path):
    path = tmp_path / "f.json"
    path.write_text('{\n\t"lr": 1e-4\n}')
    assert read_config(path) == {"lr": 1e-4}


def test_a_key_with_a_dash_is_the_one_with_an_underscore():
    with pytest.raises(InputError, match="stands twice"):
        from_mapping(TrainConfig, {"cache": "c", "arch": "topk", "batch-size": 1, "batch_size": 2}, "here")


@pytest.mark.parametrize(("n", "is_refused"), [(MOST_MEMBERS, False), (MOST_MEMBERS + 1, True), (297_000, True)])
def test_a_grid_has_a_largest_size(n, is_refused):
    values = {"cache": "c", "base": {"arch": "topk"}, "grid": {"seed": list(range(n))}}
    if not is_refused:
        assert len(sweep_config(values).members) == n
        return
    with pytest.raises(InputError, match=f"{n:,} SAEs; a sweep has at most 5,000"):
        sweep_config(values)


def test_a_grid_is_counted_before_it_is_made():
    values = {"cache": "c", "grid": {name: list(range(1000)) for name in ("seed", "k", "lr", "tokens", "expansion")}}
    with pytest.raises(InputError, match="1,000,000,000,000,000 SAEs"):
        sweep_config(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"base": 7, "grid": {"arch": ["topk"]}}}, "train: base should be a mapping, found int 7"),
        ({"methods": 5}, "methods should be a list"),
        ({"methods": [["fast"]]}, "methods should be a list"),
        ({"methods": "fast"}, "methods should be a list"),
        ({"train": {"runs": 3}}, "runs should be a list"),
        ({"train": {"runs": [3]}}, "runs should be a list of mappings"),
        ({"title": {"a": 1}}, "title should be text"),
        ({"size": {"d_in": 0, "n_layers": 1, "parameters": 1}}, "d_in = 0: expected a number from 1"),
        ({"extract": []}, "extract should be a mapping"),
        ({"memory": "9" * 400 + "GB"}, "expected a size such as 16GB"),
    ],
)
def test_studies_with_wrong_types_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        read_study("name", {**WHOLE, **changes})


def test_a_name_is_never_longer_than_a_file_name_can_be():
    runs = [{"arch": "standard", "norm_filter": f"{'9' * 300}x-median", "seed": seed} for seed in (1, 2)]
    names = list(sweep_config({"cache": "c", "runs": runs}).members)
    assert len(set(names)) == 2
    assert all(len(name) <= 200 for name in names)


@pytest.mark.parametrize("where", ["grid", "runs"])
def test_set_is_not_dropped_where_the_file_says_otherwise(where):
    values = {"grid": {"k": [1, 2]}} if where == "grid" else {"runs": [{"k": 1}, {"seed": 2}]}
    with pytest.raises(InputError, match="--set k"):
        with_command_line(values, {"k": "3"}, {})
    with pytest.raises(InputError, match="--set k"):
        with_settings({**WHOLE, "train": values}, {"k": "3"}, {})


def test_set_and_grid_of_one_setting_contradict_each_other():
    with pytest.raises(InputError, match="contradict"):
        with_command_line({}, {"k": "3"}, {"k": ["1", "2"]})


def test_set_reaches_every_section_of_a_study_and_no_other():
    changed = with_settings({}, {f"{section}.x": "1" for section in SECTIONS if section != "train"}, {})
    assert {section for section in changed if changed[section].get("x") == 1} == set(SECTIONS) - {"train"}
    with pytest.raises(InputError, match="is no section of a study"):
        with_settings({}, {"methods.x": "1"}, {})


def test_included_studies_are_found_by_name_folder_and_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    studies = included_studies()
    assert len(studies) >= 8
    for name, path in studies.items():
        for text in (name, f"{name}.yaml", f"recipes/{path.parent.name}/{name}.yaml", f"{path.parent.name}/{name}"):
            assert find_study_file(text) == path
        json.dumps(read_config(path))


@pytest.mark.parametrize("text", ["demo-studdy", "other/demo-study", "recipes/x/demo-study.yaml", "", "x" * 5000])
def test_a_study_that_is_not_there_is_told(text):
    with pytest.raises(InputError, match="--config"):
        find_study_file(text)
