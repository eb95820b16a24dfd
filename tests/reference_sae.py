"""The losses of all architectures, written out again for autograd, with the straight-through estimators."""

import torch


class JumpRelu(torch.autograd.Function):
    """f = z H(z - theta), with the straight-through gradients of the paper."""

    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return z * (z > theta)

    @staticmethod
    def backward(ctx, grad):
        z, theta = ctx.saved_tensors
        rectangle = (((z - theta) / ctx.bandwidth).abs() < 0.5).to(z)
        return grad * (z > theta), (grad * -(theta / ctx.bandwidth) * rectangle).sum(0), None


class Step(torch.autograd.Function):
    """H(z - theta)."""

    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).to(z)

    @staticmethod
    def backward(ctx, grad):
        z, theta = ctx.saved_tensors
        rectangle = (((z - theta) / ctx.bandwidth).abs() < 0.5).to(z)
        return torch.zeros_like(z), (grad * (-1 / ctx.bandwidth) * rectangle).sum(0), None


def squared(error):
    return (error**2).sum(1).mean()


def l1(sae, p, f):
    weights = p["W_dec"].norm(dim=1) if sae.norm_weighted else 1.0
    return (f * weights).sum(1).mean()


def keep(values, mask):
    return torch.where(mask, values, torch.zeros_like(values))


def top_mask(values, k):
    threshold = values.detach().sort(dim=-1, descending=True).values[..., k - 1 : k]
    return values >= threshold


def latents(sae, p, x):
    """Pre-activations, latent activations and sparsity term."""
    name = sae.architecture
    if name == "gated":
        pi = x @ p["W_enc"]
        gate = pi + p["b_gate"]
        f = (gate > 0) * torch.relu(p["r_mag"].exp() * pi + p["b_mag"])
        return gate, f, l1(sae, p, torch.relu(gate))
    z = x @ p["W_enc"] + p["b_enc"]
    if name == "standard":
        f = torch.relu(z)
        return z, f, l1(sae, p, f)
    if name == "topk":
        return z, keep(torch.relu(z), top_mask(z, sae.k)), torch.zeros(())
    if name in ("batchtopk", "matryoshka"):
        f = torch.relu(z)
        return z, keep(f.flatten(), top_mask(f.flatten(), sae.k * len(x))).view_as(z), torch.zeros(())
    theta = p["log_threshold"].exp() if "log_threshold" in p else p["threshold"]
    l0 = Step.apply(z, theta, sae.bandwidth).sum(1)
    sparsity = l0.mean() if sae.target_l0 is None else (2 / sae.target_l0 * (l0 - sae.target_l0) ** 2).mean()
    return z, JumpRelu.apply(z, theta, sae.bandwidth), sparsity


def loss(sae, p, x, inputs):
    """The whole loss of `sae` with parameters `p` on x."""
    z, f, sparsity = latents(sae, p, x)
    widths = getattr(sae, "widths", (sae.d_sae,))
    recons = [f[:, :width] @ p["W_dec"][:width] + p["b_dec"] for width in widths]
    total = sum(squared(recon - x) for recon in recons) + inputs.coefficient * sparsity
    if sae.architecture == "gated":
        via_gate = torch.relu(z) @ p["W_dec"].detach() + p["b_dec"].detach()
        return total + squared(via_gate - x)
    if inputs.dead is not None:
        k = sae.d_in // 2
        dead = torch.zeros(sae.d_sae, dtype=bool)
        dead[inputs.dead] = True
        among_dead = torch.where(dead, z, torch.full_like(z, -torch.inf))
        mask = top_mask(among_dead, min(k, len(inputs.dead))) & dead
        missed = (x - recons[-1]).detach()
        weight = inputs.aux_coefficient * min(1, len(inputs.dead) / k)
        total = total + weight * squared(keep(z, mask) @ p["W_dec"] - missed)
    return total


def loss_and_grads(sae, x, inputs):
    """The loss and the gradient of each parameter by autograd."""
    p = {name: value.detach().clone().requires_grad_() for name, value in sae.named_parameters()}
    total = loss(sae, p, x, inputs)
    total.backward()
    return total.detach(), {name: value.grad for name, value in p.items()}
