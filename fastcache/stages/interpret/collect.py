"""What is kept of each latent while dialogues stream by: memory is bounded by the number of latents, not by that of tokens.

Kept are the contexts of the highest activations, each of another dialogue; a context drawn uniformly from the activations in
each of `BINS` bins; how many activations fell into each bin; on how many tokens of each set the latent was active; and in which
of a few windows, drawn without regard to any latent, it was active at all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 24
LOWEST = -12
"""Bins are of log2 of the activation, one a doubling, from 2^-12 up; what is below or above is in the first or last."""

NOWHERE = -1
HIGHEST = torch.finfo(torch.float16).max

WINDOWS = 64
"""Drawn, each of another dialogue."""


def bin_of(values: Tensor) -> Tensor:
    """The bin of each positive activation."""
    return (values.clamp(min=2.0 ** (LOWEST - 1)).log2().floor().long() - LOWEST).clamp(0, BINS - 1)


@dataclass
class Contexts:
    """`c` contexts of each latent; a place that is empty has position `NOWHERE`."""

    key: Tensor
    """What the contexts are chosen by, highest first or one a bin, `[d_sae, c]`."""
    value: Tensor
    """Activation at the context's token, `[d_sae, c]`."""
    dialogue: Tensor
    position: Tensor
    around: Tensor
    """Activations on the tokens around it, `[d_sae, c, 2 window + 1]`; 0 beyond the dialogue."""

    @classmethod
    def empty(cls, d_sae: int, count: int, window: int, device: str) -> "Contexts":
        """None yet."""
        whole = torch.full((d_sae, count), NOWHERE, dtype=torch.int32, device=device)
        none = torch.zeros(d_sae, count, device=device)
        around = torch.zeros(d_sae, count, 2 * window + 1, dtype=torch.float16, device=device)
        return cls(none.clone(), none.clone(), whole.clone(), whole.clone(), around)

    def put(self, latents: Tensor, places: Tensor, key: Tensor, acts: Tensor, dialogue: int, positions: Tensor) -> None:
        """Set contexts of `latents` at `places`, `[m]` each; acts `[n, d_sae]` are those of the dialogue."""
        window = self.around.shape[2] // 2
        rows = positions[:, None] + torch.arange(-window, window + 1, device=acts.device)
        inside = (rows >= 0) & (rows < len(acts))
        self.key[latents, places] = key
        self.value[latents, places] = acts[positions, latents]
        self.dialogue[latents, places] = dialogue
        self.position[latents, places] = positions.int()
        around = acts[rows.clamp(0, len(acts) - 1), latents[:, None]] * inside
        self.around[latents, places] = around.clamp(max=HIGHEST).half() + 0  # 0, not -0


def window_dialogues(n_instances: int, seed: int) -> dict[int, int]:
    """Which dialogues the drawn windows are of, and the number of each window."""
    drawn = torch.randperm(n_instances, generator=torch.Generator().manual_seed(seed))[:WINDOWS]
    return {dialogue: number for number, dialogue in enumerate(drawn.sort().values.tolist())}


class Collector:
    """Takes in one dialogue after the other."""

    def __init__(
        self, d_sae: int, n_instances: int, n_sets: int, top: int, window: int, seed: int, device: str
    ) -> None:
        """For `n_instances` dialogues; `n_sets` of tokens are counted."""
        self.top = Contexts.empty(d_sae, top, window, device)
        self.drawn = Contexts.empty(d_sae, BINS, window, device)
        self.histogram = torch.zeros(d_sae, BINS, dtype=torch.long, device=device)
        self.active = torch.zeros(d_sae, n_sets, dtype=torch.long, device=device)
        self.total = torch.zeros(d_sae, dtype=torch.double, device=device)
        self.n_tokens = torch.zeros(n_sets, dtype=torch.long, device=device)
        self.window_of = window_dialogues(n_instances, seed)
        self.window_position = torch.full((len(self.window_of),), NOWHERE, dtype=torch.int32)
        self.active_in = torch.zeros(d_sae, len(self.window_of), dtype=torch.bool, device=device)
        self._window, self._seed = window, seed

    def add(self, acts: Tensor, masks: Tensor, dialogue: int) -> None:
        """The latent activations `[n, d_sae]` of a dialogue, and bool masks `[sets, n]` of its tokens."""
        self._keep_highest(acts, dialogue)
        rows, latents = acts.nonzero(as_tuple=True)
        values = acts[rows, latents]
        bins = bin_of(values)
        self.histogram.view(-1).index_add_(0, latents * BINS + bins, torch.ones_like(latents))
        self.active += torch.stack([latents[mask[rows]].bincount(minlength=len(self.active)) for mask in masks], 1)
        self.total += acts.sum(0).double()
        self.n_tokens += masks.sum(1)
        self._draw(acts, rows, latents, bins, dialogue)
        if (number := self.window_of.get(dialogue)) is not None:
            self._look_into(number, acts)

    def _keep_highest(self, acts: Tensor, dialogue: int) -> None:
        value, position = acts.max(0)
        lowest = self.top.key.amin(1)
        # Of equal ones the last dialogue makes room: which are kept doesn't hang on the order of places.
        place = torch.where(self.top.key == lowest[:, None], self.top.dialogue, NOWHERE - 1).argmax(1)
        latents = (value > lowest).nonzero()[:, 0]
        self.top.put(latents, place[latents], value[latents], acts, dialogue, position[latents])

    def _draw(self, acts: Tensor, rows: Tensor, latents: Tensor, bins: Tensor, dialogue: int) -> None:
        """Of all activations in a bin that with the largest random number stays: each is as likely as any other."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + dialogue) % 2**63)
        keys = 1 - torch.rand(len(rows), generator=generator).to(acts.device)  # above 0
        cells = latents * BINS + bins
        largest = torch.zeros(self.drawn.key.numel(), device=acts.device).scatter_reduce_(0, cells, keys, "amax")
        chosen = ((keys == largest[cells]) & (keys > self.drawn.key.view(-1)[cells])).nonzero()[:, 0]
        self.drawn.put(latents[chosen], bins[chosen], keys[chosen], acts, dialogue, rows[chosen])

    def _look_into(self, number: int, acts: Tensor) -> None:
        """The window around a token drawn from the dialogue."""
        position = int(torch.randint(len(acts), (), generator=torch.Generator().manual_seed(self._seed + number)))
        self.window_position[number] = position
        self.active_in[:, number] = acts[max(0, position - self._window) : position + self._window + 1].amax(0) > 0

    def state(self) -> dict[str, Tensor]:
        """Everything, for a checkpoint; see `load`."""
        contexts = {"top": self.top, "drawn": self.drawn}
        state = {f"{kind}.{name}": value for kind, each in contexts.items() for name, value in vars(each).items()}
        return {
            **state,
            "histogram": self.histogram,
            "active": self.active,
            "total": self.total,
            "n_tokens": self.n_tokens,
            "window_position": self.window_position,
            "active_in": self.active_in,
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        for name, value in self.state().items():
            value.copy_(state[name])
