"""Residuals through transformers: sequences lie end to end in packs of a token budget, and none sees another.

No padding and no KV cache: with one, transformers doesn't notice the pack and attends across it. Positions begin at 0
in each sequence, and attention goes by segments (`packed_attention`). A self-check when the model is loaded compares a
pack with its sequences one at a time; a model that doesn't pass is run one sequence at a time, and `note` says why.

The residual stream is taken by a hook on the decoder layer: `output_hidden_states` of a model that was cut at that
layer would give the tensor after the final norm instead.
"""

from collections.abc import Iterable, Iterator, Sequence
from inspect import signature
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from fastcache.cache_format.schema import layer_of
from fastcache.llm.backend import Residuals, TokenIds, default_pack_tokens
from fastcache.llm.decoder import enough, residual_stream, run_until_enough
from fastcache.llm.loading import ModelSource, check_layers, load_config, load_decoder, quiet
from fastcache.llm.model_files import setting
from fastcache.llm.packed_attention import NAME, Segments, UnknownAttentionError, register, use_segments
from fastcache.llm.parity import RELATIVE_LIMITS, relative_difference
from fastcache.llm.segment_loop import SegmentLoops, attention_modules, expert_modules, stateful_modules
from fastcache.memory import is_lack_of_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECK_LENGTHS = (40, 1, 150, 3, 14, 4, 5, 15, 31, 63)
"""Sequences of the self-check. Few tokens are where products over other numbers of rows differ first."""


def shortest_packed() -> tuple[int, ...]:
    """Tokens that a sequence must have to share a pack, in the order in which the self-check tries them.

    On AMD's CPUs even strict mode has other kernels for up to 3 rows, and for up to 8 rows a thread where a product has few
    columns. Shorter sequences then go alone, which costs little: there are few of them.
    """
    return 1, 4, 8 * torch.get_num_threads()


class _Launched:
    """A pack whose residuals are on their way to the host."""

    def __init__(self, segments: Segments, captured: dict[str, torch.Tensor]) -> None:
        self.segments = segments
        on_cuda = any(states.is_cuda for states in captured.values())
        self._hosts = {name: self._to_host(states) for name, states in captured.items()}
        self._event = torch.cuda.Event() if on_cuda else None
        if self._event:
            self._event.record()

    @staticmethod
    def _to_host(states: torch.Tensor) -> torch.Tensor:
        if not states.is_cuda:
            return states.cpu()
        # Into pinned memory the copy runs behind the model's back; the next pack can start meanwhile.
        return torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states, non_blocking=True)

    def residuals(self) -> Iterator[Residuals]:
        """What each sequence of the pack gets: rows of one array, made for this pack alone."""
        if self._event:
            self._event.synchronize()
        arrays = {name: states.float().numpy() for name, states in self._hosts.items()}
        for start, stop in pairwise(self.segments.bounds):
            yield {name: array[start:stop] for name, array in arrays.items()}


