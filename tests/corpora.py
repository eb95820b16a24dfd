"""Small corpora for tests."""

import json

from fastcache.corpus import Corpus
from fastcache.progress import Silent
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.run import prepare


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def dialogue(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def run(out, *sources, **options):
    info = prepare(PrepareConfig(source=sources, **options), out, Silent())
    return info, [row for split in info["splits"] if info["splits"][split] for row in Corpus(out).rows(split)]
