"""A page of many latents whose data are loaded as they are looked at, beside the same page with all data in it.

    python benchmarks/bench_dashboard.py
    python benchmarks/bench_dashboard.py --latents 65_536 --ours

Both show the same latents, made up (15 contexts of 33 tokens each), in a headless Chromium, from files: seconds until the list
is there, and until a latent that was not looked at before is shown. The page with all data is ours, every data file put into
it. With `--ours` it is left out: no browser should be asked to take half a gigabyte of script. Sorting and searching are the
same code in both.
"""

import argparse
import random
import re
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from playwright.sync_api import Page, sync_playwright

from fastcache.cache_format.schema import TOKEN_SETS
from fastcache.files import write_json_atomic
from fastcache.progress import Silent
from fastcache.stages.interpret.collect import BINS
from fastcache.stages.interpret.dashboard.build import build
from fastcache.stages.interpret.results import ABOUT_FILE, CONTEXTS_FILE, LATENTS_FILE, WINDOWS_FILE
from fastcache.stages.interpret.tables import CONTEXT_SCHEMA, WINDOW_SCHEMA

CONTEXTS, TOKENS = 15, 33
TOGETHER = 1024
WORDS = [f" word{n}" for n in range(500)]


def make_results(folder: Path, n_latents: int) -> None:
    """As `fastcache interpret` leaves them."""
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(folder / CONTEXTS_FILE, CONTEXT_SCHEMA, compression="zstd") as writer:
        for first in range(0, n_latents, TOGETHER):
            rows = [row for n in range(first, min(first + TOGETHER, n_latents)) for row in contexts(n, rng)]
            writer.write_table(pa.Table.from_pylist(rows, CONTEXT_SCHEMA))
    pq.write_table(pa.Table.from_pylist([], WINDOW_SCHEMA), folder / WINDOWS_FILE)
    density = rng.uniform(0, 0.1, n_latents)
    ranked = [{"index": n, "value": 0.5} for n in range(5)]
    tokens = [{"token": WORDS[n], "value": 0.5} for n in range(10)]
    columns = {
        "latent": np.arange(n_latents, dtype=np.int32),
        "n_active": (density * 1e6).astype(np.int64),
        "max_activation": rng.uniform(1, 20, n_latents).astype(np.float32),
        "mean_activation": rng.uniform(0, 1, n_latents),
        **{f"density_{name}": density for name in TOKEN_SETS},
        "histogram": rng.integers(0, 1000, (n_latents, BINS)).tolist(),
        "neighbours": [ranked] * n_latents,
        "promoted": [tokens] * n_latents,
        "suppressed": [tokens] * n_latents,
    }
    pq.write_table(pa.table(columns), folder / LATENTS_FILE)
    sae = {
        "name": "made-up",
        "model": "none",
        "hook_point": "resid_post.0",
        "architecture": "none",
        "trained_on": "none",
    }
    about = {"sae": {**sae, "d_sae": n_latents}, "tokens": dict.fromkeys(TOKEN_SETS, 10**6), "split": "none"}
    write_json_atomic(folder / ABOUT_FILE, {**about, "dialogues": 10_000, "top": 10, "window": 16, "seed": 0})


def contexts(latent: int, rng: np.random.Generator) -> list[dict]:
    """Those of a latent."""
    words = rng.integers(0, len(WORDS), (CONTEXTS, TOKENS))
    return [
        {
            "latent": latent, "kind": "top" if n < 10 else "drawn", "rank": n % 10, "value": 10.0 - n / 2, "dialogue": n,
            "corpus_row": n, "position": 16, "start": 0, "text": "", "tokens": [WORDS[word] for word in words[n]],
            "token_types": [72] * TOKENS, "activations": [0.0] * 15 + [1.0, 10.0 - n / 2, 0.5] + [0.0] * 15,
        }
        for n in range(CONTEXTS)
    ]  # fmt: skip


def with_all_data(page: Path, out: Path) -> Path:
    """The page with every data file in it."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    files = [page.parent / "data" / "index.js", *sorted((page.parent / "data").glob("latents-*.js"))]
    scripts = "".join(f"<script>{file.read_text()}</script>" for file in files)
    text = text.replace("FILES_KEPT = 48", "FILES_KEPT = 1e9")
    out.write_text(text.replace('<script src="data/index.js"></script>', scripts))
    return out


def seconds_to_list(page: Page, path: Path) -> float:
    """Until the first rows are there."""
    start = time.perf_counter()
    page.goto(path.as_uri(), timeout=600_000)
    page.wait_for_selector("#rows .row", timeout=600_000)
    return time.perf_counter() - start


def seconds_to_open(page: Page, latent: int) -> float:
    """Until a latent that hasn't been looked at is shown."""
    page.fill("#search", f"#{latent}")
    start = time.perf_counter()
    page.keyboard.press("Enter")
    page.wait_for_selector(f"#latent h2:has-text('#{latent}')")
    return time.perf_counter() - start


def seconds_of(page: Page, script: str) -> float:
    """Of an action in the page, until it is drawn."""
    return page.evaluate(
        f"() => {{ const start = performance.now(); {script}; return (performance.now() - start) / 1000; }}"
    )


def main() -> None:
    """Print sizes, times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", action="store_true", help="leave out the page with all data")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        make_results(Path(folder), options.latents)
        start = time.perf_counter()
        ours = build(Path(folder), None, Path(folder) / "dashboard", Silent())
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in ours.parent.rglob("*.*"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{options.latents:,} latents: built in {seconds:.0f} s, {size / 1e6:,.0f} MB, peak memory {peak:.2f} GiB"
        )
        pages = {"ours": ours} | ({} if options.ours else {"all data": with_all_data(ours, Path(folder) / "all.html")})
        found: dict[str, dict[str, list[float]]] = {name: {} for name in pages}
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        for _ in range(options.rounds):
            for name, path in pages.items():
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = browser.new_page()
                figures = {"list is there": seconds_to_list(page, path)}
                figures["a latent is shown"] = seconds_to_open(page, random.randrange(options.latents))
                page.fill("#search", "")
                figures["sorted"] = seconds_of(page, "at('sort').value = 'max_activation'; refresh()")
                figures["searched"] = seconds_of(page, "at('search').value = 'word49'; refresh()")
                for what, value in figures.items():
                    found[name].setdefault(what, []).append(value)
                browser.close()
        for what in found["ours"]:
            medians = {name: statistics.median(values[what]) for name, values in found.items()}
            ratio = f"   ratio {medians['all data'] / medians['ours']:.1f}" if "all data" in medians else ""
            print(f"  {what:18}" + "".join(f"{name} {value:8.3f} s   " for name, value in medians.items()) + ratio)


if __name__ == "__main__":
    main()
