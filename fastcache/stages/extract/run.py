"""The extract stage: units of the corpus go through the model, each becomes a committed part of the cache."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastcache.cache_format.manifest import Manifest
from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import TokenType, hook_point
from fastcache.cache_format.writer import CacheWriter
from fastcache.config import as_dict
from fastcache.corpus import Corpus, CorpusRow
from fastcache.devices import choose_device
from fastcache.errors import InputError, ModelError
from fastcache.llm.backend import Backend
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
from fastcache.llm.parity import check_parity, reference_residuals, spread
from fastcache.progress import Progress
from fastcache.rundir import versions
from fastcache.stages.extract.compute import Worker, compute_by_crew, compute_here
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.extract.ledger import total_ledger
from fastcache.stages.extract.memory import queue_bytes
from fastcache.stages.extract.output import cache_output
from fastcache.stages.extract.plan import announce, announce_time, make_plan
from fastcache.stages.extract.sequences import Item, Tokenize, Unit, block_items, cut_units, fast_items
from fastcache.stages.extract.status import STATUS_FILE, Status

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastcache.stages.extract.add_layer import Addition

SAMPLE = 256
"""Sequences looked at to estimate the size of the job and to choose those of the parity check."""


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
        self.device = choose_device(self.config.device)
        context = getattr(self.llm_config, "max_position_embeddings", None) or self.config.max_length
        self.max_length = min(self.config.max_length, context)
        self.block_size = min(self.config.block_size, context)
        self.model_dtype = self.config.model_dtype or ("bfloat16" if self.device.startswith("cuda") else "float32")

    @property
    def hook_points(self) -> list[str]:
        """The captured hook points, by layer."""
        return [hook_point(layer) for layer in sorted(set(self.config.layer))]

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
        """The stream of sequences, from its beginning."""
        rows = self.corpus.rows(self.config.split)
        if self.config.method == "fast":
            return fast_items(rows, self._tokenizer(), self.max_length)
        return block_items(rows, self._tokenizer(), self.block_size, self.separator[1], self.config.tokens)

    def _tokenizer(self) -> Tokenize:
        if self.config.method == "bt-p":
            return lambda row: text_tokens(self.tokenizer, row.text or "")
        renderer = ChatRenderer(self.tokenizer, self.config.default_system)

        def tokenize(row: CorpusRow) -> Any:
            rendered = renderer.render(row.messages or [])
            return rendered.token_ids, rendered.token_types

        return tokenize

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of the workers, in turn."""
        return tuple(map(choose_device, self.config.devices)) or (self.device,)

    @property
    def n_workers(self) -> int:
        """Worker processes: one for each device, or as many as asked for."""
        return self.config.workers or len(self.devices)

    def worker(self, place: str) -> Worker:
        """What computes parts of the cache at `place`."""
        config = self.config
        hooks, skip = tuple(self.hook_points), config.on_nonfinite == "skip"
        return Worker(
            place, self.identity(), self.source, hooks, self.model_dtype, self.devices, skip, config.pack_tokens
        )

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
            },
            "corpus": {"fingerprint": self.corpus.fingerprint, "split": config.split},
            "method": {"name": config.method, **length, "separator": self.separator[1], **policy},
            "hook_points": self.hook_points,
            "d_in": self.llm_config.hidden_size,
            "dtype": config.dtype,
            "model_dtype": self.model_dtype,
            "tokens": config.tokens,
            "unit_tokens": config.unit_tokens,
        }


def make_job(config: ExtractConfig, find_corpus: Callable[[], Path]) -> Job:
    """Find model, tokenizer and corpus, and check that they go together; raises `ModelError`, `InputError`."""
    source = ModelSource(config.model, config.revision, config.trust_remote_code)
    llm_config, tokenizer = load_config(source), load_tokenizer(source)
    check_layers(llm_config, [hook_point(layer) for layer in config.layer], source)
    if config.method != "bt-p":
        require_chat_template(tokenizer, source)
    corpus_path = find_corpus()
    return Job(replace(config, corpus=str(corpus_path)), source, Corpus(corpus_path), tokenizer, llm_config)


