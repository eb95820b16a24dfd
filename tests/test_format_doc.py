"""docs/FORMAT.md and the code say the same: tables against constants, tables and examples against a fresh cache."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from crc32c import crc32c

import fastcache
from fastcache import files
from fastcache.cache_format import manifest as manifest_module
from fastcache.cache_format import schema, statistics
from fastcache.cache_format.manifest import LOG_FILE, MANIFEST_FILE, Log, Manifest, load_manifest
from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.schema import SPLITS, STORED_DTYPES, TOKEN_ARRAYS, UNIT_ROWS, TokenType, TurnRole
from fastcache.cache_format.storage import LocalStorage
from fastcache.cache_format.writer import CacheWriter

DOCUMENT = (Path(__file__).parents[1] / "docs" / "FORMAT.md").read_text()
HOOK, D_IN = "resid_post.1", 4
TYPES = {"string": str, "boolean": bool, "integer": int, "number": float, "object": dict, "array": list}


def table(header):
    """The cells, without backticks, of the rows below the table header that begins with `header`."""
    _, found, rest = DOCUMENT.partition(f"\n| {header} |")
    assert found, f"no table {header!r}"
    rows = [line for line in rest.split("\n\n")[0].splitlines()[2:] if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in rows]


def example(after, language):
    """The first block of code in `language` after the text `after`."""
    return re.search(rf"{re.escape(after)}.*?```{language}\n(.*?)\n```", DOCUMENT, re.DOTALL)[1]


def example_manifest():
    return json.loads(example("Its `manifest.json`", "json"))


def example_listing():
    """Path -> size."""
    sizes = {}
    for line in example("Its files", "text").splitlines():
        folder, *pairs = line.split()
        sizes |= {
            (folder + name).removeprefix("./"): int(size) for name, size in zip(pairs[::2], pairs[1::2], strict=True)
        }
    return sizes


def write_cache(root, lengths=(19, 20), dtype="bfloat16", identity=None):
    """A cache with one part, and its writer."""
    root.mkdir()
    identity = {**(identity or {}), "hook_points": [HOOK], "d_in": D_IN, "dtype": dtype}
    writer = CacheWriter(root, Manifest(identity, versions={"numpy": np.__version__}))
    rng = np.random.default_rng(0)
    types = [TokenType.SPECIAL, TokenType.CONTENT, TokenType.TEMPLATE, TokenType.ROLE_WORD]
    instances = [
        Instance(row, rng.integers(1, 100, n).astype(np.int32), rng.choice(types, n).astype(np.uint8), [(row, 0)])
        for row, n in enumerate(lengths)
    ]
    for instance in instances:
        instance.token_types[0] |= TokenType.FIRST_POSITION
    part = writer.part(0, instances)
    for n in lengths:
        part.append({HOOK: rng.normal(size=(n, D_IN)).astype(np.float32)})
    left_out = {"reasoning": {"rows": 1, "characters": 9}}
    rendering = {"changed": {"reasoning not passed": 1}, "left_out": left_out}
    part.commit({"stored": len(lengths), "truncated": [8], "skipped": {"no tokens": [7]}, **rendering})
    return writer


def job_identity(folder, method):
    """What an extract run writes, without a model: of a folder for `fast`, else of the hub, quantised, by vLLM."""
    from fastcache.llm.loading import ModelSource
    from fastcache.stages.extract.config import ExtractConfig
    from fastcache.stages.extract.job import Job

    quantised = {} if method == "fast" else {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    return Job.identity(
        SimpleNamespace(
            config=ExtractConfig("model", (1,), method=method, fold_system=method == "fast"),
            max_length=8, block_size=8, separator=("bos", 2),
            source=ModelSource(str(folder) if method == "fast" else "hub-name", revision="main"),
            llm_config=SimpleNamespace(to_diff_dict=dict, hidden_size=D_IN, **quantised),
            tokenizer=SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=str), chat_template=""),
            corpus=SimpleNamespace(fingerprint="0"),
            use=SimpleNamespace(
                hook_points=[HOOK], model_dtype="float32", backend="transformers" if method == "fast" else "vllm"
            ),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def complete_manifest(tmp_path_factory):
    """The manifest of a finished extract run, in which only the model's part is played by others."""
    from fastcache.llm.parity import check_parity
    from fastcache.stages.extract.run import finish

    folder = tmp_path_factory.mktemp("manifest")
    identity = job_identity(folder, "fast")
    writer = write_cache(folder / "cache", identity=identity)

    def ones(token_ids):
        return {HOOK: np.ones((len(token_ids), D_IN))}

    backend = SimpleNamespace(residuals=lambda sequences: map(ones, sequences))
    writer.manifest.parity = check_parity(backend, ones, [np.arange(3)], "float32")
    corpus = SimpleNamespace(n_rows=lambda _split: 4, sources_of=lambda _split, rows: {"some-set": len(rows)})
    finish(writer, SimpleNamespace(config=SimpleNamespace(split="train", method="fast"), corpus=corpus))
    return json.loads((folder / "cache" / MANIFEST_FILE).read_text())


