"""What an extraction is about, settled before the model is loaded: settings, model, corpus, sequences, units, identity."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcache.cache_format.schema import hook_point
from fastcache.cache_format.writer import QUEUE_BYTES
from fastcache.corpus import Corpus, CorpusRow
from fastcache.errors import InputError
from fastcache.llm.chat import FIXED_DATE, ChatRenderer, text_tokens
from fastcache.llm.loading import (
    ModelSource,
    check_layers,
    load_config,
    load_tokenizer,
    model_identity,
    require_chat_template,
    tokenizer_identity,
)
from fastcache.llm.model_files import require_known_tokens
from fastcache.stages.extract.compute import Worker
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.extract.model_use import ModelUse
from fastcache.stages.extract.sequences import Item, Tokenize, Tokens, Unit, block_items, cut_units, fast_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Job:
    """Everything settled before the model is loaded."""

    config: ExtractConfig
    source: ModelSource
    corpus: Corpus
    tokenizer: "PreTrainedTokenizerBase"
    llm_config: Any

    def __post_init__(self) -> None:
        wanted = "text" if self.config.method == "bt-p" else "chat"
        if self.corpus.kind != wanted:
            raise InputError(
                f"--method {self.config.method} needs a {wanted} corpus, but {self.corpus.path} holds {self.corpus.kind}."
            )
        if self.config.on_nonfinite == "skip" and self.config.method != "fast":
            raise InputError(
                "--on-nonfinite skip is for --method fast: a block can't be left out without its neighbours."
            )
        context = getattr(self.llm_config, "max_position_embeddings", None) or self.config.max_length
        self.max_length = min(self.config.max_length, context)
        self.block_size = min(self.config.block_size, context)
        hooks = [hook_point(layer) for layer in sorted(set(self.config.layer))]
        longest = self.max_length if self.config.method == "fast" else self.block_size
        self.use = ModelUse(self.config, self.source, self.llm_config, hooks, longest)

    @property
    def separator(self) -> tuple[str, int | None]:
        """What ends a document, by name and token id. A dialogue ends by its template, a text by the first of these."""
        if self.config.method != "bt-p":
            return "template", None
        tokenizer = self.tokenizer
        candidates = {
            "bos": tokenizer.bos_token_id,
            "endoftext": tokenizer.get_vocab().get("<|endoftext|>"),
            "eos": tokenizer.eos_token_id,
        }
        return next(((name, token) for name, token in candidates.items() if token is not None), ("none", None))

    def items(self) -> Iterator[Item]:
        """The stream of sequences, from its beginning; raises `ModelError` at a token that the model doesn't know."""
        rows = self.corpus.rows(self.config.split)
        if self.config.method == "fast":
            items = fast_items(rows, self._tokenizer(), self.max_length)
        else:
            items = block_items(rows, self._tokenizer(), self.block_size, self.separator[1], self.config.tokens)
        for item in items:
            if item.instance:
                require_known_tokens(item.instance.token_ids, self.llm_config, self.source.name)
            yield item

    def _tokenizer(self) -> Tokenize:
        if self.config.method == "bt-p":
            return lambda row: Tokens(*text_tokens(self.tokenizer, row.text or ""))
        renderer = ChatRenderer(self.tokenizer, self.config.default_system, self.config.fold_system)

        def tokenize(row: CorpusRow) -> Tokens:
            rendered = renderer.render(row.messages or [], row.tools)
            left_out = tuple(sorted(rendered.left_out.items()))
            return Tokens(rendered.token_ids, rendered.token_types, rendered.changes, left_out)

        return tokenize

    def worker(self, place: str, queue: int = QUEUE_BYTES) -> Worker:
        """What computes parts of the cache at `place`."""
        return Worker(place, self.identity(), self.use.plan(), self.config.on_nonfinite == "skip", queue)

    def units(self) -> Iterator[Unit]:
        """The work units, from the beginning."""
        return cut_units(self.items(), self.config.unit_tokens, self.config.tokens)

    def identity(self) -> dict[str, Any]:
        """All that decides what the cache holds."""
        config = self.config
        is_fast = config.method == "fast"
        length = {"max_length": self.max_length} if is_fast else {"block_size": self.block_size}
        policy = {} if is_fast else {"separator_policy": self.separator[0]}
        return {
            "model": model_identity(self.source, self.llm_config),
            "tokenizer": {
                **tokenizer_identity(self.tokenizer),
                "template_date": FIXED_DATE,
                "default_system": config.default_system,
                **({"fold_system": True} if config.fold_system else {}),
            },
            "corpus": {"fingerprint": self.corpus.fingerprint, "split": config.split},
            "method": {"name": config.method, **length, "separator": self.separator[1], **policy},
            "hook_points": self.use.hook_points,
            "d_in": self.llm_config.hidden_size,
            "dtype": config.dtype,
            "model_dtype": self.use.model_dtype,
            **({"backend": self.use.backend} if self.use.backend != "transformers" else {}),
            "tokens": config.tokens,
            "unit_tokens": config.unit_tokens,
        }


def make_job(config: ExtractConfig, find_corpus: Callable[[], Path], model_place: str | None = None) -> Job:
    """Find model, tokenizer and corpus, and check that they go together; raises `ModelError`, `InputError`.

    `model_place` is where the folder of the model is, if it isn't where the settings say.
    """
    source = ModelSource(config.model, config.revision, config.trust_remote_code, model_place)
    llm_config, tokenizer = load_config(source), load_tokenizer(source)
    check_layers(llm_config, [hook_point(layer) for layer in config.layer], source)
    if config.method != "bt-p":
        require_chat_template(tokenizer, source)
    corpus_path = find_corpus()
    return Job(replace(config, corpus=str(corpus_path)), source, Corpus(corpus_path), tokenizer, llm_config)
