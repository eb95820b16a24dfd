"""Training steps that bench_train.py compares: ours, three libraries', a minimal eager one, and the bare products.

Each maker returns a function of a batch. All begin with the same weights; a learning rate near 0 keeps the L0 that was asked
for. Losses are each library's own; all clip the gradient to norm 1 and take an Adam step, where the library does.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from fastcache.sae.fast import step as fast_step_module
from fastcache.sae.fast.products import PLAIN, Route
from fastcache.stages.train import trainer as trainer_module
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.recipe import resolve
from fastcache.stages.train.trainer import Trainer

Step = Callable[[Tensor], object]
LR, COEFFICIENT, BANDWIDTH = 1e-9, 1.0, 0.05


@dataclass
class Problem:
    """A shape, weights, and what makes `l0` latents active."""

    arch: str
    d_in: int
    d_sae: int
    batch: int
    l0: int
    batches: list[Tensor]

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        directions = torch.randn(self.d_sae, self.d_in, generator=generator)
        self.W_dec = directions / directions.norm(dim=1, keepdim=True)
        z = (self.batches[0][:256] @ self.W_dec.T).flatten()
        self.cut = float(z.kthvalue(int(len(z) * (1 - self.l0 / self.d_sae))).values)

    def fill(self, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, threshold: Tensor | None = None) -> None:
        """Give a library's parameters, as `[d_in, d_sae]` and `[d_sae, d_in]`, the weights of this problem."""
        W_enc.data.copy_(self.W_dec.T)
        W_dec.data.copy_(self.W_dec)
        if threshold is None:
            b_enc.data.fill_(-self.cut)
        else:
            threshold.data.fill_(self.cut)


def products(problem: Problem, route: Route) -> Step:
    """The five products of a dense step, and nothing else."""
    n, d_in, d_sae, dtype = problem.batch, problem.d_in, problem.d_sae, route.dtype
    wide, grad = torch.randn(n, d_sae).to(dtype), torch.randn(n, d_sae).to(dtype)
    error, weights = torch.randn(n, d_in).to(dtype), problem.W_dec.to(dtype)
    out_wide, out_narrow, out_weights = torch.empty_like(wide), torch.empty_like(error), torch.empty_like(weights)
    device = torch.device("cpu")

    def step(x: Tensor) -> None:
        with route.active(device):
            torch.mm(x.to(dtype), weights.T, out=out_wide)
            torch.mm(wide, weights, out=out_narrow)
            torch.mm(wide.T, error, out=out_weights)
            torch.mm(error, weights.T, out=out_wide)
            torch.mm(grad.T, error, out=out_weights)

    return step


def ours(problem: Problem, way: str, route: Route = PLAIN) -> Step:
    """`plain`, `torch` (no compiler), `dense` (compiled), or `sparse`."""
    threshold = {"threshold": problem.cut, "bandwidth": BANDWIDTH} if problem.arch == "jumprelu" else {}
    config = TrainConfig(
        cache="", arch=problem.arch, expansion=problem.d_sae // problem.d_in, lr=LR, coefficient=COEFFICIENT,
        coefficient_warm_up=0.0, lr_warm_up=0.0, batch_size=problem.batch, aux_coefficient=0.0, scale_activations=False,
        decoder_norm="free", plain=way == "plain", target_l0=problem.l0 if problem.arch == "jumprelu" else None, **threshold,
    )  # fmt: skip
    recipe = resolve(config, problem.d_in, 10**7)
    compiles = way != "torch" and fast_step_module.compiles
    with patch.object(fast_step_module, "compiles", compiles), patch.object(trainer_module, "compiles", compiles):
        trainer = Trainer(recipe, "cpu")
    sae = trainer.sae
    problem.fill(sae.W_enc, sae.W_dec, sae.b_enc, sae.threshold if problem.arch == "jumprelu" else None)
    if trainer._fast:
        trainer._fast.route = route
    if way in ("dense", "sparse"):  # from the first step on, whatever its L0
        trainer._fast.sparse = way == "sparse"
    if way == "sparse":
        return trainer.step

    def step(x: Tensor) -> object:
        with patch.object(fast_step_module, "wins", lambda *_: False):
            return trainer.step(x)

    return step