def leaves(value, path=""):
    """Field names as the document writes them -> values."""
    names = [
        (r"^(statistics|parity\.hook_points)\.resid_post\.\d+", r"\1.<hook>"),
        (r"^(statistics\.<hook>)\.\w+", r"\1.<group>"),
        (r"^(.*\.norm_quantiles)\..*", r"\1.<q>"),
        (r"^versions\..*", "versions.<package>"),
        (r"^(identity\.model\.quantisation)\..*", r"\1.<setting>"),
        (r"^files\..*", "files.<file>"),
        (r"^failed\..*", "failed.<unit>"),
        (r"^ledger\.skipped\..*", "ledger.skipped.<reason>"),
        (r"^ledger\.first_skipped\..*", "ledger.first_skipped.<reason>"),
        (r"^ledger\.changed\..*", "ledger.changed.<change>"),
        (r"^ledger\.left_out\.[^.]*", "ledger.left_out.<field>"),
        (r"^totals\.tokens_by_role\..*", "totals.tokens_by_role.<role>"),
        (r"^ledger\.truncated_by_source\..*", "ledger.truncated_by_source.<source>"),
        (r"^totals\.tokens_by_type\..*", "totals.tokens_by_type.<flag>"),
    ]
    if not isinstance(value, dict):
        for pattern, name in names:
            path = re.sub(pattern, name, path)
        return {path: value}
    return {k: v for key, child in value.items() for k, v in leaves(child, f"{path}.{key}" if path else key).items()}


def manifest_fields():
    return {name: kind for name, kind, _ in table("field")}


def test_version_is_the_codes():
    assert re.search(r"^# .*, version (\S+)$", DOCUMENT, re.MULTILINE)[1] == schema.FORMAT_VERSION
    assert schema.FORMAT_VERSION in {name: text for name, _, text in table("field")}["format_version"]


def test_constants_are_the_codes():
    modules = (schema, manifest_module, files, statistics)
    code = {name: next(getattr(m, name) for m in modules if hasattr(m, name)) for name, _, _ in table("constant")}
    assert {name: int(value) for name, value, _ in table("constant")} == code
    assert code["UNIT_ROWS"] == UNIT_ROWS


def test_units_have_the_same_rows_wherever_they_are_named():
    numbers = re.findall(r"(?<!\d)(\d+) consecutive rows|`\[(\d+), d_in\]`, row by row|n_tokens / (\d+)\)", DOCUMENT)
    assert len(numbers) >= 4
    assert {int(number) for found in numbers for number in found if number} == {UNIT_ROWS}


def test_shard_rule_is_the_codes():
    rule = re.search(r"`(256 \* min\(.*?)` rows", DOCUMENT)[1]
    for n_tokens, d_in, itemsize in [(1, 4, 2), (300, 896, 2), (10**6, 896, 2), (10**6, 3584, 4), (10**6, 2**20, 4)]:
        names = {"n_tokens": n_tokens, "d_in": d_in, "itemsize": itemsize, "SHARD_BYTES": schema.SHARD_BYTES}
        assert eval(rule, {"ceil": math.ceil}, names) == schema.shard_rows(n_tokens, d_in, itemsize)


