"""Changes one thing at a time in a module, runs the tests that should notice, and prints the changes that none noticed.

    python tools/mutate.py fastcache/files.py                     # every change, with the tests of TESTS below
    python tools/mutate.py fastcache/cache_format/arrays.py --sample 20 --seed 1
    python tools/mutate.py fastcache/files.py --only remove --match 'fsync|flush'
    python tools/mutate.py fastcache/svg.py --tests tests/test_report.py --list

Works in a copy of the tree. Changes are: a comparison or its bounds, `and` and `or`, plus and minus, a number by one, a
condition negated, `min` and `max`, and a call whose value isn't used left out. Exits with 1 if a change survived.
"""

import argparse
import ast
import copy
import fnmatch
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "dist", "build", "fastcache-runs", "*cache__", ".*_cache")
TESTS = {
    "fastcache/disk.py": ["test_commits", "test_full_disks", "test_faults"],
    "fastcache/files.py": ["test_commits", "test_full_disks", "test_faults", "test_attacks"],
    "fastcache/rundir.py": ["test_commits", "test_full_disks", "test_faults", "test_resume"],
    "fastcache/cache_format/statistics.py": ["test_cache_format", "test_verify", "test_extract", "test_golden"],
    "fastcache/cache_format/quantize.py": ["test_quantize", "test_golden"],
    "fastcache/cache_format/layers.py": ["test_add_layer"],
    "fastcache/cache_format/object_storage.py": ["test_object_storage"],
    "fastcache/cache_format/verify*.py": ["test_verify", "test_faults", "test_attacks", "test_quantize"],
    "fastcache/cache_format/*.py": ["test_cache_format", "test_commits", "test_faults", "test_verify", "test_attacks"],
    "fastcache/stages/train/stream.py": ["test_train", "test_thresholds"],
    "fastcache/stages/train/order.py": ["test_train", "test_shuffle"],
    "fastcache/stages/train/shuffle.py": ["test_shuffle"],
    "fastcache/stages/train/selection.py": ["test_selection", "test_train"],
    "fastcache/stages/train/sweep*.py": ["test_sweep"],
    "fastcache/stages/train/*.py": ["test_train", "test_recipes", "test_resume", "test_sweep", "test_cli"],
    "fastcache/stages/train/together.py": ["test_settings", "test_recipes"],
    "fastcache/stages/evaluate/earlier.py": ["test_earlier_evaluations"],
    "fastcache/sae/metrics.py": ["test_metrics", "test_spread"],
    "fastcache/sae/spread.py": ["test_spread"],
    "fastcache/sae/bootstrap.py": ["test_spread", "test_metrics"],
    "fastcache/sae/schedules.py": ["test_schedules"],
    "fastcache/sae/info.py": ["test_sae_folders"],
    "fastcache/sae/storage.py": ["test_sae_folders", "test_sae"],
    "fastcache/sae/architectures/batchtopk.py": ["test_thresholds", "test_gradients"],
    "fastcache/sae/fast/*.py": ["test_products", "test_fast_steps", "test_fast_training", "test_gradients"],
    "fastcache/sae/*.py": ["test_sae", "test_gradients", "test_metrics", "test_train"],
}
"""The tests of a module, by the first pattern that fits."""

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult}
EXTREMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
PRELOADED = "numpy torch pyarrow.parquet safetensors.torch zarr numba click rich"


class Mutant(NamedTuple):
    """One change: where, of which kind, in words, and what makes it in a copy of the tree."""

    line: int
    kind: str
    text: str
    apply: Callable[[ast.AST], None]


def _changes(node: ast.AST) -> Iterator[tuple[str, str, Callable[[ast.AST], None]]]:
    """Kind, words and action of each change of one node; the action takes the node's copy."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        other = COMPARISONS[type(node.ops[0])]
        yield "compare", f"{type(node.ops[0]).__name__} -> {other.__name__}", lambda n: n.ops.__setitem__(0, other())
    if isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield "bool", f"{type(node.op).__name__} -> {other.__name__}", lambda n: setattr(n, "op", other())
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        other = ARITHMETIC[type(node.op)]
        yield "arithmetic", f"{type(node.op).__name__} -> {other.__name__}", lambda n: setattr(n, "op", other())
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield "number", f"{node.value} -> {node.value + 1}", lambda n: setattr(n, "value", n.value + 1)
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield "negate", "condition negated", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Name) and node.id in EXTREMES:
        yield "extreme", f"{node.id} -> {EXTREMES[node.id]}", lambda n: setattr(n, "id", EXTREMES[n.id])
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "remove", "call left out", lambda n: setattr(n, "value", ast.Constant(None))


def _nodes(tree: ast.AST) -> list[ast.AST]:
    """All nodes but those of annotations, decorators and messages, in a fixed order."""
    nodes: list[ast.AST] = []

    def visit(node: ast.AST) -> None:
        nodes.append(node)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "exc", "msg") or isinstance(node, ast.JoinedStr):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child)

    visit(tree)
    return nodes


def mutants(source: str) -> list[Mutant]:
    """All changes of a module's source."""
    tree = ast.parse(source)
    return [
        Mutant(
            getattr(node, "lineno", 0), kind, f"{ast.unparse(node).splitlines()[0][:90]}: {text}", _at(place, action)
        )
        for place, node in enumerate(_nodes(tree))
        for kind, text, action in _changes(node)
    ]


