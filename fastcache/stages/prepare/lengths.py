"""How long the corpus is in a model's tokens: from a sample, which the permutation makes a fair one."""

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np

from fastcache.corpus import Corpus
from fastcache.errors import InputError
from fastcache.llm.chat import ChatRenderer, text_tokens
from fastcache.llm.loading import ModelSource, load_tokenizer, require_chat_template
from fastcache.progress import Progress

SAMPLED_ROWS = 20_000
MAX_LENGTH = 8192
"""The paper's truncation."""


def token_lengths(corpus: Corpus, model: str, progress: Progress) -> dict[str, Any]:
    """Histogram of tokens per row in the split `train` of `corpus`, rendered for `model`.

    Counts by source how many rows are longer than `MAX_LENGTH`, and how many the chat template refuses.
    """
    source = ModelSource(model)
    tokenizer = load_tokenizer(source)
    renderer = None
    if corpus.kind == "chat":
        require_chat_template(tokenizer, source)
        renderer = ChatRenderer(tokenizer)
    lengths, longer, refused = [], Counter[str](), 0
    n_rows = min(SAMPLED_ROWS, corpus.n_rows("train"))
    with progress.task("token lengths", n_rows, "rows") as task:
        for row in islice(corpus.rows("train"), n_rows):
            task.advance(1)
            try:
                ids = (
                    renderer.render(row.messages or [], row.tools).token_ids
                    if renderer
                    else text_tokens(tokenizer, row.text or "")[0]
                )
            except InputError:
                refused += 1
                continue
            lengths.append(len(ids))
            if len(ids) > MAX_LENGTH:
                longer[row.source] += 1
    edges = np.unique(np.round(2 ** np.arange(0, 24.5, 0.5)).astype(int))
    counts, _ = np.histogram(lengths, edges)
    return {
        "model": model,
        "sampled_rows": n_rows,
        "refused": refused,
        "mean": float(np.mean(lengths)) if lengths else 0.0,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "max_length": MAX_LENGTH,
        "longer": sum(longer.values()),
        "longer_by_source": dict(sorted(longer.items())),
    }
