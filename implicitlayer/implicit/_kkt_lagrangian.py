"""A problem with constraints as the stationary point of one scalar function, and as its solver sees it."""

# NOTE [the scalar]: at a minimum of f under h = 0, g <= 0, with a_i = 1 where inequality i holds as an equation, the
# unknowns z = (x, lambda, mu, a) are a stationary point of
#     L(z) = f + lambda'h + sum_i a_i mu_i g_i - 1/2 sum_i (1 - a_i) mu_i^2 + 1/2 ||a - const(a)||^2:
# grad f + J_h'lambda + J_g'(a mu) = 0,  h = 0,  a_i g_i = (1 - a_i) mu_i,  where a counts as a constant in all but the
# last term, whose gradient is zero and whose Hessian is the identity: a is part of the solution and does not change
# with theta. So the layer is an argmin layer of L whose matrix is symmetric and indefinite, and every rule and
# transform of argmin holds. f, h and g are read off L again: f = L(x, 0, 0, 1), h = dL/dlambda, g = dL/dmu at a = 1.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from implicitlayer._errors import ObjectiveError
from implicitlayer._tree import TreeSpec, flatten, unflatten
from implicitlayer._types import Leaves

__all__ = ["ConstrainedProblem", "Form", "Lagrangian", "Unknowns"]


class Unknowns(NamedTuple):
    """z of NOTE [the scalar]: x in its own structure, multipliers [e] and [m], and the mask a [m] of zeros and ones."""

    x: Any
    equality: torch.Tensor
    inequality: torch.Tensor
    held: torch.Tensor


@dataclass(frozen=True)
class Form:
    """Structure and shapes of what a constraint function returns; its entries as one vector.

    ``spec`` is None where there is no such constraint.
    """

    name: str
    spec: TreeSpec | None = None
    shapes: tuple[torch.Size, ...] = ()

    @classmethod
    def of(cls, name: str, function: Callable[..., Any] | None, init: Any, theta: tuple[Any, ...]) -> Form:
        if function is None:
            return cls(name)
        with torch.no_grad():
            leaves, spec = flatten(function(init, *theta))
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
                kind = leaf.dtype if isinstance(leaf, torch.Tensor) else type(leaf).__name__
                raise ObjectiveError(
                    f"{name} must return a floating tensor or a pytree of them, one entry per constraint, got {kind}. "
                    "Write it in torch operations; g(x) <= 0 is the value g(x), not a comparison."
                )
        return cls(name, spec, tuple(leaf.shape for leaf in leaves))

    @property
    def size(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    def vector(self, value: Any) -> torch.Tensor:
        """The entries of a value of this form, [size]."""
        leaves, _ = flatten(value)
        shapes = tuple(leaf.shape for leaf in leaves)
        if shapes != self.shapes:
            raise ObjectiveError(
                f"{self.name} returned shapes {[tuple(s) for s in shapes]}, but {[tuple(s) for s in self.shapes]} at "
                "init. The number of constraints must not depend on x."
            )
        return torch.cat([leaf.reshape(-1) for leaf in leaves]) if len(leaves) != 1 else leaves[0].reshape(-1)

    def rebuild(self, vector: torch.Tensor) -> Any:
        """Inverse of :meth:`vector`; None where there is no constraint."""
        if self.spec is None:
            return None
        parts = vector.split([shape.numel() for shape in self.shapes])
        return unflatten([part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)], self.spec)


@dataclass(frozen=True, eq=False)
class Lagrangian:
    """L of NOTE [the scalar] as an objective ``(z, *theta) -> 0-d tensor``."""

    objective: Callable[..., Any]
    equality: Callable[..., Any] | None
    inequality: Callable[..., Any] | None
    forms: tuple[Form, Form]

    def __call__(self, z: Unknowns, *theta: Any) -> torch.Tensor:
        value: torch.Tensor = self.objective(z.x, *theta)
        held = z.held.detach()
        if self.equality is not None:
            value = value + (z.equality * self.forms[0].vector(self.equality(z.x, *theta))).sum()
        if self.inequality is not None:
            g = self.forms[1].vector(self.inequality(z.x, *theta))
            value = value + (held * z.inequality * g - 0.5 * (1 - held) * z.inequality * z.inequality).sum()
        return value + 0.5 * ((z.held - held) * (z.held - held)).sum()

    def start(self, init: Any) -> Unknowns:
        """z with zero multipliers and every inequality held."""
        like = flatten(init)[0][0]
        e, m = (form.size for form in self.forms)
        how = {"dtype": like.dtype, "device": like.device}
        return Unknowns(init, torch.zeros(e, **how), torch.zeros(m, **how), torch.ones(m, **how))


class ConstrainedProblem:
    """What a solver of :func:`constrained_argmin` gets as its objective: callable, with the constraints as methods.

    ``problem(x, *theta)`` is f, 0-d; ``problem.equality(x, *theta)`` is h and ``problem.inequality(x, *theta)`` is g,
    in the user's own structure (None where there is none). All are differentiable in x and theta; closed-over tensors
    have the values of this problem, also under vmap.

    Attributes:
        num_equalities, num_inequalities: entries of h and of g.
    """

    def __init__(self, scalar: Callable[..., torch.Tensor], like: Unknowns, forms: tuple[Form, Form]) -> None:
        self.scalar, self.forms = scalar, forms
        self.num_equalities, self.num_inequalities = forms[0].size, forms[1].size
        self._rest = [torch.zeros_like(like.equality), torch.zeros_like(like.inequality), torch.ones_like(like.held)]

    def __call__(self, x: Any, *theta: Any) -> torch.Tensor:
        return self.scalar(Unknowns(x, *self._rest), *theta)

    def equality(self, x: Any, *theta: Any) -> Any:
        """h(x, *theta)."""
        return self.forms[0].rebuild(self.equality_vector(x, *theta))

    def inequality(self, x: Any, *theta: Any) -> Any:
        """g(x, *theta)."""
        return self.forms[1].rebuild(self.inequality_vector(x, *theta))

    def equality_vector(self, x: Any, *theta: Any) -> torch.Tensor:
        """h(x, *theta) as one vector [num_equalities]."""
        return self._slope(0, x, theta)

    def inequality_vector(self, x: Any, *theta: Any) -> torch.Tensor:
        """g(x, *theta) as one vector [num_inequalities]."""
        return self._slope(1, x, theta)

    def _slope(self, which: int, x: Any, theta: tuple[Any, ...]) -> torch.Tensor:
        def of_multipliers(vector: torch.Tensor) -> torch.Tensor:
            rest = list(self._rest)
            rest[which] = vector
            return self.scalar(Unknowns(x, *rest), *theta)

        if not self.forms[which].size:
            return self._rest[which]
        result: torch.Tensor = torch.func.grad(of_multipliers)(self._rest[which])
        return result

    def rows(self, which: int, x: Leaves, spec: TreeSpec, theta: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [k] and gradients [k, n] of the equations (0) or inequalities (1) at detached leaves."""
        points = [leaf.detach().requires_grad_() for leaf in x]
        with torch.enable_grad():
            values = self._slope(which, unflatten(points, spec), theta)
        rows = []
        for value in values:
            parts = [torch.zeros_like(p) for p in points]
            if value.requires_grad:
                parts = list(torch.autograd.grad(value, points, retain_graph=True, materialize_grads=True))
            rows.append(torch.cat([part.reshape(-1).double() for part in parts]))
        width = sum(leaf.numel() for leaf in x)
        matrix = torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64, device=x[0].device)
        return values.detach().double(), matrix
