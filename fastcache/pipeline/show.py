"""What commands print at the end, and what `inspect` shows: small tables."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import METHODS, SPLIT_TITLES, STORED_DTYPES, UNIT_ROWS, layer_of
from fastcache.corpus import Corpus
from fastcache.files import read_json, read_json_lines, require_fields
from fastcache.progress import Progress
from fastcache.stages.report.tables import figure, main_figures
from fastcache.stages.train.config import ShuffleConfig
from fastcache.stages.train.log import in_words, measured_on
from fastcache.stages.train.order import mixed_order
from fastcache.stages.train.shuffle import compare, enough_buffer, runs_of, verdict

WIDE = 500
"""Characters of a line in a file."""


def _facts(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def show_corpus(console: Console, path: Path, info: dict[str, Any]) -> None:
    """Rows by split, and every dropped row by reason."""
    splits = ", ".join(f"{name} {count:,}" for name, count in info["splits"].items())
    rows = [("kind", info["kind"]), ("rows", splits), ("fingerprint", info["fingerprint"][:16])]
    for source, counts in info["counts"].items():
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in counts["dropped"].items()) or "none"
        rows.append((f"from {source}", f"{counts['kept']:,} of {counts['rows']:,} rows; dropped: {dropped}"))
    console.print(_facts(f"Corpus {path}", rows))


def show_cache(console: Console, cache: Cache) -> None:
    """Model, method, size, tokens by type, ledger, parity and norms."""
    manifest = cache.manifest
    identity, totals, ledger = manifest.identity, manifest.totals, manifest.ledger
    method = {name: value for name, value in identity["method"].items() if name != "name" and value is not None}
    rows = [
        ("state", manifest.state if cache.complete else "not complete: run its extract command again"),
        ("model", f"{identity['model']['name']}, run in {identity['model_dtype']}"),
        ("method", f"{identity['method']['name']} ({', '.join(f'{k} {v}' for k, v in method.items())})"),
        ("corpus", f"{identity['corpus']['fingerprint'][:16]}, split {identity['corpus']['split']}"),
        ("tokens", f"{cache.n_tokens:,} in {cache.n_instances:,} sequences, {len(cache.parts)} parts"),
    ]
    block_size, last = identity["method"].get("block_size"), totals.get("last_block_tokens")
    if block_size and last and last < block_size:
        rows.append(("last block", f"partial: {last:,} of {block_size:,} tokens"))
    if totals:
        types = ", ".join(f"{name.lower().replace('_', ' ')} {n:,}" for name, n in totals["tokens_by_type"].items())
        skipped = ", ".join(f"{reason} {count:,}" for reason, count in ledger["skipped"].items()) or "0"
        by_source = ", ".join(f"{source} {n:,}" for source, n in ledger["truncated_by_source"].items())
        truncated = f"truncated {ledger['truncated']:,}" + (f" ({by_source})" if by_source else "")
        failed = f", failed {ledger['failed']:,}" if ledger.get("failed") else ""
        counts = f"stored {ledger['stored']:,}, {truncated}, skipped {skipped}{failed}"
        rows += [
            ("by type", types),
            ("size", f"{totals['n_bytes'] / 1e6:,.1f} MB, {manifest.dtype}, d_in {manifest.d_in}"),
            ("ledger", f"{ledger['rows']:,} rows: {counts}, not reached {ledger['not reached']:,}"),
        ]
    if manifest.failed:
        units = "; ".join(f"{unit} ({reason})" for unit, reason in manifest.failed.items())
        rows.append(("failed units", f"{units}. Run the extract command again to try them."))
    for hook, parity in manifest.parity.get("hook_points", {}).items():
        difference = f"max abs difference {parity['max_abs_difference']:.1e}, relative {parity['max_relative_l2']:.1e}"
        rows.append((f"parity {hook}", f"{difference}, {len(manifest.parity['lengths'])} sequences"))
    console.print(_facts(f"Cache {cache.path}", rows))
    for hook, groups in manifest.statistics.items():
        console.print(_norms(hook, groups))


def _norms(hook: str, groups: dict[str, Any]) -> Table:
    table = Table(title=f"\nNorms at {hook}", title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("tokens", no_wrap=True)
    for name in ("count", "mean", "1 %", "median", "99 %", "largest dimensions"):
        table.add_column(name, justify="right", no_wrap=True)
    for group, figures in groups.items():
        if figures["count"]:
            quantiles = [figure(figures["norm_quantiles"][q], 2) for q in ("0.01", "0.5", "0.99")]
            top = ", ".join(str(dimension) for dimension, _ in figures["top_dimensions"][:3])
            count, mean = f"{figures['count']:,}", figure(figures["norm_mean"], 2)
            table.add_row(SPLIT_TITLES.get(group, group), count, mean, *quantiles, top)
    return table


def show_shuffle(
    console: Console, cache: Cache, config: ShuffleConfig, corpus: Corpus | None, progress: Progress
) -> None:
    """Training's order beside a global permutation and sequential reading, and what to do."""
    order = mixed_order(cache, config.buffer_tokens, config.batch_size, config.seed)
    instances, groupings = runs_of(cache, corpus)
    comparison = compare(order, instances, groupings, config.batch_size, config.seed, progress)
    gigabytes = order.capacity * cache.d_in * np.dtype(STORED_DTYPES[cache.manifest.dtype]).itemsize / 1e9
    rows = [
        ("cache", f"{cache.n_tokens:,} tokens in {cache.n_instances:,} sequences"),
        (
            "training",
            f"units of {UNIT_ROWS} rows, buffer of {order.capacity:,} ({gigabytes:,.1f} GB), seed {config.seed}",
        ),
        ("measured", f"{comparison.n_measured} batches of {config.batch_size:,} tokens, spread over an epoch"),
    ]
    console.print(_facts(f"Shuffle of {cache.path}", rows))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("\norder", no_wrap=True)
    for header in ("distinct\ninstances", "of\nglobal", "variance\ninflation"):
        table.add_column(header, justify="right", no_wrap=True)
    for name in comparison.mixed.drift:
        table.add_column(f"drift by\n{name}", justify="right", no_wrap=True)
    orders = {
        "training": comparison.mixed,
        "global permutation": comparison.permutation,
        "sequential": comparison.sequential,
    }
    for name, quality in orders.items():
        share = quality.distinct / comparison.permutation.distinct
        drifts = [figure(value) for value in quality.drift.values()]
        table.add_row(name, figure(quality.distinct, 0), figure(share, 2), figure(quality.inflation, 2), *drifts)
    console.print(table)
    enough = None if comparison.good else enough_buffer(cache, config, instances, progress)
    progress.say(verdict(comparison, enough))


