"""A problem with constraints as the stationary point of one scalar function, and as its solver sees it."""

# NOTE [the scalar]: at a minimum of f under h = 0, g <= 0, with a_i = 1 where inequality i holds as an equation, the
# unknowns z = (x, lambda, mu, a) are a stationary point of
#     L(z) = f + lambda'h + sum_i a_i mu_i g_i - 1/2 sum_i (1 - a_i) mu_i^2 + 1/2 ||a - const(a)||^2:
# grad f + J_h'lambda + J_g'(a mu) = 0,  h = 0,  a_i g_i = (1 - a_i) mu_i,  where a counts as a constant in all but the
# last term, whose gradient is zero and whose Hessian is the identity: a is part of the solution and does not change
# with theta. So the layer is an argmin layer of L whose matrix is symmetric and indefinite, and every rule and
# transform of argmin holds. f, h and g are read off L again: f = L(x, 0, 0, 1), h = dL/dlambda, g = dL/dmu at a = 1.
#
# NOTE [one lane of many]: with batch_dims the functions take all lanes at once, and only they know which dimensions of
# theta are lanes. So the problem of one lane is that of all, with the other lanes held at init, where the functions are
# known to work, and with a mask that drops the values of those.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from implicitlayer._errors import ObjectiveError, SolverOutputError
from implicitlayer.base._tree import TreeSpec, flatten, ravel, tree_map, unflatten
from implicitlayer.base._types import FlatFunction, Leaves
from implicitlayer.equation._capture import derivatives_possible, find_closed_over, run_undifferentiated
from implicitlayer.equation._residual import Residual, check_value, slope


class Unknowns(NamedTuple):
    """z of NOTE [the scalar]: x in its own structure, multipliers [*lanes, e], [*lanes, m], the mask a [*lanes, m]."""

    x: Any
    equality: torch.Tensor
    inequality: torch.Tensor
    held: torch.Tensor


@dataclass(frozen=True)
class Form:
    """Structure and shapes of what a constraint function returns for one lane; its entries as one vector per lane.

    ``spec`` is None where there is no such constraint.
    """

    name: str
    spec: TreeSpec | None = None
    shapes: tuple[torch.Size, ...] = ()

    @classmethod
    def of(
        cls, name: str, function: Callable[..., Any] | None, init: Any, theta: tuple[Any, ...], lanes: torch.Size
    ) -> Form:
        """The form of ``function``, found by a call at init, whose leaves have the leading dimensions ``lanes``."""
        if function is None:
            return cls(name)
        values: list[Any] = []
        if derivatives_possible():  # the first run of the function: what it keeps is to be seen
            find_closed_over(function, (init, *theta), values.append)
        else:
            values.append(run_undifferentiated(function, (init, *theta)))
        leaves, spec = flatten(values[0])
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
                kind = leaf.dtype if isinstance(leaf, torch.Tensor) else type(leaf).__name__
                raise ObjectiveError(
                    f"{name} must return a floating tensor or a pytree of them, one entry per constraint, got {kind}. "
                    "Write it in torch operations; g(x) <= 0 is the value g(x), not a comparison."
                )
            if leaf.shape[: len(lanes)] != lanes:
                raise ObjectiveError(
                    f"with batch_dims={len(lanes)} {name} must return the lanes of x, {tuple(lanes)}, in front of its "
                    f"constraints, got shape {tuple(leaf.shape)}. Sum over the entries of x only, (...).sum(-1), and "
                    "expand a value that is the same for all lanes."
                )
        return cls(name, spec, tuple(leaf.shape[len(lanes) :] for leaf in leaves))

    @property
    def size(self) -> int:
        """Number of entries of one lane."""
        return sum(shape.numel() for shape in self.shapes)

    def vector(self, value: Any, like: torch.Tensor) -> torch.Tensor:
        """The entries of a value of this form, [*lanes, size] as ``like`` (its multipliers)."""
        leaves, _ = flatten(value)
        lanes = like.shape[:-1]
        found, expected = [tuple(leaf.shape) for leaf in leaves], [tuple(lanes + shape) for shape in self.shapes]
        if found != expected:
            raise ObjectiveError(
                f"{self.name} returned shapes {found}, but {expected} at init. The number of constraints must not "
                "depend on x."
            )
        return ravel(leaves, len(lanes)) if leaves else like

    def rebuild(self, vector: torch.Tensor) -> Any:
        """Inverse of :meth:`vector`; None where there is no constraint."""
        if self.spec is None:
            return None
        parts = vector.split([shape.numel() for shape in self.shapes], -1)
        lanes = vector.shape[:-1]
        return unflatten(
            [part.reshape(lanes + shape) for part, shape in zip(parts, self.shapes, strict=True)], self.spec
        )