class TransformersBackend:
    """A model cut after its deepest captured layer."""

    def __init__(
        self,
        source: ModelSource,
        hook_points: Sequence[str],
        dtype: str,
        device: str,
        pack_tokens: int | None = None,
    ) -> None:
        """Load the model; raises `ModelError` or, for a layer out of range, `InputError`.

        `pack_tokens` 1 runs one sequence at a time.
        """
        self._config = load_config(source)
        check_layers(self._config, list(hook_points), source)
        self.hook_points = list(hook_points)
        self.device = device
        self.note: str | None = None
        """Why sequences are run one at a time, if they are, and which stored weights belong to no part of the model."""
        self._dtype = dtype
        self._n_layers = max(layer_of(hook) for hook in hook_points) + 1
        decoder = load_decoder(source, self._n_layers, DTYPES[dtype], self.device)
        self._model, self._layers = decoder.model, decoder.layers
        self._hands_on = any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in signature(self._model.forward).parameters.values()
        )
        self._takes_boundaries = self._is_eager = False
        self._chunks: dict[int, int] = {}
        self._loops = SegmentLoops()
        self._captured: dict[str, torch.Tensor] = {}
        for hook in self.hook_points:
            decoder.layers[layer_of(hook)].register_forward_hook(self._capture(hook))
        decoder.layers[-1].register_forward_hook(enough)
        self._pack_tokens = default_pack_tokens("transformers", device) if pack_tokens is None else pack_tokens
        self._shortest = 1
        if self._pack_tokens > 1:
            self._use_packs()
        if names := decoder.unknown_weights:
            unknown = (
                f"The checkpoint holds {len(names)} weights that belong to no part of this model, such as {names[0]}."
            )
            self.note = " ".join(filter(None, (self.note, unknown)))

    def _capture(self, name: str) -> Any:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            self._captured[name] = residual_stream(output, self._config)

        return hook

    def residuals(self, sequences: Iterable[TokenIds]) -> Iterator[Residuals]:
        """See `Backend`. Takes two packs ahead; which sequences share a pack depends on `sequences` alone."""
        launched = None
        for pack in packs(sequences, self._pack_tokens, self._shortest):
            following = self._run(pack)
            if launched:
                yield from launched.residuals()
            launched = following
        if launched:
            yield from launched.residuals()

    def close(self) -> None:
        """See `Backend`."""
        self._model = None

    @torch.inference_mode()
    def _run(self, pack: Sequence[TokenIds]) -> _Launched:
        segments = Segments.of([len(token_ids) for token_ids in pack], self.device)
        token_ids = torch.from_numpy(np.concatenate(pack).astype(np.int64))[None].to(self.device)
        packed: dict[str, Any] = {}
        if self._pack_tokens > 1:
            segments.chunks, segments.is_eager = self._chunks, self._is_eager
            packed = {"position_ids": segments.positions()[None].to(self.device), **self._keywords(segments)}
        with use_segments(segments if packed else None):
            run_until_enough(self._model, input_ids=token_ids, use_cache=False, **packed)
        captured, self._captured = self._captured, {}
        return _Launched(segments, captured)

    @property
    def manner(self) -> str:
        """How sequences go through the model, in a few words."""
        if self._pack_tokens == 1:
            return "one sequence at a time"
        looped = sorted({type(module).__name__ for module in self._loops.modules})
        return "in packs" + (f", but through {', '.join(looped)} one sequence at a time" if looped else "")

    def _keywords(self, segments: Segments) -> dict[str, Any]:
        """The keywords that describe a pack to the model."""
        if self._takes_boundaries:
            return segments.boundaries()
        return {"fastcache_segments": segments} if self._hands_on else {}

    def _use_packs(self) -> None:
        """Change over to packs, unless the self-check finds that this model can't."""
        register()
        if reason := no_packs(self._config, self._n_layers):
            self._run_alone(reason)
            list(self.residuals([np.zeros(1, np.int32)]))  # a model without one residual stream is refused here and now
            return
        plain, pack_tokens = self._model.config._attn_implementation, self._pack_tokens
        rng = np.random.default_rng(0)
        n_vocabulary = self._config.vocab_size
        sequences = [rng.integers(0, n_vocabulary, length).astype(np.int32) for length in CHECK_LENGTHS]
        self._pack_tokens = 1
        alone = list(self.residuals(sequences))
        self._pack_tokens = pack_tokens
        with quiet():  # a model that can't says so below, in our words
            self._model.set_attn_implementation(NAME)
        self._is_eager = plain == "eager"
        self._chunks = chunks_of(self._config)
        reason = ""
        for takes_boundaries, modules in self._ways():
            self._takes_boundaries, self._loops = takes_boundaries, SegmentLoops(modules)
            for self._shortest in shortest_packed():
                reason, is_rounding = self._difference(sequences, alone)
                if not is_rounding:
                    break
            if not reason:
                return
            self._loops.undo()
        self._model.set_attn_implementation(plain)
        self._run_alone(reason)

    def _run_alone(self, reason: str) -> None:
        self._pack_tokens = 1
        self._captured = {}
        self.note = f"Sequences go through the model one at a time, not in packs: {reason}."

    def _ways(self) -> Iterator[tuple[bool, list[torch.nn.Module]]]:
        """Ways to run packs: whether the model is given boundaries, and the modules that run on one sequence at a time."""
        kinds = set((getattr(self._config, "layer_types", None) or [])[: self._n_layers])
        # Llama 4 scales queries by places that it counts itself, over the whole pack.
        looped = attention_modules(self._layers) if "chunked_attention" in kinds else []
        stateful = stateful_modules(self._layers)
        # Which experts get few tokens, and so round otherwise, the sequences of the self-check can't all show.
        experts = expert_modules(self._layers) if self._is_exact else []
        yield bool(stateful), [*looped, *experts]
        if stateful:
            yield False, [*looped, *stateful, *experts]

    @property
    def _is_exact(self) -> bool:
        """Whether a pack must give the bits of its sequences alone."""
        return self._dtype == "float32" and self.device == "cpu"

    def _difference(self, sequences: Sequence[TokenIds], alone: Sequence[Residuals]) -> tuple[str, bool]:
        """What tells sequences in one pack from the same `alone`, empty if nothing does; and whether it is rounding."""
        try:
            launched = [self._run(pack) for pack in packs(sequences, self._pack_tokens, self._shortest)]
        except (UnknownAttentionError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if is_lack_of_memory(error):
                raise  # It says something about this moment, not about the model: another worker would choose otherwise.
            self._captured = {}
            return str(error).split("\n")[0][:200], False
        for windows in (pack.segments.windows for pack in launched):
            if not windows:
                return "transformers can't exchange its attention", False
            if reason := window_mismatch(self._config, windows, self._n_layers):
                return reason, False
        found = [residuals for pack in launched for residuals in pack.residuals()]
        pairs = [(one[hook], other[hook]) for one, other in zip(found, alone, strict=True) for hook in self.hook_points]
        different = [(one, other) for one, other in pairs if not np.array_equal(one, other, equal_nan=True)]
        if any(not relative_difference(one, other) <= RELATIVE_LIMITS[self._dtype] for one, other in different):
            return "the model gives other values for a sequence that has neighbours", False
        if self._is_exact and different:
            return "the model gives other bits for a sequence that has neighbours", True
        return "", False


def packs(sequences: Iterable[TokenIds], pack_tokens: int, shortest: int = 1) -> Iterator[list[TokenIds]]:
    """Consecutive sequences of at most `pack_tokens` together; longer ones go alone, and those under `shortest` tokens."""
    pack: list[TokenIds] = []
    total = 0
    for token_ids in sequences:
        is_short = len(token_ids) < shortest
        if pack and (is_short or total + len(token_ids) > pack_tokens):
            yield pack
            pack, total = [], 0
        if is_short:
            yield [token_ids]
            continue
        pack.append(token_ids)
        total += len(token_ids)
    if pack:
        yield pack


def chunks_of(config: Any) -> dict[int, int]:
    """Tokens of a chunk, by layer, where a layer sees its own chunk only."""
    types = getattr(config, "layer_types", None) or []
    return {layer: config.attention_chunk_size for layer, kind in enumerate(types) if kind == "chunked_attention"}


ATTENTION_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
OTHER_TYPES = {"linear_attention", "conv", "hybrid", "mlp", "moe"}
"""Layers without attention, or with full attention beside something else."""


def no_packs(config: Any, n_layers: int) -> str:
    """Why the first `n_layers` layers can't run packs, or needn't, by their types; empty if they may."""
    types = set((getattr(config, "layer_types", None) or ["full_attention"])[:n_layers])
    if unknown := sorted(types - ATTENTION_TYPES - OTHER_TYPES):
        return f"it has layers of {', '.join(unknown)}"
    if not types & {*ATTENTION_TYPES, "hybrid"}:
        return "its layers carry a state from token to token, and have no attention"
    return ""


def window_mismatch(config: Any, windows: dict[int, int | None], n_layers: int | None = None) -> str:
    """Why the windows that the first `n_layers` layers (None: all) asked of attention aren't those of the configuration.

    Empty if they are. The sequences of the self-check are shorter than most windows, so that their values say nothing of
    them.
    """
    n_layers = config.num_hidden_layers if n_layers is None else n_layers
    types = getattr(config, "layer_types", None)
    window = setting(config, "sliding_window")
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * n_layers
    types = types[:n_layers]
    if reason := no_packs(config, n_layers):
        return reason
    expected = {
        layer: window if kind == "sliding_attention" else None
        for layer, kind in enumerate(types)
        if kind in ATTENTION_TYPES or layer in windows
    }
    if windows != expected:
        return "its layers don't say which of them have a sliding window"
    others = sorted({types[layer] for layer in windows} - ATTENTION_TYPES)
    if others and (unused := _windows_beside(config, set(windows.values()))):
        return f"it has layers of {', '.join(others)}, and none of them says that it uses {unused}"
    return ""


def _windows_beside(config: Any, used: set[int | None]) -> str:
    """The name of a window in the configuration that no layer asked of attention; empty if there is none."""
    settings = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    windows = {name: value for name, value in settings.items() if "window" in name and type(value) is int}
    return next((name for name, value in windows.items() if value not in used), "")
