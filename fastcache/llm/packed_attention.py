"""Attention over several sequences that lie end to end in one row of the batch: none sees another.

transformers calls the function registered here in place of its own, without a mask. It attends segment by segment:
one call of SDPA for each on CPU and MPS, one varlen kernel for all on CUDA. What it doesn't know it refuses, rather
than leave it out; the backend then runs one sequence at a time.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NAME = "fastcache_packed"
IGNORED = {"position_ids", "position_embeddings", "cache_position", "is_causal"}
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

    @classmethod
    def of(cls, lengths: Sequence[int], device: str) -> "Segments":
        """Segments of these lengths, end to end."""
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        return cls(bounds, torch.tensor(bounds, dtype=torch.int32, device=device))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(stop - start for start, stop in pairwise(self.bounds))

    def positions(self) -> Tensor:
        """Position ids `[n]`: from 0 in each sequence."""
        return torch.cat([torch.arange(stop - start) for start, stop in pairwise(self.bounds)])


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
    fastcache_segments: Segments | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Outputs `[1, n, heads, d]` of queries `[1, heads, n, d]` and keys and values `[1, kv_heads, n, d]`.

    Raises `UnknownAttentionError` for what it can't do.
    """
    if fastcache_segments is None:
        raise UnknownAttentionError("the model doesn't hand keywords through to its attention")
    _refuse_unknown(module, query, attention_mask, dropout, fastcache_segments, others)
    fastcache_segments.windows[getattr(module, "layer_idx", -1)] = sliding_window
    if softcap is None and (kernel := varlen_kernel(query, value)):
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        return kernel(q, k, v, fastcache_segments, scaling, sliding_window).unsqueeze(0), None
    out = torch.empty((1, query.shape[2], query.shape[1], value.shape[3]), dtype=query.dtype, device=query.device)
    for start, stop in pairwise(fastcache_segments.bounds):
        q, k, v = (states[:, :, start:stop] for states in (query, key, value))
        if softcap is None:
            found = _sdpa(q, k, v, scaling, sliding_window)
        else:
            found = _softcapped(q, k, v, scaling, sliding_window, softcap)
        out[:, start:stop] = found.transpose(1, 2)
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


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """One segment through torch's attention; a segment within the window needs no mask."""
    n, grouped = q.shape[2], q.shape[1] != k.shape[1]
    mask = _band(n, window, q.device) if window is not None and window < n else None
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and n > 1, scale=scaling, enable_gqa=grouped
    )


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
