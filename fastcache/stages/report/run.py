"""The report stage: collects what runs left behind and fills the page's template."""

from pathlib import Path
from typing import Any

from fastcache import __version__
from fastcache.cache_format.reader import open_cache
from fastcache.cache_format.schema import SPLIT_TITLES
from fastcache.corpus import Corpus
from fastcache.errors import InputError
from fastcache.extras import require_packages
from fastcache.files import read_json, read_json_lines, require_fields, write_bytes_atomic
from fastcache.stages.report.config import ReportConfig


def require_report_packages() -> None:
    """Raise `InputError` where matplotlib or jinja2 is missing."""
    require_packages("The report", "report", "matplotlib", "jinja2")


def write_report(config: ReportConfig) -> None:
    """Write the page; raises `InputError` for a folder that holds no evaluation."""
    require_report_packages()
    import jinja2

    from fastcache.stages.report import plots

    runs = [_run(Path(folder)) for folder in config.sae]
    evaluations = [evaluation for evaluation, _ in runs]
    if len({(e["held_out"]["fingerprint"], e["held_out"]["dialogues"]) for e in evaluations}) > 1:
        raise InputError("These SAEs were evaluated on different held-out dialogues; evaluate them together first.")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        title=config.title,
        note=config.note,
        version=__version__,
        split_titles=SPLIT_TITLES,
        evaluations=evaluations,
        caches=[_cache(Path(path)) for path in config.cache],
        corpora=[(path, Corpus(Path(path)).info) for path in config.corpus],
        settings=_settings(evaluations),
        plots=[
            ("Error by kind of token", "mse", plots.error_by_tokens(evaluations, SPLIT_TITLES)),
            ("Error against sparsity", "l0", plots.error_against_l0(evaluations)),
            ("Training", "curves", plots.training_curves(runs)),
        ],
    )
    path = Path(config.html)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, page.encode())


def _run(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    if not (folder / "evaluation.json").is_file():
        raise InputError(
            f"{folder} has no evaluation.json: run `fastcache evaluate --sae {folder} --cache HELD_OUT_CACHE`."
        )
    metrics = folder / "metrics.jsonl"
    evaluation = read_json(folder / "evaluation.json")
    require_fields(evaluation, {"splits": dict, "training": dict, "held_out": dict}, folder / "evaluation.json")
    return evaluation, read_json_lines(metrics)


def _cache(path: Path) -> dict[str, Any]:
    manifest = open_cache(path).manifest
    parity = [figures["max_abs_difference"] for figures in manifest.parity.get("hook_points", {}).values()]
    return {
        "path": str(path),
        "identity": manifest.identity,
        "totals": manifest.totals,
        "ledger": manifest.ledger,
        "parity": max(parity, default=None),
        "statistics": manifest.statistics,
    }


def _settings(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """Training settings: those that all runs share, and those in which they differ."""
    names = sorted({name for evaluation in evaluations for name in evaluation["training"]})
    values = {name: [evaluation["training"].get(name) for evaluation in evaluations] for name in names}
    shared = {name: column[0] for name, column in values.items() if all(value == column[0] for value in column)}
    return {"shared": shared, "differing": {name: column for name, column in values.items() if name not in shared}}
