"""One implicit meta-gradient of conv4 written in other ways; `meta_gradient.py` measures them.

All take the same steps from the same start on the same inner problem and return the mean query loss and its gradient.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import implicitlayer as il

try:
    import torchopt
except ImportError:  # not a reason to stop: the table then says why the row is missing
    torchopt = None

Params = dict[str, torch.Tensor]
Gradient = tuple[float, Params]  # mean query loss and its meta-gradient


@dataclass(frozen=True)
class Settings:
    num_tasks: int = 16
    num_filters: int = 64
    num_query: int = 15
    inner_steps: int = 16
    cg_steps: int = 5
    step_size: float = 0.02  # 0.1 overshoots from an untrained start, and curvature turns negative in some tasks
    strength: float = 2.0


def conv4(s: Settings) -> il.fewshot.Conv4:
    return il.fewshot.conv4(num_ways=5, num_filters=s.num_filters)


# --- torch's own layers, one task at a time.


def plain_logits(params: Params, images: torch.Tensor) -> torch.Tensor:
    x = images
    for block in range(1, 5):
        x = F.conv2d(x, params[f"conv{block}.weight"], None, stride=2, padding=1)
        x = F.batch_norm(x, None, None, params[f"norm{block}.weight"], params[f"norm{block}.bias"], training=True)
        x = F.relu(x)
    return F.linear(x.flatten(1), params["head.weight"], params["head.bias"])


def to_plain(params: Params, layout: torch.memory_format) -> Params:
    """The same network with torch's axes: filters [F, C, 3, 3] and a head that reads (channel, row, column)."""
    plain = {}
    for name, p in params.items():
        if name.startswith("conv"):
            p = p.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        elif name == "head.weight":
            num_filters = params["conv4.weight"].shape[0]
            p = p.unflatten(1, (-1, num_filters)).mT.flatten(1).contiguous()
        plain[name] = p
    return plain


def from_plain(plain: Params) -> Params:
    params = {}
    for name, p in plain.items():
        if name.startswith("conv"):
            p = p.permute(0, 2, 3, 1)
        elif name == "head.weight":
            p = p.unflatten(1, (plain["conv4.weight"].shape[0], -1)).mT.flatten(1)
        params[name] = p
    return params


def plain_gradient(params: Params, images: Any, labels: Any, keep: bool = False) -> tuple[float, list, list]:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    loss = F.cross_entropy(plain_logits(leaves, images), labels)
    gradient = torch.autograd.grad(loss, list(leaves.values()), create_graph=keep)
    return loss.item(), list(leaves.values()), list(gradient)


def plain_adapt(theta: Params, images: Any, labels: Any, s: Settings) -> Params:
    phi = theta
    for _ in range(s.inner_steps):
        _, _, gradient = plain_gradient(phi, images, labels)
        phi = {
            name: p - s.step_size * (g + s.strength * (p - t))
            for (name, p), g, t in zip(phi.items(), gradient, theta.values(), strict=True)
        }
    return phi


def loop(theta: Params, tasks: Any, s: Settings, layout: torch.memory_format = torch.contiguous_format) -> Gradient:
    plain = to_plain(theta, layout)
    sizes = [p.numel() for p in plain.values()]

    def one_task(images: Any, labels: Any, query_images: Any, query_labels: Any) -> tuple[float, torch.Tensor]:
        phi = plain_adapt(plain, images, labels, s)
        loss, _, v = plain_gradient(phi, query_images, query_labels)
        _, leaves, gradient = plain_gradient(phi, images, labels, keep=True)

        def product(u: torch.Tensor) -> torch.Tensor:
            parts = [part.view(p.shape) for part, p in zip(u.split(sizes), leaves, strict=True)]
            return u + flat(torch.autograd.grad(gradient, leaves, parts, retain_graph=True)) / s.strength

        return loss, conjugate_gradient(product, flat(v), s.cg_steps)

    return plain_mean(tasks, plain, one_task, layout)


