"""Memory that a step uses again and again: pages that are new cost as much as the arithmetic on them."""

import math

import torch
from torch import Tensor


class Buffers:
    """Tensors by name, made when they are first asked for, and again when more is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor with anything in it; of one name there is one at a time."""
        held, n = self._held.get(name), math.prod(shape)
        if held is None or held.dtype != dtype or held.numel() < n:
            held = self._held[name] = torch.empty(n, dtype=dtype, device=self._device)
        return held[:n].view(shape)
