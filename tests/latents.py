"""Small outputs of `fastcache interpret`, made up: what the judge and the dashboard read."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastcache.cache_format.schema import TOKEN_SETS, TokenType, TurnRole
from fastcache.files import read_json, write_json_atomic
from fastcache.stages.interpret.collect import BINS
from fastcache.stages.interpret.judge.tables import SCHEMA
from fastcache.stages.interpret.results import ABOUT_FILE, CONTEXTS_FILE, LATENTS_FILE, WINDOWS_FILE
from fastcache.stages.interpret.tables import CONTEXT_SCHEMA, WINDOW_SCHEMA

CONTENT = TokenType.CONTENT | TurnRole.USER << 5
SPECIAL = TokenType.SPECIAL | TurnRole.USER << 5


def context(dialogue, words):
    """Tokens around the middle one, the first of them special."""
    tokens = ["<|im_start|>", *words]
    types = [int(SPECIAL), *[int(CONTENT)] * len(words)]
    shown = {"dialogue": dialogue, "corpus_row": 1000 + dialogue, "position": 3 + len(tokens) // 2, "start": 3}
    return {**shown, "text": "".join(tokens), "tokens": tokens, "token_types": types}


def make_results(folder, d_sae, top=10, word="word", dead=(), trained_on="fast"):
    """Latent k is active on `word`k, in 4 dialogues if 5 divides k and in `top` otherwise; those `dead` never are."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for latent in (each for each in range(d_sae) if each not in dead):
        for rank in range(4 if latent % 5 == 0 else top):
            row = context(100 + rank, [" the", f" {word}{latent}", " of", f" dialogue{rank}"])
            value = 9.5 - 0.5 * rank
            activations = [0.0, 0.25 * value, value, 0.0, 0.0]
            rows.append(
                {"latent": latent, "kind": "top", "rank": rank, "value": value, "activations": activations, **row}
            )
        for rank in range(5):
            row = context(200 + rank, [" a", f" {word}{latent}", " drawn", f" from{rank}"])
            rows.append(
                {"latent": latent, "kind": "drawn", "rank": rank, "value": 1.0, "activations": [0, 0, 1.0, 0, 0], **row}
            )
    pq.write_table(pa.Table.from_pylist(rows, CONTEXT_SCHEMA), folder / CONTEXTS_FILE)
    windows = [{"window": n, **context(300 + n, [f" other{n}", " text", " here", "."])} for n in range(12)]
    pq.write_table(pa.Table.from_pylist(windows, WINDOW_SCHEMA), folder / WINDOWS_FILE)
    is_dead = np.isin(np.arange(d_sae), list(dead))
    density = np.where(is_dead, 0, rng.permutation(d_sae) + 1) / (10 * d_sae)
    columns = {
        "latent": np.arange(d_sae, dtype=np.int32),
        "n_active": (density * 100_000).astype(np.int64),
        "max_activation": np.where(is_dead, 0, 9.5).astype(np.float32),
        "mean_activation": np.where(is_dead, 0, 2.0),
        **{f"density_{name}": density * rng.uniform(0, 2, d_sae) for name in TOKEN_SETS[1:]},
        "density_all": density,
        "histogram": [[0] * 10 + [int(n), 5, 1] + [0] * (BINS - 13) for n in density * 1000],
        "silent_windows": [list(range(12))] * d_sae,
        "neighbours": [[{"index": (n + i) % d_sae, "value": 0.9 - 0.1 * i} for i in (1, 2, 3)] for n in range(d_sae)],
        "promoted": [[{"token": f" up{n}", "value": 3.0}] for n in range(d_sae)],
        "suppressed": [[{"token": f" down{n}", "value": -3.0}] for n in range(d_sae)],
    }
    pq.write_table(pa.table(columns), folder / LATENTS_FILE)
    sae = {
        "name": f"sae-{trained_on}", "fingerprint": "0" * 64, "model": "demo", "hook_point": "resid_post.2",
        "architecture": "jumprelu", "trained_on": trained_on, "d_in": 8, "d_sae": d_sae,
    }  # fmt: skip
    tokens = dict.fromkeys(TOKEN_SETS, 10_000)
    about = {"sae": sae, "cache_fingerprint": "1" * 64, "split": "interpret", "dialogues": 500, "tokens": tokens}
    write_json_atomic(folder / ABOUT_FILE, {**about, "top": top, "window": 16, "seed": 42, "readable": True})
    return folder


def add_scores(results, rows):
    """As `interpret judge` leaves them."""
    folder = results / "judge"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "scores.parquet")
    write_json_atomic(folder / "summary.json", {"sae": read_json(results / "about.json")["sae"]})
    return folder


def scored(latent, score, name):
    return {
        "latent": latent,
        "score": score,
        "name": name,
        "detection": 0.75,
        "answer": f"Clear. [[{score}]] [[{name}]]",
    }
