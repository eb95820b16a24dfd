"""The parity gate: before anything is written, a few sequences are compared with the plain model.

The reference (`reference.py`) is the whole model as users of transformers load and run it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcache.errors import MismatchError, NonFiniteError
from fastcache.llm.backend import Backend, Residuals, TokenIds
from fastcache.llm.loading import ModelSource
from fastcache.llm.reference import Reference

RELATIVE_LIMITS = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
"""Largest relative L2 difference of a sequence, by the dtype that the backend runs in."""


def spread(lengths: Sequence[int], count: int) -> list[int]:
    """Indices of `count` sequences spread evenly over the sorted lengths, the shortest and the longest included."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    picks = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return [order[pick] for pick in picks]


def reference_residuals(source: ModelSource, hook_points: Sequence[str]) -> Callable[[TokenIds], Residuals]:
    """A function that computes the residuals of one sequence with the plain, whole, float32 model on the CPU."""
    reference = Reference(source, hook_points)
    return lambda token_ids: next(reference.residuals([token_ids]))


def relative_difference(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """The L2 norm of the difference by that of `expected`."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check_parity(
    backend: Backend,
    reference: Callable[[TokenIds], Residuals],
    sequences: Sequence[TokenIds],
    model_dtype: str,
    skip_nonfinite: bool = False,
) -> dict[str, Any]:
    """Compare backend and reference; returns the figures for the manifest, by hook point.

    With `skip_nonfinite`, sequences for which the reference has NaN or infinity are not compared.
    Raises `MismatchError` if the relative L2 difference of a sequence is above the limit of the dtype, and
    `NonFiniteError` if the reference is not finite where it should be, or for no sequence.
    """
    figures: dict[str, Any] = {}
    lengths: list[int] = []
    for token_ids, found in zip(sequences, backend.residuals(sequences), strict=True):
        expected = reference(token_ids)
        if not all(np.isfinite(rows).all() for rows in expected.values()):
            if skip_nonfinite:
                continue
            raise NonFiniteError(
                f"Parity check: the plain float32 model itself gives NaN or infinity for a sequence of {len(token_ids)} "
                "tokens. No activations were written. --on-nonfinite skip leaves such dialogues out; if there are many, the "
                "weights are damaged."
            )
        lengths.append(len(token_ids))
        for hook in expected:
            absolute = float(np.abs(found[hook] - expected[hook]).max())
            relative = relative_difference(found[hook], expected[hook])
            entry = figures.setdefault(hook, {"max_abs_difference": 0.0, "max_relative_l2": 0.0})
            entry["max_abs_difference"] = max(entry["max_abs_difference"], absolute)
            entry["max_relative_l2"] = max(entry["max_relative_l2"], relative)
            if not relative <= RELATIVE_LIMITS[model_dtype]:
                advice = "" if model_dtype == "float32" else " Try --model-dtype float32."
                raise MismatchError(
                    f"Parity check: a sequence of {len(token_ids)} tokens differs from the plain float32 model by "
                    f"{relative:.2e} (relative L2) at {hook}; the limit for {model_dtype} is "
                    f"{RELATIVE_LIMITS[model_dtype]:.0e}. No activations were written.{advice}"
                )
    if not lengths:
        raise NonFiniteError(
            "Parity check: the plain float32 model gives NaN or infinity for every sequence that was compared, so its weights "
            "are damaged. No activations were written. Take the model from its publisher again."
        )
    return {
        "reference": "transformers, whole model, float32, unbatched, cpu",
        "lengths": lengths,
        "hook_points": figures,
    }
