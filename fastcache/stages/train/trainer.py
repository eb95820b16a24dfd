"""One SAE being trained: parameters, optimiser, schedules, and what has to be kept to go on later."""

from typing import Any

import torch
from torch import Tensor

from fastcache.sae.architectures import (
    ARCHITECTURES,
    GatedSae,
    JumpReluSae,
    LogJumpReluSae,
    Sae,
    StandardSae,
    StepFigures,
    StepInputs,
)
from fastcache.sae.fast import gpu
from fastcache.sae.fast.adam import FastAdam
from fastcache.sae.fast.products import PLAIN, choose_route, confirm_route
from fastcache.sae.fast.step import fast_step
from fastcache.sae.fast.threads import compiles
from fastcache.sae.init import geometric_median, initialise, thresholds_for
from fastcache.sae.schedules import LearningRate, sparsity_coefficient
from fastcache.sae.spread import NEGLIGIBLE
from fastcache.stages.train.recipe import Recipe

DEAD_EVERY = 10
"""Steps between looks at which latents are dead: each look makes a GPU wait."""


def build_sae(recipe: Recipe) -> Sae:
    """The untrained SAE that `recipe` describes."""
    d_in, d_sae = recipe.d_in, recipe.d_sae
    if recipe.arch == "jumprelu":
        cls = LogJumpReluSae if recipe.theta == "log" else JumpReluSae
        return cls(d_in, d_sae, recipe.bandwidth, recipe.threshold or 1.0, recipe.target_l0)
    if recipe.arch in ("standard", "gated"):
        with_l1: type[StandardSae | GatedSae] = StandardSae if recipe.arch == "standard" else GatedSae
        return with_l1(d_in, d_sae, norm_weighted=recipe.decoder_norm == "free")
    options: dict[str, Any] = {"widths": recipe.widths} if recipe.widths else {}
    return ARCHITECTURES[recipe.arch](d_in, d_sae, k=recipe.k, **options)  # type: ignore[call-arg]