def extract(
    config: ExtractConfig,
    find_corpus: Callable[[], Path],
    out: Path | str,
    progress: Progress,
    fresh: bool = False,
    force: bool = False,
) -> Cache:
    """Fill the cache at `out`, a folder or an address such as `s3://bucket/folder`, or go on filling it; returns it opened.

    `find_corpus` names the corpus directory; it is asked once the model is known to serve, for it may be long at it.
    Everything that can be wrong with the input is found before `out` is touched, and what disk or memory can't hold is
    refused, but for `force`. Raises `ModelError`, `InputError`, `MismatchError`, `SpaceError`, `NonFiniteError`.
    """
    job = make_job(config, find_corpus)
    started = time.monotonic()
    items = list(islice(job.items(), SAMPLE))
    sample = [item.instance for item in items if item.instance]
    if not sample:
        raise InputError(
            f"None of the first {SAMPLE} rows of {job.corpus.path} could be rendered; see `fastcache inspect`."
        )
    n_rows = max(1, sum(len(item.entries) for item in items))  # a long document may not have ended yet
    plan = make_plan(job, out, sample, n_rows, time.monotonic() - started, fresh)
    if plan.new_tokens:
        announce(plan, job, out, progress, force)
    queue = queue_bytes(job, sample)
    with (
        cache_output(out, as_dict(job.config), fresh) as storage,
        CacheWriter(storage, Manifest(job.identity(), versions=versions()), queue_bytes=queue) as writer,
    ):
        if writer.manifest.state == "complete" and not writer.manifest.failed:
            progress.say(f"{out} is complete; nothing to do (--fresh starts over).")
            return Cache(writer.storage)
        if writer.manifest.state == "complete":  # but for units that failed: they are tried again
            writer.manifest.state = "writing"
            writer.save_manifest()
        worker = replace(job.worker(writer.storage.url), queue_bytes=queue)
        backend = begun(worker, progress) if job.n_workers == 1 else None
        if config.parity and not writer.manifest.parity:
            checked = backend or begun(worker, progress)
            writer.manifest.parity = parity_figures(job, sample, checked, progress)
            writer.save_manifest()
            announce_time(plan, job, checked, sample, progress)
            del checked
        elif backend:
            announce_time(plan, job, backend, sample, progress)
        path = out / STATUS_FILE if isinstance(out, Path) else None
        with progress.task(f"extract {config.method}", plan.expected_tokens, "tokens") as task:
            status = Status(task, progress, plan.expected_tokens, plan.row_bytes, path)
            if backend is not None:
                failed = compute_here(job.units(), writer, backend, worker.skip_nonfinite, status)
            else:
                failed = compute_by_crew(job.units(), writer, worker, job.n_workers, status)
            status.state = "computed"
            status.write()
        return finish(writer, job, failed)


def begun(worker: Worker, progress: Progress) -> Backend:
    """The backend, after its word on how it runs the model."""
    backend = worker.backend()
    if backend.note:
        progress.say(backend.note)
    return backend


def parity_figures(
    job: "Job | Addition", sample: list[Instance], backend: Backend, progress: Progress
) -> dict[str, Any]:
    """Figures of the parity check; the reference model is let go with the end of this function."""
    picked = spread([len(instance.token_ids) for instance in sample], job.config.parity)
    progress.say(f"Parity check of {len(picked)} sequences against the plain float32 model ...")
    reference = reference_residuals(job.source, job.hook_points)
    sequences = [sample[index].token_ids for index in picked]
    return check_parity(backend, reference, sequences, job.model_dtype)


def finish(writer: CacheWriter, job: Job, failed: dict[int, str] | None = None) -> Cache:
    """Check the totals and mark the cache complete; a manifest that says so already is left alone.

    `failed` are the units that were given up, with the reason: their rows are in the ledger. None: those of before.
    """
    if failed is None:
        failed = {int(index): reason for index, reason in writer.manifest.failed.items()}
    before = writer.manifest.to_bytes()
    records = [writer.committed[index] for index in sorted(writer.committed)]
    if failed and not records:
        raise ModelError(f"Every unit failed, the first one because: {next(iter(failed.values()))}.")
    if not records:
        raise InputError("--tokens leaves no room for a single sequence; nothing was cached.")
    cache = Cache(writer.storage)
    manifest = writer.manifest
    split = job.config.split
    manifest.failed = {str(index): reason for index, reason in sorted(failed.items())}
    n_failed = sum(len(unit.entries) for unit in job.units() if unit.index in failed) if failed else 0
    manifest.ledger = total_ledger((record.ledger for record in records), n_failed, job.corpus.n_rows(split))
    truncated = {row for record in records for row in record.ledger["truncated"]}
    manifest.ledger["truncated_by_source"] = job.corpus.sources_of(split, truncated)
    manifest.statistics = {hook: cache.summary(hook) for hook in manifest.hook_points}
    manifest.totals = {
        "n_tokens": cache.n_tokens,
        "n_instances": cache.n_instances,
        "n_parts": len(records),
        "n_bytes": sum(record.n_bytes(manifest.hook_points) for record in records),
        "tokens_by_type": _tokens_by_type(cache),
    }
    if job.config.method != "fast":
        manifest.totals["last_block_tokens"] = len(cache.instance(-1))
    manifest.state = "complete"
    if manifest.to_bytes() != before:
        writer.save_manifest()
    return Cache(writer.storage)


def _tokens_by_type(cache: Cache) -> dict[str, int]:
    # Not `part.tokens`, which every part would keep.
    types = (part.small("token_types", (part.record.n_tokens,), "uint8") for part in cache.parts)
    counts = sum((np.bincount(values, minlength=256) for values in types), np.zeros(256, np.int64))
    return {
        flag.name or str(int(flag)): int(sum(count for value, count in enumerate(counts) if value & flag))
        for flag in TokenType
    }
