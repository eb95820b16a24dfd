"""Attention over several sequences that lie end to end in one row of the batch: none sees another.

transformers calls the function registered here in place of its own, without a mask. It attends segment by segment:
one call of SDPA for each on CPU and MPS, one varlen kernel for all on CUDA. What it doesn't know it refuses, rather
than leave it out; the backend then runs one sequence at a time.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NAME = "fastcache_packed"
BOUNDARIES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""transformers' own keywords for the boundaries of packed sequences; some kernels for linear attention take them."""
IGNORED = {"position_ids", "position_embeddings", "cache_position", "is_causal", *BOUNDARIES}
"""Keywords that models hand through to attention functions and that change nothing for a causal pack."""
MAX_HEAD_DIM = 256
"""The widest heads that the varlen kernels of CUDA take."""


class UnknownAttentionError(Exception):
    """The model wants something of its attention that isn't done here."""


@dataclass
class Segments:
    """Where the sequences of a pack begin and end."""

    bounds: list[int]
    """First token of each sequence, and the number of all tokens."""
    on_device: Tensor
    """The bounds as int32, for varlen kernels."""
    windows: dict[int, int | None] = field(default_factory=dict)
    """What each layer said of its sliding window, by layer."""
    chunks: dict[int, int] = field(default_factory=dict)
    """Tokens of a chunk, for the layers in which a token sees its own chunk only; layers don't say this."""
    is_eager: bool = False
    """Whether the model's own attention is written out in torch, and not a call of SDPA; the two round differently."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: str) -> "Segments":
        """Segments of these lengths, end to end."""
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        return cls(bounds, torch.tensor(bounds, dtype=torch.int32, device=device))

    def part(self, start: int, stop: int) -> "Segments":
        """The one segment from `start` to `stop`."""
        bounds = self.on_device.new_tensor([0, stop - start])
        return Segments([0, stop - start], bounds, self.windows, self.chunks, self.is_eager)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(stop - start for start, stop in pairwise(self.bounds))

    def boundaries(self) -> dict[str, Any]:
        """The keywords `BOUNDARIES`."""
        lengths = self.on_device.diff()
        numbers = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
        ends = {"cu_seq_lens_q": self.on_device, "cu_seq_lens_k": self.on_device}
        longest = {"max_length_q": self.longest, "max_length_k": self.longest}
        return {**ends, **longest, "seq_idx": numbers.repeat_interleave(lengths)[None]}

    def positions(self) -> Tensor:
        """Position ids `[n]`: from 0 in each sequence."""
        return torch.cat([torch.arange(stop - start) for start, stop in pairwise(self.bounds)])


_CURRENT: ContextVar[Segments | None] = ContextVar("segments of the pack that is run", default=None)
"""The pack is not passed to the model as a keyword: many models do not forward keywords, and some kernels refuse them."""


def current_segments() -> Segments | None:
    """The segments of the pack that goes through a model at the moment."""
    return _CURRENT.get()


@contextmanager
def use_segments(segments: Segments | None) -> Iterator[None]:
    """Have attention go by these segments."""
    token = _CURRENT.set(segments)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    fastcache_segments: Segments | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Outputs `[1, n, heads, d]` of queries `[1, heads, n, d]` and keys and values `[1, kv_heads, n, d]`.

    Raises `UnknownAttentionError` for what it can't do.
    """
    segments = fastcache_segments or current_segments()
    if segments is None:
        raise UnknownAttentionError("it isn't told of a pack: the model doesn't hand keywords through to its attention")
    _refuse_unknown(module, query, attention_mask, dropout, segments, others)
    layer = getattr(module, "layer_idx", -1)
    segments.windows[layer] = sliding_window
    chunk = segments.chunks.get(layer)
    is_plain = softcap is None and s_aux is None and chunk is None
    if is_plain and (kernel := varlen_kernel(query, value)):
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        return kernel(q, k, v, segments, scaling, sliding_window).unsqueeze(0), None
    out = torch.empty((1, query.shape[2], query.shape[1], value.shape[3]), dtype=query.dtype, device=query.device)
    for start, stop in pairwise(segments.bounds):
        q, k, v = (states[:, :, start:stop] for states in (query, key, value))
        if s_aux is not None or (segments.is_eager and softcap is None and chunk is None):
            out[:, start:stop] = _eager(module, q, k, v, scaling, sliding_window)
        elif softcap is not None:
            out[:, start:stop] = _softcapped(q, k, v, scaling, sliding_window, softcap).transpose(1, 2)
        else:
            out[:, start:stop] = _sdpa(q, k, v, scaling, sliding_window, chunk).transpose(1, 2)
    return out, None


