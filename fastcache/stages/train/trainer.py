"""One SAE being trained: parameters, optimiser, schedules, and what has to be kept to go on later."""

import math
from typing import Any

import torch
from torch import Tensor

from fastcache.errors import NonFiniteError
from fastcache.sae.architectures import ARCHITECTURES, JumpReluSae, Sae, StepFigures
from fastcache.sae.init import initialise
from fastcache.sae.schedules import LearningRate, sparsity_coefficient
from fastcache.stages.train.config import TrainConfig


def build_sae(config: TrainConfig, d_in: int) -> Sae:
    """The untrained SAE that `config` describes."""
    d_sae = config.expansion * d_in
    if config.arch == "jumprelu":
        return JumpReluSae(d_in, d_sae, config.bandwidth, config.threshold)
    return ARCHITECTURES[config.arch](d_in, d_sae)


class Trainer:
    """Takes batches, one `step` each."""

    def __init__(self, config: TrainConfig, d_in: int, n_steps: int, device: str) -> None:
        self.config, self.n_steps, self.step_number = config, n_steps, 0
        self.sae = build_sae(config, d_in).to(device)
        self._optimizer = torch.optim.Adam(self.sae.parameters(), lr=config.lr, betas=(0.9, 0.999), fused=True)
        warm_up, decay = round(config.lr_warm_up * n_steps), round(config.lr_decay * n_steps)
        self._rate = LearningRate(config.lr, config.lr_end, warm_up, decay, n_steps)
        self._coefficient_steps = round(config.coefficient_warm_up * n_steps)
        self._last_fired = torch.zeros(self.sae.d_sae, dtype=torch.long, device=device)

    def initialise(self, sample: Tensor) -> None:
        """Fill the parameters; `sample` `[n, d_in]` gives the decoder bias."""
        generator = torch.Generator(self.sae.b_dec.device).manual_seed(self.config.seed)
        initialise(self.sae, sample, generator)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self._rate.at(self.step_number)

    @property
    def coefficient(self) -> float:
        """Sparsity coefficient of the next step."""
        return sparsity_coefficient(self.config.resolved_coefficient(), self._coefficient_steps, self.step_number)

    def step(self, x: Tensor) -> StepFigures:
        """Train on a batch x `[n, d_in]`."""
        figures = self.sae.loss_and_grads(x, self.coefficient)
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.config.clip_norm)
        self.sae.remove_parallel_decoder_gradient()
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._optimizer.step()
        self.sae.normalise_decoder()
        self.step_number += 1
        self._last_fired.masked_fill_(figures.fired, self.step_number)
        return figures

    def figures(self, x: Tensor, figures: StepFigures) -> dict[str, float | None]:
        """The line of the metrics log for the step just done on x `[n, d_in]`; raises `NonFiniteError` for NaN."""
        variance = float((x - x.mean(0)).square().sum(1).mean())
        dead = (self.step_number - self._last_fired > self.config.dead_window).sum()
        line: dict[str, float | None] = {
            "step": self.step_number,
            "loss": float(figures.loss),
            "mse": float(figures.squared_error) / self.sae.d_in,
            "sparsity": float(figures.sparsity),
            "l0": float(figures.l0),
            "fvu": float(figures.squared_error) / variance if variance else None,  # a batch of equal rows has none
            "dead_latents": int(dead),
            "learning_rate": self._rate.at(self.step_number - 1),
        }
        odd = {name: value for name, value in line.items() if value is not None and not math.isfinite(value)}
        if odd:
            raise NonFiniteError(
                f"Training became NaN or infinite at or before step {self.step_number}: {odd}. "
                "The last checkpoint is kept. Try a lower --lr, or look at the cache with `fastcache inspect`."
            )
        return line

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the training state, by name."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
        return {**tensors, "last_fired": self._last_fired}

    def load_state_dict(self, tensors: dict[str, Tensor], step_number: int) -> None:
        """Go back to where `state_dict` was taken."""
        prefix = "sae."
        self.sae.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        state: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        self._last_fired = tensors["last_fired"].to(self.sae.b_dec.device)
        self.step_number = step_number