def _at(place: int, action: Callable[[ast.AST], None]) -> Callable[[ast.AST], None]:
    return lambda tree: action(_nodes(tree)[place])


def mutated(source: str, mutant: Mutant) -> str:
    """The module with the change."""
    tree = copy.deepcopy(ast.parse(source))
    mutant.apply(tree)
    return ast.unparse(ast.fix_missing_locations(tree))


def run_tests(tree: Path, tests: list[str], seconds: float) -> str:
    """`passed`, `failed` or `too long`: the tests in a process that begins with all packages loaded."""
    child = os.fork()
    if not child:
        os.setsid()
        log = os.open(tree / "mutate.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 70
        try:
            os.chdir(tree)
            sys.path[:0] = [str(tree), str(tree / "tests")]
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-m", "not long"]
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is loaded already
            code = pytest.main([*options, f"--basetemp={tree}/temporary", *tests])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(code))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            os.killpg(child, signal.SIGKILL) if _group_lives(child) else None
            code = os.waitstatus_to_exitcode(status)
            if code in (4, 5):
                raise SystemExit(f"pytest found no tests to run; see {tree}/mutate.log")
            return "failed" if code else "passed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "too long"


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def tests_of(module: str) -> list[str]:
    """The files of tests that should notice a change of a module."""
    for pattern, names in TESTS.items():
        if fnmatch.fnmatch(module, pattern):
            return [f"tests/{name}.py" for name in names if (ROOT / f"tests/{name}.py").exists()]
    raise SystemExit(f"No tests are known for {module}; name them with --tests.")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", help="files below fastcache/")
    parser.add_argument("--tests", nargs="+", help="files of tests, instead of those in TESTS")
    parser.add_argument("--only", help="kinds of changes, with commas between: remove,compare,...")
    parser.add_argument("--match", help="regular expression that a change's line must match")
    parser.add_argument("--sample", type=int, help="draw so many changes of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the changes and run nothing")
    options = parser.parse_args()
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        tree = Path(name) / "tree"
        if not options.list:
            shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
            os.environ.setdefault("FASTCACHE_TESTDATA", str(ROOT / "../shared/testdata"))
            os.environ["PYTHONPATH"] = f"{tree}{os.pathsep}{tree}/tests"
            os.environ["OMP_NUM_THREADS"] = "1"
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a mutant may be as old and as long as the one before
            sys.dont_write_bytecode = True
            for package in PRELOADED.split():
                __import__(package)
        for module in options.modules:
            survivors += _mutate_module(module, tree, options)
    return 1 if survivors else 0


def _mutate_module(module: str, tree: Path, options: argparse.Namespace) -> int:
    source = (ROOT / module).read_text()
    chosen = [
        mutant
        for mutant in mutants(source)
        if (not options.only or mutant.kind in options.only.split(","))
        and (not options.match or re.search(options.match, source.splitlines()[mutant.line - 1]))
    ]
    if options.sample and len(chosen) > options.sample:
        chosen = sorted(random.Random(options.seed).sample(chosen, options.sample), key=lambda mutant: mutant.line)
    if options.list:
        for mutant in chosen:
            print(f"{module}:{mutant.line}: {mutant.kind}: {mutant.text}")
        return 0
    tests = options.tests or tests_of(module)
    begun = time.monotonic()
    if run_tests(tree, tests, 3600) != "passed":
        raise SystemExit(f"The tests fail without any change:\n{(tree / 'mutate.log').read_text()[-2000:]}")
    seconds = 3 * (time.monotonic() - begun) + 30
    survivors = []
    for mutant in chosen:
        (tree / module).write_text(mutated(source, mutant))
        if run_tests(tree, tests, seconds) == "passed":
            survivors.append(mutant)
            print(f"  survived  {module}:{mutant.line}: {mutant.kind}: {mutant.text}", flush=True)
    (tree / module).write_text(source)
    print(
        f"{module}: {len(chosen) - len(survivors)} of {len(chosen)} changes noticed by {', '.join(tests)}", flush=True
    )
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main())