class Trainer:
    """Takes batches, one `step` each."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.recipe, self.n_steps, self.step_number = recipe, recipe.steps, 0
        self.sae = build_sae(recipe).to(device)
        self.scale = 1.0
        """What activations are multiplied with before the SAE sees them."""
        thresholds = [value for name, value in self.sae.named_parameters() if "threshold" in name]
        weights = [value for name, value in self.sae.named_parameters() if "threshold" not in name]
        groups = [{"params": weights, "factor": 1.0}, {"params": thresholds, "factor": recipe.theta_lr}]
        by_triton = not recipe.plain and gpu.trouble(self.sae.b_dec.device) is None
        self._optimizer = FastAdam([group for group in groups if group["params"]], recipe.lr, by_triton)
        self._fast = None if recipe.plain else fast_step(self.sae)
        self._route_is_chosen = False
        self._fast_adam = by_triton or (not recipe.plain and device == "cpu" and compiles)
        warm_up = round(recipe.lr_warm_up * self.n_steps)
        decay = min(round(recipe.lr_decay * self.n_steps), self.n_steps - warm_up)  # both may be rounded up
        self._rate = LearningRate(recipe.lr, recipe.lr_end, warm_up, decay, self.n_steps)
        self._coefficient_steps = round(recipe.coefficient_warm_up * self.n_steps)
        self._last_fired = torch.zeros(self.sae.d_sae, dtype=torch.long, device=device)
        self._dead = self._last_fired[:0]

    def choose_products(self) -> list[str]:
        """Pick the way to multiply, unless the checkpoint has said it; returns what the user should know of the steps."""
        if self.recipe.plain:
            return []
        recipe, notes = self.recipe, []
        if why_not := self._not_compiled():
            notes.append(f"Steps run in torch operations alone, which takes longer: {why_not}.")
        if self._fast and not self._route_is_chosen:
            self._fast.route = choose_route(recipe.precision, self.sae.b_dec.device)
            self._route_is_chosen = True
        used = self._fast.route if self._fast else PLAIN
        if recipe.precision not in ("float32", used.name):
            why = "no faster on this machine" if self._fast else f"not used by {recipe.arch}"
            notes.append(f"Products in {recipe.precision} are {why}; these are in {used.name}.")
        return notes

    def _not_compiled(self) -> str | None:
        """Why there are no compiled passes."""
        device = self.sae.b_dec.device
        if device.type == "cuda":
            trouble = gpu.trouble(device)
            return trouble and f"Triton's kernels can't be used ({trouble})"
        return None if compiles else "numba isn't here"

    @torch.no_grad()
    def initialise(self, sample: Tensor, median: Tensor | None = None) -> None:
        """Fill the parameters; `sample` `[n, d_in]` gives the scale, the decoder bias and the thresholds.

        `median` is its geometric median `[d_in]`, where that is known.
        """
        recipe = self.recipe
        if recipe.scale_activations and (power := float(sample.double().square().sum(1).mean())):
            self.scale = (recipe.d_in / power) ** 0.5
        median = self._scaled(geometric_median(sample) if median is None else median)
        sample = self._scaled(sample)
        generator = torch.Generator(self.sae.b_dec.device).manual_seed(recipe.seed)
        initialise(self.sae, median, generator, tied=recipe.init == "tied")
        if isinstance(self.sae, JumpReluSae) and recipe.threshold is None:
            self.sae.set_threshold(thresholds_for(self.sae, sample, recipe.target_l0 or recipe.d_in / 4))

    def _scaled(self, x: Tensor) -> Tensor:
        return x * self.scale if self.scale != 1.0 else x

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self._rate.at(self.step_number)

    @property
    def coefficient(self) -> float:
        """Sparsity coefficient of the next step."""
        return sparsity_coefficient(self.recipe.coefficient, self._coefficient_steps, self.step_number)

    def step(self, x: Tensor) -> StepFigures:
        """Train on a batch x `[n, d_in]`."""
        if self.step_number % DEAD_EVERY == 0 and self.recipe.aux_coefficient:
            self._dead = self._is_dead().nonzero()[:, 0]
        inputs = StepInputs(self.coefficient, self.recipe.aux_coefficient, self._dead)
        compute = self._fast or self.sae.loss_and_grads
        figures = compute(self._scaled(x), inputs)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * group["factor"]
        if self._fast_adam:
            unit_rows = self.sae.W_dec if self.recipe.decoder_norm == "unit" else None
            self._optimizer.clipped_step(self.recipe.clip_norm, unit_rows)
        else:
            self._plain_update()
        self.sae.after_step()
        self.step_number += 1
        self._last_fired.masked_fill_(figures.fired, self.step_number)
        return figures

    def _plain_update(self) -> None:
        unit_rows = self.recipe.decoder_norm == "unit"
        if self.recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.recipe.clip_norm)
        if unit_rows:
            self.sae.remove_parallel_decoder_gradient()
        self._optimizer.step()
        if unit_rows:
            self.sae.normalise_decoder()

    def _is_dead(self) -> Tensor:
        return self.step_number - self._last_fired > self.recipe.dead_window

    def _count_dead(self) -> int | None:
        """The number of dead latents; None until `dead_window` steps have passed."""
        return int(self._is_dead().sum()) if self.step_number > self.recipe.dead_window else None

    def figures(self, x: Tensor, figures: StepFigures) -> dict[str, float | None]:
        """The line of the metrics log for the step just done on x `[n, d_in]`; errors are in units of the activations.

        FVU is None for a batch whose rows are equal, but for rounding.
        """
        power = self.scale**2
        variance = float((x - x.mean(0)).square().sum(1).mean())
        squared_error = float(figures.squared_error) / power
        return {
            "step": self.step_number,
            "loss": float(figures.loss),
            "mse": squared_error / self.sae.d_in,
            "sparsity": float(figures.sparsity),
            "aux": float(figures.aux),
            "l0": float(figures.l0),
            "fvu": squared_error / variance if variance > NEGLIGIBLE * float(x.square().sum(1).mean()) else None,
            "dead_latents": self._count_dead(),
            "learning_rate": self._rate.at(self.step_number - 1),
        }

    def trained(self, sample: Tensor) -> Sae:
        """A copy of the SAE for activations as they are in the cache: with the scale folded in, and calibrated on `sample`.

        `sample` `[n, d_in]` are rows of those trained on, unscaled.
        """
        sae = self.sae.folded(self.scale)
        sae.calibrate(sample)
        return sae

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The training state: a JSON-ready part, and all tensors by name."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
        scalars: dict[str, Any] = {"step": self.step_number, "scale": self.scale}
        if self._fast:
            scalars |= {"route": self._fast.route.name, "sparse": self._fast.sparse}
        return scalars, {**tensors, "last_fired": self._last_fired, "dead": self._dead}

    def load_state_dict(self, scalars: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go back to where `state_dict` was taken."""
        prefix = "sae."
        self.sae.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        state: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        device = self.sae.b_dec.device
        self._last_fired, self._dead = tensors["last_fired"].to(device), tensors["dead"].to(device)
        self.step_number, self.scale = scalars["step"], scalars["scale"]
        if self._fast and "route" in scalars:
            route = confirm_route(scalars["route"], self.recipe.precision, device)
            self._fast.route, self._fast.sparse = route or self._fast.route, scalars["sparse"]
            self._route_is_chosen = route is not None
