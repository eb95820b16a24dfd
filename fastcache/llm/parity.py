"""The parity gate: before anything is written, a few sequences are compared with the plain model.

The reference is the whole model as its authors' library runs it, float32, one sequence at a time; the residual stream
is read from `output_hidden_states`, which shares nothing with the backends' hooks (but for the last layer, whose entry
there is after the final norm and which is therefore hooked).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastcache.cache_format.schema import layer_of
from fastcache.errors import MismatchError
from fastcache.llm.backend import Backend, Residuals, TokenIds
from fastcache.llm.loading import ModelSource, decoder_layers, load_base_model

RELATIVE_LIMITS = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
"""Largest relative L2 difference of a sequence, by the dtype that the backend runs in."""


def spread(lengths: Sequence[int], count: int) -> list[int]:
    """Indices of `count` sequences spread evenly over the sorted lengths, the shortest and the longest included."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    picks = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return [order[pick] for pick in picks]


def reference_residuals(source: ModelSource, hook_points: Sequence[str]) -> Callable[[TokenIds], Residuals]:
    """A function that computes the residuals of one sequence with the plain, whole, float32 model on the CPU."""
    model: Any = load_base_model(source, None, torch.float32, "cpu")
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    last: list[torch.Tensor] = []

    def keep_last(_module: Any, _inputs: Any, output: Any) -> None:
        last[:] = [output[0] if isinstance(output, tuple) else output]

    decoder_layers(model, n_layers)[-1].register_forward_hook(keep_last)

    @torch.inference_mode()
    def residuals(token_ids: TokenIds) -> Residuals:
        ids = torch.from_numpy(token_ids.astype(np.int64))[None]
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        by_layer = {
            layer: last[0] if layer == n_layers - 1 else states[layer + 1] for layer in map(layer_of, hook_points)
        }
        return {hook: by_layer[layer_of(hook)][0].numpy() for hook in hook_points}

    return residuals


def relative_difference(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """The L2 norm of the difference by that of `expected`."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check_parity(
    backend: Backend,
    reference: Callable[[TokenIds], Residuals],
    sequences: Sequence[TokenIds],
    model_dtype: str,
) -> dict[str, Any]:
    """Compare backend and reference; returns the figures for the manifest, by hook point.

    Raises `MismatchError` if the relative L2 difference of a sequence is above the limit of the dtype.
    """
    figures: dict[str, Any] = {}
    for token_ids, found in zip(sequences, backend.residuals(sequences), strict=True):
        expected = reference(token_ids)
        for hook in expected:
            absolute = float(np.abs(found[hook] - expected[hook]).max())
            relative = relative_difference(found[hook], expected[hook])
            entry = figures.setdefault(hook, {"max_abs_difference": 0.0, "max_relative_l2": 0.0})
            entry["max_abs_difference"] = max(entry["max_abs_difference"], absolute)
            entry["max_relative_l2"] = max(entry["max_relative_l2"], relative)
            if not relative <= RELATIVE_LIMITS[model_dtype]:
                raise MismatchError(
                    f"Parity check: a sequence of {len(token_ids)} tokens differs from the plain float32 model by "
                    f"{relative:.2e} (relative L2) at {hook}; the limit for {model_dtype} is "
                    f"{RELATIVE_LIMITS[model_dtype]:.0e}. No activations were written. Try --model-dtype float32."
                )
    lengths = [len(token_ids) for token_ids in sequences]
    return {
        "reference": "transformers, whole model, float32, unbatched, cpu",
        "lengths": lengths,
        "hook_points": figures,
    }
