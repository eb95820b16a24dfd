"""Scores of one SAE's latents, as Parquet, CSV and a summary."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastcache.files import atomic_file, write_bytes_atomic, write_json_atomic
from fastcache.stages.interpret.config import JudgeConfig
from fastcache.stages.interpret.judge.answers import UnparsedError, balanced_accuracy, parse_detection, parse_score
from fastcache.stages.interpret.judge.log import AnswerLog
from fastcache.stages.interpret.judge.prompts import Prompt

SCORES_FILE, CSV_FILE, SUMMARY_FILE = "scores.parquet", "scores.csv", "summary.json"
SCORE_FILES = (SCORES_FILE, CSV_FILE, SUMMARY_FILE)
SCHEMA = pa.schema(
    [
        ("latent", pa.int32()), ("score", pa.int32()), ("name", pa.string()), ("failure", pa.string()),
        ("detection", pa.float64()), ("detection_failure", pa.string()), ("answer", pa.string()),
    ]
)  # fmt: skip
SCORES = (1, 2, 3, 4, 5)
UNANSWERED = "unanswered"


@dataclass(frozen=True)
class Judged:
    """What a judge was asked and said."""

    about: dict[str, Any]
    """What the latents are of."""
    config: JudgeConfig
    n_qualifying: int
    prompts: Sequence[Prompt]
    n_too_few: int
    """Named latents with too few contexts for detection."""
    log: AnswerLog


def write_scores(out: Path, judged: Judged) -> dict[str, Any]:
    """Write the tables and the summary into `out`; returns the summary."""
    table = pa.Table.from_pylist(_rows(judged), SCHEMA)
    with atomic_file(out / SCORES_FILE) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    write_bytes_atomic(out / CSV_FILE, to_csv(SCHEMA.names, [list(row.values()) for row in table.to_pylist()]))
    summary = _summary(judged, table)
    write_json_atomic(out / SUMMARY_FILE, summary)
    return summary


def to_csv(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """A table with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([names, *rows])
    return text.getvalue().encode()


def _rows(judged: Judged) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for prompt in judged.prompts:
        answer = judged.log.answers.get(prompt.name)
        row = rows.setdefault(prompt.latent, {"latent": prompt.latent})
        if prompt.kind == "score":
            found, failure = _read(answer, parse_score)
            row |= {"failure": failure, "answer": answer}
            row |= found._asdict() if found else {}
        else:
            said, failure = _read(answer, partial(parse_detection, n_texts=len(prompt.active)))
            row |= {"detection_failure": failure}
            row |= {} if said is None else {"detection": balanced_accuracy(said, prompt.active)}
    return list(rows.values())


def _read(answer: str | None, parse: Callable[[str], Any]) -> tuple[Any, str | None]:
    if answer is None:
        return None, UNANSWERED
    try:
        return parse(answer), None
    except UnparsedError as failure:
        return None, str(failure)


def _summary(judged: Judged, table: pa.Table) -> dict[str, Any]:
    scores = [score for score in table["score"].to_pylist() if score is not None]
    detection = [value for value in table["detection"].to_pylist() if value is not None]
    n_detection = sum(prompt.kind == "detection" for prompt in judged.prompts)
    return {
        "sae": judged.about["sae"],
        "dialogues": judged.about["dialogues"],
        "judge": judged.config.judge_model,
        "qualifying": judged.n_qualifying,
        "chosen": len(table),
        "scored": len(scores),
        "failures": _counted(table["failure"].to_pylist()),
        "shares": {str(score): scores.count(score) / max(len(scores), 1) for score in SCORES},
        "mean": sum(scores) / len(scores) if scores else None,
        "share_4_5": sum(score >= 4 for score in scores) / len(scores) if scores else None,
        "detection": {
            "prompts": n_detection,
            "too_few_contexts": judged.n_too_few,
            "scored": len(detection),
            "failures": _counted(table["detection_failure"].to_pylist()),
            "mean": sum(detection) / len(detection) if detection else None,
        },
        "requests": judged.log.n_requests,
        "tokens": judged.log.usage,
        "cost": judged.log.cost if None not in (judged.config.price_in, judged.config.price_out) else None,
    }


def _counted(failures: Sequence[str | None]) -> dict[str, int]:
    return dict(sorted(Counter(failure for failure in failures if failure).items()))