@dataclass(frozen=True, eq=False)
class Lagrangian:
    """L of NOTE [the scalar] as an objective ``(z, *theta) -> [*lanes]``."""

    objective: Callable[..., Any]
    equality: Callable[..., Any] | None
    inequality: Callable[..., Any] | None
    forms: tuple[Form, Form]

    def __call__(self, z: Unknowns, *theta: Any) -> torch.Tensor:
        lanes = z.equality.shape[:-1]
        value: torch.Tensor = self.objective(z.x, *theta)
        check_value(value, lanes, len(lanes) > 0)  # before the terms below hide its shape
        held = z.held.detach()
        if self.equality is not None:
            value = value + (z.equality * self.forms[0].vector(self.equality(z.x, *theta), z.equality)).sum(-1)
        if self.inequality is not None:
            g = self.forms[1].vector(self.inequality(z.x, *theta), z.inequality)
            value = value + (held * z.inequality * g - 0.5 * (1 - held) * z.inequality * z.inequality).sum(-1)
        return value + 0.5 * ((z.held - held) * (z.held - held)).sum(-1)

    def start(self, init: Any, lanes: torch.Size) -> Unknowns:
        """z with zero multipliers and every inequality held."""
        like = flatten(init)[0][0]
        e, m = (form.size for form in self.forms)
        how = {"dtype": like.dtype, "device": like.device}
        return Unknowns(
            init, torch.zeros(*lanes, e, **how), torch.zeros(*lanes, m, **how), torch.ones(*lanes, m, **how)
        )


def masked(function: FlatFunction, num_unknowns: int) -> FlatFunction:
    """``function``, zero in the lanes where a mask is False that is given after the leaves of z, if one is given."""

    def values(leaves: Leaves, theta: Leaves) -> torch.Tensor:
        found: torch.Tensor = function(leaves[:num_unknowns], theta)
        return torch.where(leaves[num_unknowns], found, 0.0) if len(leaves) > num_unknowns else found

    return values