def conjugate_gradient(product: Callable, b: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Textbook conjugate gradients; b: [..., n]."""
    x, r, p = torch.zeros_like(b), b, b
    rr = (r * r).sum(-1, keepdim=True)
    for _ in range(num_steps):
        ap = product(p)
        alpha = rr / (p * ap).sum(-1, keepdim=True)
        x, r = x + alpha * p, r - alpha * ap
        new_rr = (r * r).sum(-1, keepdim=True)
        rr, p = new_rr, r + (new_rr / rr) * p
    return x


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def plain_mean(tasks: Any, plain: Params, one_task: Callable, layout: torch.memory_format) -> Gradient:
    losses, total = [], None
    for images, labels, query_images, query_labels in zip(*tasks, strict=True):
        loss, gradient = one_task(
            images.contiguous(memory_format=layout), labels, query_images.contiguous(memory_format=layout), query_labels
        )
        losses.append(loss)
        total = gradient if total is None else total + gradient
    parts = (total / len(losses)).split([p.numel() for p in plain.values()])
    mean = {name: part.view(p.shape) for (name, p), part in zip(plain.items(), parts, strict=True)}
    return statistics.mean(losses), from_plain(mean)


def torchopt_loop(theta: Params, tasks: Any, s: Settings, layout: torch.memory_format) -> Gradient:
    plain = to_plain(theta, layout)
    names = list(plain)

    def loss_of(values: tuple, images: Any, labels: Any) -> torch.Tensor:
        return F.cross_entropy(plain_logits(dict(zip(names, values, strict=True)), images), labels)

    def optimality(phi: tuple, start: tuple, images: Any, labels: Any) -> tuple:
        gradient = torch.func.grad(loss_of)(phi, images, labels)
        return tuple(g + s.strength * (p - t) for g, p, t in zip(gradient, phi, start, strict=True))

    solve = torchopt.linear_solve.solve_cg(maxiter=s.cg_steps, rtol=0.0, atol=0.0)

    @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve)
    def adapt(phi: tuple, start: tuple, images: Any, labels: Any) -> tuple:
        with torch.enable_grad():
            return tuple(plain_adapt(dict(zip(names, start, strict=True)), images, labels, s).values())

    def one_task(images: Any, labels: Any, query_images: Any, query_labels: Any) -> tuple[float, torch.Tensor]:
        warnings.filterwarnings("ignore", category=FutureWarning, module="torchopt")  # it still imports functorch
        start = tuple(p.detach().requires_grad_() for p in plain.values())
        loss = loss_of(adapt(start, start, images, labels), query_images, query_labels)
        return loss.item(), flat(torch.autograd.grad(loss, start))

    return plain_mean(tasks, plain, one_task, layout)


# --- The library's network for all tasks at once, without its layer.


def batch_without_layer(theta: Params, tasks: Any, s: Settings) -> Gradient:
    images, labels, query_images, query_labels = tasks
    num_tasks, network = len(images), conv4(s)

    def gradient_of(phi: list, x: Any, y: Any, keep: bool = False) -> tuple[torch.Tensor, list, Any]:
        leaves = [p.detach().requires_grad_() for p in phi]
        losses = il.fewshot.task_cross_entropy(network(dict(zip(theta, leaves, strict=True)), x), y)
        return losses, leaves, torch.autograd.grad(losses.sum(), leaves, create_graph=keep)

    def rows(tensors: Any) -> torch.Tensor:
        return torch.cat([t.reshape(num_tasks, -1) for t in tensors], 1)

    start = [p.expand(num_tasks, *p.shape) for p in theta.values()]
    phi = [p.clone() for p in start]
    for _ in range(s.inner_steps):
        _, _, gradient = gradient_of(phi, images, labels)
        for p, g, t in zip(phi, gradient, start, strict=True):  # p - step_size (g + strength (p - t))
            p.mul_(1 - s.step_size * s.strength).add_(g, alpha=-s.step_size).add_(t, alpha=s.step_size * s.strength)
    losses, _, v = gradient_of(phi, query_images, query_labels)
    _, leaves, gradient = gradient_of(phi, images, labels, keep=True)
    sizes = [p.numel() for p in theta.values()]

    def product(u: torch.Tensor) -> torch.Tensor:
        parts = [part.reshape(p.shape) for part, p in zip(u.split(sizes, 1), leaves, strict=True)]
        return u + rows(torch.autograd.grad(gradient, leaves, parts, retain_graph=True)) / s.strength

    mean = conjugate_gradient(product, rows(v), s.cg_steps).mean(0).split(sizes)
    return losses.mean().item(), {n: m.view(p.shape) for (n, p), m in zip(theta.items(), mean, strict=True)}


def maml(theta: Params, tasks: Any, s: Settings) -> Gradient:
    """Plain MAML (no proximal term) with the library's network: differentiates through the inner steps."""
    images, labels, query_images, query_labels = tasks
    network = conv4(s)
    leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
    phi = {name: p.expand(len(images), *p.shape) for name, p in leaves.items()}
    for _ in range(s.inner_steps):
        loss = il.fewshot.task_cross_entropy(network(phi, images), labels).sum()
        gradient = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        phi = {name: p - s.step_size * g for (name, p), g in zip(phi.items(), gradient, strict=True)}
    loss = il.fewshot.task_cross_entropy(network(phi, query_images), query_labels).mean()
    return loss.item(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
