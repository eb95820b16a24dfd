"""What `inspect` shows of corpora and caches, and what `prepare`, `extract` and `evaluate` show at their end."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fastcache import figures
from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import METHODS, SPLIT_TITLES, STORED_DTYPES, UNIT_ROWS, layer_of
from fastcache.cache_format.statistics import Moments
from fastcache.corpus import Corpus
from fastcache.errors import FastcacheError
from fastcache.origins import corpus_sources, model_title
from fastcache.pipeline.console import print_text, printable
from fastcache.pipeline.tables import FullTable, figure_columns, name_columns, print_facts, print_table
from fastcache.progress import Progress
from fastcache.stages.extract.ledger import rendering_notes
from fastcache.stages.train.config import ShuffleConfig
from fastcache.stages.train.order import mixed_order
from fastcache.stages.train.shuffle import compare, enough_buffer, runs_of, verdict

MOST_FIELDS = 8
"""Fields of a source that are named on the screen; `corpus.json` and the page have all."""

FAR = 5
"""A norm of so many times the median is far from it: a massive activation."""


def look_up(mapping: Any, *keys: str) -> Any:
    """The value under keys of nested mappings, None where one is missing: older versions wrote fewer of them."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, dict) else None
    return mapping


def counted(counts: Any) -> str:
    """Counts by name as `demo 2, other 1`; empty where there are none."""
    return ", ".join(f"{name} {figures.count(n)}" for name, n in counts.items()) if isinstance(counts, dict) else ""


def show_corpus(console: Console, path: Path, info: dict[str, Any]) -> None:
    """Rows by split, and every dropped row by reason."""
    rows = [
        ("kind", str(info["kind"])),
        ("rows", counted(info["splits"])),
        ("fingerprint", str(info["fingerprint"])[:16]),
    ]
    for source, counts in info["counts"].items():
        dropped = counted(counts["dropped"]) or "none"
        rows.append((f"from {source}", f"{counts['kept']:,} of {counts['rows']:,} rows; dropped: {dropped}"))
        rows += field_facts(info.get("fields", {}).get(source, {}))
    print_facts(console, f"Corpus {path}", rows)


def field_facts(fields: Any) -> list[tuple[str, str]]:
    """What a source's rows had beside their dialogues: what was kept, and what was not, the most frequent first."""
    facts = []
    for kind, title in (("kept", "fields kept"), ("not_kept", "not kept")):
        counts = sorted((look_up(fields, kind) or {}).items(), key=lambda entry: (-entry[1], entry[0]))
        more = f" and {len(counts) - MOST_FIELDS} more (corpus.json)" if len(counts) > MOST_FIELDS else ""
        if counts:
            named = {printable(name).plain: count for name, count in counts[:MOST_FIELDS]}
            facts.append((f"  {title}", counted(named) + more))
    return facts


def show_cache(console: Console, cache: Cache) -> None:
    """Model, method, size, tokens by type, ledger, parity and norms."""
    manifest = cache.manifest
    identity, totals = manifest.identity, manifest.totals
    method = look_up(identity, "method") or {}
    details = ", ".join(f"{name} {value}" for name, value in method.items() if name != "name" and value is not None)
    rows = [
        ("state", manifest.state if cache.complete else "not complete: run its extract command again"),
        ("model", f"{_model(identity)}, run in {look_up(identity, 'model_dtype') or 'unknown dtype'}"),
        ("method", f"{look_up(method, 'name') or 'unknown'}" + (f" ({details})" if details else "")),
        ("corpus", f"{_corpus(cache)}, split {look_up(identity, 'corpus', 'split') or 'unknown'}"),
        ("tokens", f"{cache.n_tokens:,} in {cache.n_instances:,} sequences, {len(cache.parts)} parts"),
    ]
    block_size, last = look_up(method, "block_size"), totals.get("last_block_tokens")
    if block_size and last and last < block_size:
        rows.append(("last block", f"partial: {last:,} of {block_size:,} tokens"))
    if types := look_up(totals, "tokens_by_type"):
        rows.append(("by type", counted({name.lower().replace("_", " "): n for name, n in types.items()})))
    if roles := look_up(totals, "tokens_by_role"):
        rows.append(("by turn", counted({name.lower(): n for name, n in roles.items()})))
    rows.append(("size", f"{figures.size(totals.get('n_bytes'))}, {manifest.dtype}, d_in {manifest.d_in}"))
    if manifest.ledger:
        rows.append(("ledger", _ledger(manifest.ledger)))
        rows += [("", note) for note in rendering_notes(manifest.ledger)]
    if manifest.failed:
        units = "; ".join(f"{unit} ({reason})" for unit, reason in manifest.failed.items())
        rows.append(("failed units", f"{units}. Run the extract command again to try them."))
    rows += _parity(manifest.parity)
    if cache.complete and (unchecked := manifest.unchecked()):
        rows.append(("parity", unchecked))
    print_facts(console, f"Cache {cache.path}", rows)
    for hook, groups in manifest.statistics.items():
        _show_norms(console, cache, hook, groups)


