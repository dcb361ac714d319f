"""Independent answers for the tests: dense implicit gradients by plain loops, finite differences, an exact solver."""

# n: unknowns, m: entries of one theta. No answer here uses the package or vmap, il.testing included: a reference shares
# no code with its test.

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from implicitlayer import testing

Tensor = torch.Tensor
F64 = torch.float64

with warnings.catch_warnings():  # torch's first forward-mode call imports what torch itself calls deprecated
    warnings.filterwarnings("ignore", "`torch.jit.script`")
    torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


def cdist_has_second_derivatives() -> bool:
    """Of few rows: torch 2.13 has none, torch 2.14 has."""
    x = torch.ones(2, 2, requires_grad=True)
    (first,) = torch.autograd.grad(torch.cdist(x, torch.zeros(2, 2)).sum(), x, create_graph=True)
    try:
        torch.autograd.grad(first.sum(), x)
    except NotImplementedError:
        return False
    return True


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=generator(seed)).to(dtype)


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(n, n, seed=seed))[0]


def spd_matrix(n: int, log10_cond: float, seed: int) -> Tensor:
    """That of il.testing: symmetric, eigenvalues spread log-uniformly over [10^-log10_cond, 1]."""
    return testing.spd_matrix(n, log10_cond=log10_cond, seed=seed)


def rows(values: Tensor, inputs: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """The derivative of all ``values`` in each input, [values, entries of it], one row of autograd at a time."""
    how = {"retain_graph": True, "create_graph": create_graph, "materialize_grads": True}
    found = [torch.autograd.grad(value, inputs, **how) for value in values.reshape(-1)]
    of_each = zip(*found, strict=True) if found else [()] * len(inputs)
    return [
        torch.stack([part.reshape(-1) for part in parts]) if parts else leaf.new_zeros(0, leaf.numel())
        for parts, leaf in zip(of_each, inputs, strict=True)
    ]


def dense_jacobian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """[outputs, inputs]."""
    at = at.detach().requires_grad_()
    return rows(function(at), [at])[0]


def dense_hessian(objective: Callable[..., Tensor], x: Tensor, theta: Sequence[Tensor]) -> Tensor:
    """d^2 f / dx dx as [n, n]."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(x, *theta), x, create_graph=True)
    return rows(gradient, [x])[0]


def dense_gradients(
    objective: Callable[..., Tensor], x: Tensor, theta: Sequence[Tensor], cotangent: Tensor
) -> list[Tensor]:
    """-(d^2 f / dtheta dx)' H^-1 v for every theta, by a dense solve; x is one tensor, the exact solution."""
    u = torch.linalg.solve(dense_hessian(objective, x, theta), cotangent.detach().reshape(-1))
    points = [t.detach().requires_grad_() for t in theta]
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(x, *points), x, create_graph=True)
    pulled = torch.autograd.grad(gradient.reshape(-1), points, u, materialize_grads=True)
    return [-g for g in pulled]


def central_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float) -> Tensor:
    """Gradient of a scalar function, entry by entry."""
    at = at.detach()
    result = torch.zeros_like(at).reshape(-1)
    for i in range(at.numel()):
        shift = torch.zeros_like(at).reshape(-1)
        shift[i] = step
        shift = shift.reshape(at.shape)
        result[i] = (function(at + shift) - function(at - shift)) / (2 * step)
    return result.reshape(at.shape)


def newton(objective: Callable[..., Tensor], init: Tensor, *theta: Any) -> Tensor:
    """Dense damped Newton on one tensor, down to rounding: an inner solver with no error of its own."""
    x = init.detach().clone()
    for _ in range(50):
        at = x.clone().requires_grad_()
        value = objective(at, *theta)
        (gradient,) = torch.autograd.grad(value, at)
        step = torch.linalg.solve(dense_hessian(objective, x, theta), gradient.reshape(-1)).reshape(x.shape)
        length = 1.0
        while length > 1e-4 and objective(x - length * step, *theta) > value + 1e-14 * value.abs():
            length /= 2
        x = x - length * step
        if float(step.norm()) <= 1e-15 * (1 + float(x.norm())):
            break
    return x.detach()


def newton_root(function: Callable[..., Tensor], init: Tensor, *theta: Any) -> Tensor:
    """Newton's method for ``function(x, *theta) = 0``, down to rounding."""
    x = init.detach()
    for _ in range(30):
        step = torch.linalg.solve(dense_jacobian(lambda y: function(y, *theta), x), function(x, *theta))
        x = (x - step).detach()
        if float(step.norm()) < 1e-15:
            break
    return x


class Energy(torch.nn.Module):
    """softplus(net x) + 1/2 ||x - t||^2, strongly convex in x."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(3, 4, dtype=F64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.softplus(self.net(x)).sum() + 0.5 * ((x - t) ** 2).sum()


def smooth_objective(x: Tensor, weight: Tensor, offset: Tensor, log_strength: Tensor) -> Tensor:
    """Softplus losses and a quadratic: strongly convex, smooth, with no symmetry and derivatives of every order."""
    return torch.nn.functional.softplus(weight @ x + offset).sum() + 0.5 * log_strength.exp() * (x * x).sum()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm().clamp_min(1e-300))