class ConstrainedProblem:
    """What a solver of :func:`constrained_argmin` gets as its objective: callable, with the constraints as methods.

    ``problem(x, *theta)`` is f, 0-d; ``problem.equality(x, *theta)`` is h and ``problem.inequality(x, *theta)`` is g,
    in the user's own structure (None where there is none). All are differentiable in x and theta; closed-over tensors
    have the values of this problem, also under vmap. A batched solver sees all lanes: f is [*lanes], h and g have the
    lanes in front.

    Attributes:
        num_equalities, num_inequalities: entries of h and of g, per lane.
        lane: which lane of ``batch_dims`` this problem is, ``()`` where it is all there is: ``t[problem.lane]`` is its
            part of a theta that has lanes. theta itself comes whole.
        lane_dims: leading dimensions of every leaf of x that the solver may treat as independent problems.
    """

    def __init__(
        self,
        scalar: Callable[..., torch.Tensor],
        start: Unknowns,
        forms: tuple[Form, Form],
        lane: tuple[int, ...] = (),
    ) -> None:
        self.scalar, self.forms, self.lane = scalar, forms, lane
        self.num_equalities, self.num_inequalities = forms[0].size, forms[1].size
        self.lane_dims = start.equality.ndim - 1
        self._start = start
        self._rest = [torch.zeros_like(start.equality), torch.zeros_like(start.inequality)]
        self._rest.append(torch.ones_like(start.held))

    def of_lane(self, lane: tuple[int, ...]) -> ConstrainedProblem:
        """The problem of one lane: NOTE [one lane of many]."""
        full, spec = flatten(self._start)
        lanes = self._start.equality.shape[:-1]
        here = torch.zeros(lanes, dtype=torch.bool, device=full[0].device)
        here[lane] = True

        def scalar(z: Unknowns, *theta: Any) -> torch.Tensor:
            leaves = flatten(z)[0]
            filled = []
            for one, others in zip(leaves, full, strict=True):
                shape = others.shape[len(lanes) :]
                if one.shape != shape:
                    raise SolverOutputError(
                        f"the solver evaluates its problem at shape {tuple(one.shape)}, but it is called for one lane, "
                        f"{lane} of {tuple(lanes)}, whose x has shape {tuple(shape)}. A solver of all lanes says so "
                        "by an attribute batched = True."
                    )
                filled.append(torch.where(here.reshape(*lanes, *[1] * len(shape)), one, others))
            return self.scalar((unflatten(filled, spec), here), *theta)

        return ConstrainedProblem(scalar, tree_map(lambda t: t[lane].clone(), self._start), self.forms, lane)

    def __call__(self, x: Any, *theta: Any) -> torch.Tensor:
        return self.scalar(Unknowns(x, *self._rest), *theta)

    def equality(self, x: Any, *theta: Any) -> Any:
        """h(x, *theta)."""
        return self.forms[0].rebuild(self.equality_vector(x, *theta))

    def inequality(self, x: Any, *theta: Any) -> Any:
        """g(x, *theta)."""
        return self.forms[1].rebuild(self.inequality_vector(x, *theta))

    def equality_vector(self, x: Any, *theta: Any) -> torch.Tensor:
        """h(x, *theta) as one vector, [num_equalities]; with the lanes in front where there are some."""
        return self._slope(0, x, theta)

    def inequality_vector(self, x: Any, *theta: Any) -> torch.Tensor:
        """g(x, *theta) as one vector, [num_inequalities]; with the lanes in front where there are some."""
        return self._slope(1, x, theta)

    def values(self, x: Any, *theta: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """f [*lanes], h [*lanes, num_equalities] and g [*lanes, num_inequalities], from one evaluation."""
        y, z = (t.detach().requires_grad_() for t in self._rest[:2])
        with torch.enable_grad():
            value = self.scalar(Unknowns(x, y, z, self._rest[2]), *theta)
            h, g = torch.autograd.grad(value.sum(), (y, z), create_graph=True, materialize_grads=True)
        return value, h, g

    def _slope(self, which: int, x: Any, theta: tuple[Any, ...]) -> torch.Tensor:
        def of_multipliers(vector: torch.Tensor) -> torch.Tensor:
            rest = list(self._rest)
            rest[which] = vector
            return self.scalar(Unknowns(x, *rest), *theta).sum()

        if not self.forms[which].size:
            return self._rest[which]
        return slope(of_multipliers, self._rest[which])

    def rows(self, which: int, x: Leaves, spec: TreeSpec, theta: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [*lanes, k] and gradients [*lanes, k, n] of equations (0) or inequalities (1) at detached leaves."""
        points = [leaf.detach().requires_grad_() for leaf in x]
        with torch.enable_grad():
            values = self._slope(which, unflatten(points, spec), theta)
        rows = []
        for value in values.unbind(-1):
            parts = [torch.zeros_like(p) for p in points]
            if value.requires_grad:
                parts = list(torch.autograd.grad(value.sum(), points, retain_graph=True, materialize_grads=True))
            rows.append(ravel(parts, self.lane_dims).double())
        none = ravel(x, self.lane_dims).double().unsqueeze(-2)[..., :0, :]
        return values.detach().double(), torch.stack(rows, -2) if rows else none


@dataclass(frozen=True, eq=False)
class ConditionsResidual(Residual):
    """The gradient of L: it has one piece for each choice of the inequalities that hold."""

    def leaves_piece(self, x: Leaves, theta: Leaves, step: Leaves) -> torch.Tensor:
        """Where a multiplier becomes negative on the way, or an inequality that did not hold is crossed."""
        *there, multipliers, held = [a.detach() - b for a, b in zip(x, step, strict=True)]
        held, k = x[-1] > 0.5, self.lane_dims
        pulls = held & (multipliers < 0)
        free = torch.zeros_like(multipliers)  # at multipliers of zero, all held, the gradient in them is g
        with torch.enable_grad():
            g = self([*there, free, torch.ones_like(free)], theta)[-2].detach()
        return (pulls | (~held & (g > 0))).flatten(k).any(-1)