def _model(identity: dict[str, Any]) -> str:
    """The model's name, and its folder where that is another thing."""
    name = str(look_up(identity, "model", "name") or "unknown")
    title = model_title(name)
    return title if title == name else f"{title} ({name})"


def _corpus(cache: Cache) -> str:
    """The data sets of the corpus where they are known, and its fingerprint."""
    fingerprint = str(look_up(cache.manifest.identity, "corpus", "fingerprint") or "")
    sources = ", ".join(corpus_sources(cache.path, fingerprint))
    return f"{sources} ({fingerprint[:16]})" if sources else fingerprint[:16] or figures.NONE


def _ledger(ledger: dict[str, Any]) -> str:
    """What became of the corpus's rows; of older caches what they counted."""
    by_source = counted(ledger.get("truncated_by_source"))
    parts = [
        f"stored {figures.count(ledger.get('stored'))}",
        f"truncated {figures.count(ledger.get('truncated'))}" + (f" ({by_source})" if by_source else ""),
        f"skipped {counted(ledger.get('skipped')) or '0'}",
    ]
    if ledger.get("failed"):
        parts.append(f"failed {figures.count(ledger['failed'])}")
    parts.append(f"not reached {figures.count(ledger.get('not reached'))}")
    return f"{figures.count(ledger.get('rows'))} rows: {', '.join(parts)}"


def _parity(parity: dict[str, Any]) -> list[tuple[str, str]]:
    n_checked = len(parity.get("lengths") or [])
    sequences = f", {n_checked} sequences" if n_checked else ""
    rows = []
    for hook, differences in (parity.get("hook_points") or {}).items():
        largest, relative = (look_up(differences, name) for name in ("max_abs_difference", "max_relative_l2"))
        text = f"max abs difference {figures.figure(largest, 2)}, relative {figures.figure(relative, 2)}"
        rows.append((f"parity {hook}", text + sequences))
    return rows


def _show_norms(console: Console, cache: Cache, hook: str, groups: dict[str, Any]) -> None:
    moments = None
    with suppress(FastcacheError, OSError):
        moments = cache.statistics(hook)
    print_table(console, _norms(hook, groups, moments))
    print_text(
        console, "Norms are counted in bins 4 % wide, so quantiles and maxima are known to 4 %; means are exact."
    )
    counts = {name: look_up(group, "count") for name, group in groups.items()}
    if counts.get("special") and counts["special"] == counts.get("special_not_first"):
        print_text(
            console,
            f'"{SPLIT_TITLES["special"]}" equals "{SPLIT_TITLES["special_not_first"]}": the first token of a sequence is no '
            "special token or role word of this model's template.",
        )


def _norms(hook: str, groups: dict[str, Any], moments: Moments | None = None) -> FullTable:
    """Norms by group of tokens: by the parts' counts, or without them what the manifest says, which has no maximum."""
    columns = [
        *name_columns("tokens"),
        *figure_columns("count", "mean", "1 %", "median", "99 %"),
        *(figure_columns("maximum", f"above {FAR}x\nmedian") if moments else ()),
        *figure_columns("largest\ndimensions"),
    ]
    known = {name: group for name, group in groups.items() if look_up(group, "count")}
    spreads = {name: spread for name in known if moments and (spread := moments.norm_spread(name, FAR))}
    if "all" in spreads:  # has the rows of the other groups, which may be known a little better
        spreads["all"] = spreads["all"]._replace(maximum=max(spread.maximum for spread in spreads.values()))
    rows = []
    for name, group in known.items():
        if spread := spreads.get(name):
            measured = [*map(figures.figure, spread[:4]), figures.count(spread.n_far)]
        else:
            measured = [figures.figure(look_up(group, "norm_quantiles", q), 2) for q in ("0.01", "0.5", "0.99")]
            measured += [figures.NONE] * 2 if moments else []
        top = ", ".join(str(dimension) for dimension, _ in (group.get("top_dimensions") or [])[:3])
        title, mean = SPLIT_TITLES.get(name, name), figures.figure(group.get("norm_mean"))
        rows.append([title, figures.count(group["count"]), mean, *measured, top])
    return FullTable(columns, rows, f"\nNorms at {hook}")