def _refuse_unknown(
    module: Any, query: Tensor, mask: Tensor | None, dropout: float, segments: Segments, others: dict[str, Any]
) -> None:
    """Raise `UnknownAttentionError` unless this is plain causal attention over a pack."""
    if mask is not None:
        raise UnknownAttentionError("the model makes an attention mask of its own")
    if query.shape[0] != 1 or query.shape[2] != segments.bounds[-1]:
        raise UnknownAttentionError("attention gets something else than the tokens of the pack")
    if dropout or not others.get("is_causal", getattr(module, "is_causal", True)):
        raise UnknownAttentionError("attention isn't causal, or has dropout")
    given = {key for key, setting in others.items() if setting is not None and setting is not False}
    if unknown := sorted(given - IGNORED):
        raise UnknownAttentionError(f"attention takes {', '.join(unknown)}")


def _band(n: int, window: int, device: torch.device) -> Tensor:
    """Mask bool `[n, n]`: each token sees itself and the `window - 1` before it."""
    place = torch.arange(n, device=device)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < window)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, chunk: int | None = None
) -> Tensor:
    """One segment through torch's attention; a segment within the window, or within a chunk, needs no mask."""
    n, grouped = q.shape[2], q.shape[1] != k.shape[1]
    mask = _band(n, window, q.device) if window is not None and window < n else None
    if chunk is not None and chunk < n:
        number = torch.arange(n, device=q.device) // chunk
        mask = _band(n, n, q.device) & (number[:, None] == number)
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and n > 1, scale=scaling, enable_gqa=grouped
    )


def _eager(module: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """One segment `[1, n, heads, d]` through the architecture's own plain attention, which knows its attention sinks."""
    plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if plain is None:
        raise UnknownAttentionError("attention takes s_aux or is an unknown one, and its plain form isn't known")
    n = q.shape[2]
    band = _band(n, n if window is None else window, q.device)
    mask = torch.where(band, torch.zeros((), dtype=q.dtype, device=q.device), torch.finfo(q.dtype).min)
    out: Tensor = plain(module, q, k, v, mask[None, None], scaling=scaling)[0]
    return out


def _softcapped(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float) -> Tensor:
    """One segment with logits squashed to +-`softcap`, as Gemma 2 does; in the order of transformers' eager attention."""
    n, repeats = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (states.repeat_interleave(repeats, dim=1) for states in (k, v))
    logits = torch.matmul(q, k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~_band(n, n if window is None else window, q.device), torch.finfo(q.dtype).min)
    return torch.matmul(functional.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype), v)


Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float | None, int | None], Tensor]
"""Attention of all segments at once: queries `[n, heads, d]`, keys and values `[n, kv_heads, d]`, scale, window."""


def varlen_kernel(query: Tensor, value: Tensor) -> Kernel | None:
    """The kernel for all segments at once, if there is one for this device, dtype and width of heads."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > MAX_HEAD_DIM:
        return None
    return _torch_varlen() or _flash_varlen()


def _torch_varlen() -> Kernel | None:
    """`torch.nn.attention.varlen`, from the version on that knows windows and grouped heads."""
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():

            def kernel(
                q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float | None, window: int | None
            ) -> Tensor:
                cu, longest = segments.on_device, segments.longest
                left = -1 if window is None else window - 1
                found: Any = varlen_attn(
                    q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=True
                )
                return found

            return kernel
    return None


def _flash_varlen() -> Kernel | None:
    """The flash-attention package."""
    with suppress(ImportError):
        from flash_attn import flash_attn_varlen_func

        def kernel(
            q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float | None, window: int | None
        ) -> Tensor:
            cu, longest = segments.on_device, segments.longest
            left = -1 if window is None else window - 1
            found: Any = flash_attn_varlen_func(
                q, k, v, cu, cu, longest, longest, softmax_scale=scaling, causal=True, window_size=(left, 0)
            )
            return found

        return kernel
    return None


def register() -> None:
    """Make `packed_attention` known to transformers; no mask function goes with it, so that no mask is built."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
