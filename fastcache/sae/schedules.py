"""The learning rate in three phases, and the warm-up of the sparsity coefficient: pure functions of the step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to `peak`; cosine to `end`; linear to 0 over the last `decay_steps` (docs/method.md)."""

    peak: float
    end: float
    warm_up_steps: int
    decay_steps: int
    total_steps: int

    def __post_init__(self) -> None:
        """Raise `ValueError` for phases that overlap: the rate would jump."""
        if self.warm_up_steps + self.decay_steps > self.total_steps:
            raise ValueError(
                f"{self.warm_up_steps} steps of warm-up and {self.decay_steps} of decay are more than {self.total_steps}"
            )

    def at(self, step: int) -> float:
        """Learning rate of step `step`, the first of which is 0."""
        if step < self.warm_up_steps:
            return self.peak * (step + 1) / self.warm_up_steps
        decay_start = self.total_steps - self.decay_steps
        if step < decay_start:
            done = (step - self.warm_up_steps) / (decay_start - self.warm_up_steps)
            return self.end + (self.peak - self.end) * 0.5 * (1 + math.cos(math.pi * done))
        return self.end * (self.total_steps - step) / self.decay_steps


def sparsity_coefficient(final: float, warm_up_steps: int, step: int) -> float:
    """Linear from 0 to `final` over `warm_up_steps`."""
    return final * min(1.0, step / warm_up_steps) if warm_up_steps else final
