"""Having a scripted judge asked."""

import pyarrow.parquet as pq
from judge_server import question

from fastcache.config import from_mapping
from fastcache.progress import Silent
from fastcache.stages.interpret.config import JudgeConfig
from fastcache.stages.interpret.judge.run import judge

KEY = "sk-very-secret/0123456789"


def run(latents, out, server=None, **settings):
    given = {"latents": str(latents), "judge_model": "scripted", "count": 12, **settings}
    if server:
        given["judge_url"] = server.url
    return judge(from_mapping(JudgeConfig, given, "test"), out, Silent())


def good(body):
    return "Tokens of one kind.\n[[4]]\n[[kind " + str(len(question(body))) + "]]"


def scores(out):
    return pq.read_table(out / "scores.parquet").to_pylist()