def test_token_arrays_are_the_codes():
    assert {name: dtype for name, dtype, *_ in table("array") if not name.startswith("<hook>")} == TOKEN_ARRAYS


def test_stored_dtypes_are_the_codes():
    assert {logical: stored for logical, stored, _ in table("logical dtype")} == STORED_DTYPES


def test_token_types_are_the_codes():
    documented = {name: int(value) for _, name, value, _ in table("bit")}
    assert documented == {flag.name: flag.value for flag in TokenType}
    assert [1 << int(bit) for bit, *_ in table("bit")] == list(documented.values())


def test_turn_roles_are_the_codes():
    assert {name: int(role) for role, name, _ in table("role")} == {role.name: role.value for role in TurnRole}
    assert f"`token_type >> {schema.ROLE_SHIFT}`" in DOCUMENT


def test_splits_are_the_codes():
    def flags(cell):
        return sum(TokenType[name] for name in cell.split(", ")) if cell != "-" else 0

    assert {name: (flags(wanted), flags(unwanted)) for name, wanted, unwanted in table("split")} == SPLITS


def test_groups_are_the_codes():
    listed = re.search(r"The groups are, in this order: (.*?)\. ", DOCUMENT)[1]
    assert tuple(listed.replace("`", "").split(", ")) == statistics.GROUPS


def test_norm_bins_are_the_codes():
    low, per_octave = map(int, re.search(r"counts norms from 2\^\((-\d+) \+ i/(\d+)\)", DOCUMENT).groups())
    assert (low, per_octave) == (statistics.LOWEST_OCTAVE, statistics.BINS_PER_OCTAVE)


def array_table(dtype):
    return table("array") + (table("int8 array") if dtype == "int8" else [])


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_arrays_are_those_of_a_fresh_part(dtype, tmp_path):
    write_cache(tmp_path / "cache", dtype=dtype)
    stored = dict(row[:2] for row in table("logical dtype"))[dtype]
    documented = {
        name.replace("<hook>", HOOK): stored if name == "<hook>" else array_dtype
        for name, array_dtype, *_ in array_table(dtype)
    }
    part = zarr.open_group(tmp_path / "cache" / "parts" / "00000000", mode="r")
    assert documented == {name: str(array.dtype) for name, array in part.arrays()}


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_shapes_are_those_of_a_fresh_part(dtype, tmp_path):
    write_cache(tmp_path / "cache", (300, 20, 30), dtype=dtype)
    sizes = {"n_tokens": 350, "n_instances": 3, "n_documents": 3, "d_in": D_IN, "n_raw": 0}
    documented = {
        name.replace("<hook>", HOOK): tuple(eval(shape, {"ceil": math.ceil}, sizes))
        for name, _, shape, _ in array_table(dtype)
    }
    part = zarr.open_group(tmp_path / "cache" / "parts" / "00000000", mode="r")
    assert documented == {name: array.shape for name, array in part.arrays()}


def test_codecs_are_those_of_a_fresh_part(tmp_path):
    write_cache(tmp_path / "cache")
    listed = re.search(r"## 7\. .*?Its codecs are `(\w+)`[^`]*`(\w+)`", DOCUMENT, re.DOTALL).groups()
    for path in (tmp_path / "cache" / "parts" / "00000000").glob("*/zarr.json"):
        codecs = json.loads(path.read_text())["codecs"]
        if path.parent.name != HOOK:
            assert tuple(codec["name"] for codec in codecs) == listed
            assert codecs[1]["configuration"] == {"level": 3, "checksum": True}
            continue
        (sharding,) = codecs
        settings = sharding["configuration"]
        assert sharding["name"] == "sharding_indexed"
        assert settings["chunk_shape"] == [UNIT_ROWS, D_IN]
        assert [codec["name"] for codec in settings["codecs"]] == ["bytes"]
        assert [codec["name"] for codec in settings["index_codecs"]] == ["bytes", "crc32c"]
        assert settings["index_location"] == "end"