def show_shuffle(
    console: Console, cache: Cache, config: ShuffleConfig, corpus: Corpus | None, progress: Progress
) -> None:
    """Training's order beside a global permutation and sequential reading, and what to do."""
    order = mixed_order(cache, config.buffer_tokens, config.batch_size, config.seed)
    instances, groupings = runs_of(cache, corpus)
    comparison = compare(order, instances, groupings, config.batch_size, config.seed, progress)
    n_bytes = order.capacity * cache.d_in * np.dtype(STORED_DTYPES[cache.manifest.dtype]).itemsize
    buffer = f"buffer of {order.capacity:,} ({figures.size(n_bytes)})"
    measured = f"{comparison.n_measured} batches of {config.batch_size:,} tokens, spread over an epoch"
    print_facts(
        console,
        f"Shuffle of {cache.path}",
        [
            ("cache", f"{cache.n_tokens:,} tokens in {cache.n_instances:,} sequences"),
            ("training", f"units of {UNIT_ROWS} rows, {buffer}, seed {config.seed}"),
            ("measured", measured),
        ],
    )
    orders = {
        "training": comparison.mixed,
        "global permutation": comparison.permutation,
        "sequential": comparison.sequential,
    }
    drifts = [f"drift by\n{name}" for name in comparison.mixed.drift]
    columns = [
        *name_columns("order"),
        *figure_columns("distinct\ninstances", "of\nglobal", "variance\ninflation", *drifts),
    ]
    rows = [
        [
            name,
            *map(
                figures.figure,
                (quality.distinct, quality.distinct / comparison.permutation.distinct, quality.inflation),
            ),
            *map(figures.figure, quality.drift.values()),
        ]
        for name, quality in orders.items()
    ]
    print_table(console, FullTable(columns, rows))
    enough = None if comparison.good else enough_buffer(cache, config, instances, progress)
    progress.say(verdict(comparison, enough))


def show_evaluations(console: Console, evaluations: Sequence[dict[str, Any]]) -> None:
    """One line an SAE; MSE as in the paper's tables, log2 of the mean over dialogues."""
    held_out = evaluations[0]["held_out"]
    shown = sorted(evaluations, key=_rank)
    named = len({_place(result) for result in shown}) < len(shown)
    has_model = any("with_model" in result for result in evaluations)
    columns = [
        *name_columns("layer", "arch", "data", *(("SAE",) if named else ())),
        *figure_columns("L0", "FVU", "FVU,\ncontent", "dead"),
        *figure_columns(*(f"MSE,\n{title.replace(', ', f',{chr(10)}')}" for title in SPLIT_TITLES.values())),
        *(figure_columns("LM loss,\nadded", "LM loss,\nrecovered") if has_model else ()),
    ]
    rows = []
    for result in shown:
        names = [Path(result["sae"]).name] if named else []
        rows.append([*map(str, _place(result)), *names, *_figures(result, has_model)])
    title = f"{held_out['dialogues']:,} dialogues, split {held_out['split']}. MSE is log2 of its mean over dialogues."
    print_table(console, FullTable(columns, rows, title))


def _figures(result: dict[str, Any], has_model: bool) -> list[str]:
    splits = result["splits"]
    spliced = look_up(result, "with_model", "splits", "all")
    return [
        figures.figure(splits["all"].get("l0")),
        figures.figure(splits["all"].get("fvu")),
        figures.figure(look_up(splits, "content", "fvu")),
        figures.percent(result["dead_share"]),
        *(figures.logarithm(look_up(splits, split, "log2_mse")) for split in SPLIT_TITLES),
        *(figures.figure(look_up(spliced, key)) for key in ("delta_loss", "loss_recovered") if has_model),
    ]


def _place(result: dict[str, Any]) -> tuple[int, str, str]:
    return layer_of(result["hook_point"]), result["architecture"], result["trained_on"]


def _rank(result: dict[str, Any]) -> tuple[int, str, int]:
    layer, architecture, method = _place(result)
    return layer, architecture, METHODS.index(method) if method in METHODS else len(METHODS)  # in the paper's order