def saelens(problem: Problem) -> Step:
    """SAELens v6's trainer: autograd, clipping, Adam, its counters of dead latents."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes import (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.training.sae_trainer import SAETrainer

    shape = {"d_in": problem.d_in, "d_sae": problem.d_sae}
    if problem.arch == "standard":
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shape, l1_coefficient=COEFFICIENT))
        problem.fill(sae.W_enc, sae.W_dec, sae.b_enc)
    elif problem.arch == "jumprelu":
        more = {"l0_coefficient": COEFFICIENT, "jumprelu_bandwidth": BANDWIDTH, "jumprelu_init_threshold": problem.cut}
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**shape, **more))
        problem.fill(sae.W_enc, sae.W_dec, sae.b_enc, torch.empty(problem.d_sae))
    else:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=problem.l0))
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=problem.batch, lr=LR, lr_end=LR, autocast=False
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def dictionary_learning(problem: Problem) -> Step:
    """Its own trainer and initialisation: Standard, or JumpReLU, whose loss aims at an L0."""
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.standard import StandardTrainer

    shape = {"steps": 10**6, "activation_dim": problem.d_in, "dict_size": problem.d_sae, "layer": 0, "lm_name": "none"}
    if problem.arch == "standard":
        trainer = StandardTrainer(**shape, lr=LR, device="cpu")
    else:
        trainer = JumpReluTrainer(**shape, lr=LR, bandwidth=BANDWIDTH, target_l0=problem.l0, device="cpu")
    number = [0]

    def step(x: Tensor) -> None:
        trainer.update(number[0], x)
        number[0] += 1

    return step


def sparsify(problem: Problem) -> Step:
    """sparsify's TopK coder with k = L0; the loop around it is that of its trainer, with Adam."""
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(problem.d_in, SparseCoderConfig(num_latents=problem.d_sae, k=problem.l0), dtype=torch.float32)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR)

    def step(x: Tensor) -> None:
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        coder.set_decoder_norm_to_unit_norm()

    return step


class _Jump(torch.autograd.Function):
    """The straight-through estimators of f and of L0 in one function."""

    @staticmethod
    def forward(ctx, z, theta):
        active = (z > theta).float()
        ctx.save_for_backward(z, theta, active)
        return z * active, active

    @staticmethod
    def backward(ctx, grad_acts, grad_l0):
        z, theta, active = ctx.saved_tensors
        rectangle = ((z - theta).abs() < BANDWIDTH / 2).float() / BANDWIDTH
        return grad_acts * active, -((theta * grad_acts + grad_l0) * rectangle).sum(0)


def eager(problem: Problem) -> Step:
    """What one writes first: autograd, clipping, fused Adam."""
    shapes = ((problem.d_in, problem.d_sae), (problem.d_sae, problem.d_in), problem.d_sae, problem.d_in, problem.d_sae)
    W_enc, W_dec, b_enc, b_dec, theta = (torch.nn.Parameter(torch.zeros(shape)) for shape in shapes)
    jump = problem.arch == "jumprelu"
    problem.fill(W_enc, W_dec, b_enc, theta if jump else None)
    parameters = [W_enc, W_dec, b_enc, b_dec, *([theta] if jump else [])]
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)

    def step(x: Tensor) -> None:
        z = x @ W_enc + b_enc
        if jump:
            acts, sparsity = _Jump.apply(z, theta)
        else:
            acts = z.relu()
            sparsity = acts * W_dec.norm(dim=1)
        loss = (acts @ W_dec + b_dec - x).square().sum(1).mean() + COEFFICIENT * sparsity.sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


PEERS: dict[str, tuple[str, Callable[[Problem], Step]]] = {
    "SAELens": ("sae_lens", saelens),
    "dictionary_learning": ("dictionary_learning", dictionary_learning),
    "sparsify TopK": ("sparsify", sparsify),
}