def test_manifest_fields_are_those_of_a_finished_run(complete_manifest, tmp_path):
    other = {"identity": job_identity(tmp_path, "bt-p")}
    given_up = {"failed.<unit>"}  # test_workers.py sees it in a manifest
    of_blocks = {"totals.last_block_tokens"}  # test_extract.py sees it in a manifest
    added = {"parity.hook_points.<hook>.lengths"}  # test_add_layer.py sees it in a manifest
    lossy = {"statistics.<hook>.<group>.quantization_fvu"}  # test_quantize.py sees it in a manifest
    assert (
        set(manifest_fields())
        == set(leaves(complete_manifest)) | set(leaves(other)) | lossy | given_up | of_blocks | added
    )


def test_manifest_types_are_those_of_a_finished_run(complete_manifest):
    for name, value in leaves(complete_manifest).items():
        assert type(value) is TYPES[manifest_fields()[name].split()[0]], name


def test_log_fields_are_those_of_a_fresh_line(tmp_path):
    write_cache(tmp_path / "cache")
    line = json.loads((tmp_path / "cache" / LOG_FILE).read_text()[9:])
    documented = {name: TYPES[kind] for name, kind, _ in table("log field")}
    assert documented == {name: type(value) for name, value in line.items()}


def test_example_manifest_loads(tmp_path):
    (tmp_path / MANIFEST_FILE).write_text(example("Its `manifest.json`", "json"))
    assert load_manifest(LocalStorage(tmp_path)).state == "complete"


def test_example_manifest_has_the_keys_of_a_fresh_one(tmp_path):
    write_cache(tmp_path / "cache")
    assert example_manifest().keys() == json.loads((tmp_path / "cache" / MANIFEST_FILE).read_text()).keys()


def test_example_manifest_has_the_fields_of_a_finished_run(complete_manifest):
    reasons = {"ledger.skipped.<reason>", "ledger.truncated_by_source.<source>", "ledger.first_skipped.<reason>"}
    rendering = {"ledger.changed.<change>", "ledger.left_out.<field>.rows", "ledger.left_out.<field>.characters"}
    chosen = {"identity.tokenizer.fold_system"}
    absent = reasons | rendering | chosen  # nothing is skipped or changed in the example
    newer = {"totals.tokens_by_role.<role>"}
    assert set(leaves(example_manifest())) == set(leaves(complete_manifest)) - absent - newer


def test_example_line_has_the_right_checksum():
    checksum, _, text = example("The only line", "text").partition(" ")
    assert checksum == f"{crc32c(text.encode()):08x}"
    assert text == files.canonical_json(json.loads(text))


def test_example_line_parses_and_agrees_with_the_manifest(tmp_path):
    (tmp_path / LOG_FILE).write_text(example("The only line", "text") + "\n")
    (record,) = Log(LocalStorage(tmp_path)).records
    totals = example_manifest()["totals"]
    n_bytes = sum(size for size, _ in record.files.values())
    found = {"n_tokens": record.n_tokens, "n_instances": record.n_instances, "n_parts": 1, "n_bytes": n_bytes}
    assert found == {name: totals[name] for name in found}


def test_example_listing_has_the_files_of_a_fresh_cache(tmp_path):
    write_cache(tmp_path / "cache")
    fresh = {
        path.relative_to(tmp_path / "cache").as_posix() for path in (tmp_path / "cache").rglob("*") if path.is_file()
    }
    assert set(example_listing()) == fresh


def test_example_listing_has_the_sizes_of_the_line():
    line = json.loads(example("The only line", "text")[9:])
    inside = {name.removeprefix("parts/00000000/"): size for name, size in example_listing().items() if "/0000" in name}
    assert inside == {name: size for name, (size, _) in line["files"].items()}


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_snippet_reads_what_fastcache_reads(dtype, tmp_path, monkeypatch):
    write_cache(tmp_path / "my-cache", dtype=dtype)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example("Reading instance 0", "python"), names)
    expected = fastcache.open_cache(tmp_path / "my-cache").instance(0).residuals(HOOK)
    assert names["residuals"].dtype == np.float32
    assert np.array_equal(names["residuals"], expected)
