"""What runs the model: token ids in, residuals out."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastcache.errors import ModelError

TokenIds = npt.NDArray[np.int32]
Residuals = dict[str, npt.NDArray[np.float32]]
"""The residual stream `[n, d_in]` of one sequence, by hook point."""


PACK_TOKENS = {"cpu": {"transformers": 512, "vllm": 2048}, "cuda": {"transformers": 16_384, "vllm": 16_384}}
OTHER_PACK_TOKENS = 4096


def default_pack_tokens(backend: str, device: str) -> int:
    """Tokens that go through the model together, where the user doesn't say.

    Enough to keep the device busy, few enough for its memory; on a CPU, what lies between layers stays in its caches.
    """
    return PACK_TOKENS.get(device.partition(":")[0], {}).get(backend, OTHER_PACK_TOKENS)


class LostBackendError(ModelError):
    """A backend that can't go on, with this sequence or any other: its process has to begin anew."""


class Backend(Protocol):
    """A loaded model whose residual stream is captured at some hook points."""

    hook_points: list[str]
    note: str | None
    """What a user should know of how the model is run, if anything."""

    def residuals(self, sequences: Iterable[TokenIds]) -> Iterator[Residuals]:
        """The residuals of each sequence, in order, each as if the model had seen nothing else.

        Takes a bounded number of sequences ahead of what it gives.
        """

    def close(self) -> None:
        """Let go of the model and its memory."""
