"""Modules that would mix the sequences of a pack, or round by their neighbours, are run on one sequence after another.

Linear attention, convolutions and state-space layers carry a state from token to token, and transformers' plain versions
of them know no sequence boundaries. The products of a mixture of experts have as many rows as tokens were sent to an
expert, and on a CPU the last bit depends on that number. Everything else of the model still sees the whole pack.
"""

import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from torch import Tensor, cat, nn

from fastcache.llm.packed_attention import Segments, current_segments, use_segments

STATEFUL = re.compile(
    r"mamba|mixer|deltanet|deltaattention|conv|recurrentblock|lightning|linearattention", re.IGNORECASE
)
"""Class names of modules that carry a state along a sequence."""
TOKEN_DIMENSION = {1: 0, 2: 0, 3: 1, 4: 2}
"""Where tokens are counted: in `[n]`, `[n, d]`, `[1, n, d]` and `[1, heads, n, d]`."""


def stateful_modules(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The parts of decoder layers that carry a state from token to token."""
    return [part for layer in layers for part in layer.children() if STATEFUL.search(type(part).__name__)]


def expert_modules(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The parts of decoder layers that send tokens to experts."""
    parts = [(name, part) for layer in layers for name, part in layer.named_children()]
    return [
        part for name, part in parts if "expert" in name or any("expert" in inner for inner, _ in part.named_modules())
    ]


def attention_modules(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The attention parts of decoder layers."""
    return [part for layer in layers for part in layer.children() if "Attention" in type(part).__name__]


class SegmentLoops:
    """The modules of a model that are run on one sequence of a pack after another."""

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self.modules = list(dict.fromkeys(modules))
        for module in self.modules:
            module.forward = _by_segments(module.forward)

    def undo(self) -> None:
        """Have the modules see whole packs again."""
        for module in self.modules:
            del module.forward  # the one of its class shows again
        self.modules = []


def _by_segments(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **keywords: Any) -> Any:
        segments = current_segments()
        if segments is None or len(segments.bounds) <= 2:
            return forward(*arguments, **keywords)
        outputs, n = [], segments.bounds[-1]
        for start, stop in pairwise(segments.bounds):
            with use_segments(segments.part(start, stop)):
                cut = [_rows(value, n, start, stop) for value in arguments]
                cut_keywords = {name: _rows(value, n, start, stop) for name, value in keywords.items()}
                outputs.append(forward(*cut, **cut_keywords))
        return _joined(outputs, [stop - start for start, stop in pairwise(segments.bounds)])

    return run


def _rows(value: Any, n: int, start: int, stop: int) -> Any:
    """`value`, and what it contains, cut to tokens `start` to `stop` of `n`; what isn't by token stays as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(child, n, start, stop) for child in value)
    if isinstance(value, Segments):
        return value.part(start, stop)
    if not isinstance(value, Tensor) or value.dim() not in TOKEN_DIMENSION:
        return value
    is_ids = value.dim() == 2 and value.shape == (1, n)
    dimension = 1 if is_ids else TOKEN_DIMENSION[value.dim()]
    return value.narrow(dimension, start, stop - start) if value.shape[dimension] == n else value


def _joined(outputs: list[Any], lengths: list[int]) -> Any:
    """The outputs for single sequences, end to end."""
    if isinstance(outputs[0], tuple):
        return tuple(_joined(list(parts), lengths) for parts in zip(*outputs, strict=True))
    if not isinstance(outputs[0], Tensor):
        return outputs[0]
    dimension = TOKEN_DIMENSION.get(outputs[0].dim(), -1)
    others = {part.shape[:dimension] + part.shape[dimension + 1 :] for part in outputs}
    if len(others) > 1 or [part.shape[dimension] for part in outputs] != lengths:
        return None  # attention weights, for example
    return cat(outputs, dim=dimension)