def show_sae(console: Console, path: Path) -> None:
    """What an SAE was trained on, how, and where its training stands."""
    run = read_json(path / "run.json")
    require_fields(run, {"command": str, "settings": dict}, path / "run.json")
    if run["command"] != "train":
        console.print(Text(f"Unfinished output of `fastcache {run['command']}`: run that command again.\n{path}"))
        return
    given = {**run["settings"], **run["settings"].get("resolved", {})}
    hidden = ("cache_fingerprint", "resolved")
    settings = {key: value for key, value in given.items() if value not in (None, []) and key not in hidden}
    finished = (path / "sae.json").exists()
    rows = [("state", "trained" if finished else "not finished: run its train command again")]
    if finished:
        info = read_json(path / "sae.json")
        fields = {"architecture": str, "d_in": int, "d_sae": int, "model": dict, "method": dict, "training": dict}
        require_fields(info, {**fields, "hook_point": str}, path / "sae.json")
        rows += [
            ("architecture", f"{info['architecture']}, d_in {info['d_in']}, d_sae {info['d_sae']}"),
            ("of", f"{info['model']['name']} {info['hook_point']}, method {info['method']['name']}"),
            ("trained", f"{info['training']['tokens']:,} tokens in {info['training']['steps']:,} steps"),
        ]
    rows.append(("settings", ", ".join(f"{key}={value}" for key, value in settings.items())))
    if lines := read_json_lines(path / "metrics.jsonl"):
        last = lines[-1]
        rows.append((f"step {last['step']:,}", f"{in_words(last)} (on {measured_on(last)})"))
    console.print(_facts(f"SAE {path}", rows))


def show_evaluations(console: Console, evaluations: list[dict[str, Any]]) -> None:
    """One line an SAE; MSE as in the paper's tables, log2 of the mean over dialogues."""
    held_out = evaluations[0]["held_out"]
    title = f"{held_out['dialogues']:,} dialogues, split {held_out['split']}; log2 MSE (mean over dialogues) by kind of token"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    shown = sorted(evaluations, key=_rank)
    named = len({_place(result) for result in shown}) < len(shown)
    for name in ("layer", "arch", "data", *(("SAE",) if named else ())):
        table.add_column(name, no_wrap=True)
    headers = ("all", "special", "special,\nnot first", "content")
    has_model = any("with_model" in result for result in evaluations)
    for name in ("L0", "FVU", "dead", *headers, *(("LM loss,\nadded", "LM loss,\nrecovered") if has_model else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for result in shown:
        names = [Path(result["sae"]).name] if named else []
        table.add_row(*map(str, _place(result)), *names, *main_figures(result, has_model))
    if console.is_terminal:
        console.print(table)
    else:  # in a file or a pipe, all of it
        whole = console.measure(table, options=console.options.update(max_width=WIDE)).maximum
        Console(file=console.file, width=max(console.width, whole)).print(table)


def _place(result: dict[str, Any]) -> tuple[int, str, str]:
    return layer_of(result["hook_point"]), result["architecture"], result["trained_on"]


def _rank(result: dict[str, Any]) -> tuple[int, str, int]:
    layer, architecture, method = _place(result)
    return layer, architecture, METHODS.index(method)  # in the paper's order
