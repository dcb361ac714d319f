"""What one gradient check holds, and its comparisons in reverse and forward mode and with the objective itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from implicitlayer.api._argmin import argmin, fixed_point, root
from implicitlayer.base._records import BackwardRecord
from implicitlayer.layer._layer import ImplicitLayer
from implicitlayer.testing import _differences as differences
from implicitlayer.testing._differences import Difference, SolverDifferences, difference_errors
from implicitlayer.testing._references import ROUNDINGS, DenseSystem, Leaves, filled, flat, plain, pull, scales
from implicitlayer.testing._report import COARSE, LINEAR, ROUNDING, GradientRow, Place, compare, entry_of

LAYERS: dict[str, Callable[..., ImplicitLayer]] = {"argmin": argmin, "root": root, "fixed_point": fixed_point}
RANDOM = "a random direction"
_TINY = 1e-15
# Room for what a solver reports as rtol: its own residual may be preconditioned or carried along.
SAFE_RTOL = 10.0


@dataclass(eq=False)
class Check(SolverDifferences):
    """One call of ``check_argmin_gradients``: what is compared, with what, and what came out.

    ``answer(theta)`` solves from init, ``restarted(start)`` at theta.
    """

    layer: ImplicitLayer
    restarted: Callable[[Leaves], Leaves]
    rtol: float
    generator: torch.Generator
    rows: list[GradientRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pulled: list[torch.Tensor] | None = None
    none: set[int] = field(default_factory=set)

    @property
    def system(self) -> DenseSystem | None:
        return self.accuracy.system

    def random(self, size: int) -> torch.Tensor:
        """Random signs, sizes between 1/2 and 1: no entry vanishes by chance."""
        draw = torch.rand(2, size, dtype=torch.float64, generator=self.generator)
        return (0.5 + 0.5 * draw[0]) * torch.where(draw[1] < 0.5, -1.0, 1.0)

    @cached_property
    def cotangents(self) -> list[tuple[str, torch.Tensor]]:
        """Random, zero, and tiny v; where H is known also the harder v = H'z, whose solution z has no small part."""
        n = self.equation.num_unknowns
        vectors = [("", self.random(n)), ("zero cotangent ", torch.zeros(n, dtype=torch.float64))]
        if not getattr(self.layer.linear_solver, "atol", 0):  # an absolute tolerance is a choice
            vectors.append(("tiny cotangent ", _TINY * self.random(n)))
        if self.system is not None and self.system.norm > 0:
            vectors.append(("hard cotangent ", self.system.matrix.T @ self.random(n) / self.system.norm))
        return [(name, flat(self.equation.split(v))) for name, v in vectors]  # rounded as the layer sees them

    @cached_property
    def directions(self) -> list[list[tuple[str, torch.Tensor]]]:
        """Per leaf: one random direction, and up to two entries, the one of the largest derivative among them."""
        result = []
        for j, leaf in enumerate(self.equation.theta):
            size = scales(leaf)
            m = len(size)
            chosen = [(RANDOM if m > 1 else "", size * self.random(m))]
            if m > 1:
                weight = size if self.system is None else self.system.vjp(j, self.cotangents[0][1]).abs() * size
                entries = {int(weight.argmax()), int(torch.randint(m, (), generator=self.generator))}
                for i in sorted(entries):
                    unit = torch.zeros_like(size)
                    unit[i] = size[i]
                    chosen.append((entry_of(leaf.shape)(i), unit))
            result.append([(name, plain(d.to(leaf.dtype))) for name, d in chosen])
        return result

    @cached_property
    def quotients(self) -> list[list[Difference | None]]:
        return [[self.along({j: d}) for _, d in chosen] for j, chosen in enumerate(self.directions)]

    def call(self, theta: Leaves, init: Leaves | None = None) -> Leaves:
        start = [t.clone() for t in self.equation.init] if init is None else init
        x = self.layer(self.equation.tree(start), *self.equation.arguments(theta))
        if self.layer.solver_has_aux:
            x = x[0]
        return self.equation.ordered(x)

    def gradients(self, theta: Leaves, v: torch.Tensor) -> list[torch.Tensor]:
        """The layer's J'v at theta, by leaf, flat."""
        points = [t.clone().requires_grad_() for t in theta]
        return filled(pull(self.call(points), points, self.equation.split(v)), points)

    def product(self, theta: Leaves, v: Leaves) -> torch.Tensor:
        """<v, x> with the layer's answer at theta, with its graph."""
        return torch.stack([(a * b).sum() for a, b in zip(self.call(theta), v, strict=True)]).sum()

    def recorded_residual(self) -> float:
        """The largest relative residual among the solves of the latest call; 0 if there was none."""
        solutions = [record.solution for record in self.layer.records if isinstance(record, BackwardRecord)]
        return max([0.0, *(float(solution.relative_residual.detach().double().max()) for solution in solutions)])

    def natural(self, leaf: int, vector: torch.Tensor | None = None) -> float:
        """Size of a derivative in this leaf if x moved by its own size where theta does."""
        size = float(scales(self.equation.theta[leaf]).square().mean().sqrt())
        return self.accuracy.size * (1.0 if vector is None else float(vector.norm())) / size

    def fuzzy(self, value: float) -> torch.Tensor:
        """What an unknown condition number, up to rtol^(-1/2), lets a linear solve do to a number of this size."""
        return torch.tensor(value * (self.rtol + self.equation.eps) ** 0.5, dtype=torch.float64)


def prefixed(label: str, entry: Callable[[int], str]) -> Callable[[int], str]:
    return lambda i: (label + entry(i)).strip()


def total(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    return sum(terms, torch.zeros((), dtype=torch.float64))


def check_vjp(check: Check) -> None:
    """Reverse mode against the dense gradient, for all entries, and against differences along directions."""
    equation, system, accuracy = check.equation, check.system, check.accuracy
    points = [t.clone().requires_grad_() for t in equation.theta]
    x = check.call(points)
    if not check.layer.polish:  # the layer returns what the solver returns
        parts = {COARSE: accuracy.spread, ROUNDING: torch.full_like(accuracy.x, equation.eps * accuracy.size)}
        check.rows.append(
            compare(Place("x", equation.entry, "value", "solver"), accuracy.x, flat(x), parts, accuracy.size)
        )
    for number, (kind, v) in enumerate(check.cotangents):
        gradients = pull(x, points, equation.split(v), retain_graph=True)
        pulled = filled(gradients, points)
        if number == 0:
            check.pulled = pulled
            check.none = {j for j, g in enumerate(gradients) if g is None}
        residual = check.recorded_residual()
        for j, (name, got) in enumerate(zip(equation.names, pulled, strict=True)):
            solve = None
            if system is not None:
                solve, explained = system.vjp_error(j, v, check.rtol), system.vjp_error(j, v, residual, rounding=False)
                place = Place(name, prefixed(kind, entry_of(equation.theta[j].shape)), "vjp", "dense")
                check.rows.append(
                    compare(place, system.vjp(j, v), got, {LINEAR: solve}, check.natural(j, v), explained)
                )
            if number:
                continue
            for (label, d), quotient in zip(check.directions[j], check.quotients[j], strict=True):
                along = torch.dot(got, d)
                # |v| on each part: errors of the entries of x may all add up
                linear = check.fuzzy(float((got * d).norm())) if solve is None else (solve * d.abs()).sum()
                coarse = accuracy.coarse_vjp(j, v) * d.abs()
                add_quotient(check, name, label, "vjp", quotient, along, v, (linear, coarse.sum()))


def check_jvp(check: Check) -> None:
    """Forward mode against dense and differences, leaf by leaf; then the adjoint identity over all leaves."""
    equation, system = check.equation, check.system
    for j, name in enumerate(equation.names):
        for (label, d), quotient in zip(check.directions[j], check.quotients[j], strict=True):
            got = push(check, {j: d})
            linear = check.fuzzy(float(got.norm()))
            if system is not None:
                linear = system.jvp_error(j, d, check.rtol)
                explained = system.jvp_error(j, d, check.recorded_residual(), rounding=False)
                place, expected = Place(name, entry_along(check, label), "jvp", "dense"), system.jacobian(j) @ d
                check.rows.append(compare(place, expected, got, {LINEAR: linear}, check.accuracy.size, explained))
            errors = (linear, check.accuracy.coarse_jvp(j, d))
            add_quotient(check, name, label, "jvp", quotient, got, None, errors)
    if check.pulled is not None:
        _check_adjoint(check, check.pulled)


def push(check: Check, direction: dict[int, torch.Tensor], at: Leaves | None = None) -> torch.Tensor:
    """The layer's J t, flat [n]."""
    base = check.equation.theta if at is None else at
    moving = list(direction)

    def function(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        theta = [t.clone() for t in base]
        for j, leaf in zip(moving, leaves, strict=True):
            theta[j] = leaf
        return tuple(check.call(theta))

    primals = tuple(base[j].clone() for j in moving)
    tangents = tuple(direction[j].reshape(p.shape).to(p) for j, p in zip(moving, primals, strict=True))
    return flat(torch.func.jvp(function, primals, tangents)[1])


def _check_adjoint(check: Check, pulled: list[torch.Tensor]) -> None:
    """<v, J t> = <J'v, t>, which needs no reference."""
    equation, system, v = check.equation, check.system, check.cotangents[0][1]
    joint = {j: chosen[0][1] for j, chosen in enumerate(check.directions)}
    pushed = push(check, joint)
    left = torch.dot(v, pushed)
    right = total(torch.dot(pulled[j], d) for j, d in joint.items())
    tolerance = check.fuzzy(float(v.norm() * pushed.norm()))
    if system is not None:
        terms = [
            torch.dot(system.vjp_error(j, v, check.rtol), d.abs())
            + torch.dot(system.jvp_error(j, d, check.rtol), v.abs())
            for j, d in joint.items()
        ]
        tolerance = torch.stack(terms).sum() + equation.eps * v.norm() * check.accuracy.size
    place, natural = Place("all leaves", lambda i: RANDOM, "jvp", "adjoint"), float(v.norm()) * check.accuracy.size
    check.rows.append(compare(place, right[None], left[None], {LINEAR: tolerance}, natural))


def add_quotient(
    check: Check,
    name: str,
    label: str,
    mode: str,
    quotient: Difference | None,
    got: torch.Tensor,
    v: torch.Tensor | None,
    errors: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """The row of a derivative against a difference; projected on the cotangent v in reverse mode.

    ``errors``: what the linear solve may be off, and what the coarse answer of the solver.
    """
    linear, coarse = errors
    natural = check.accuracy.size * (1.0 if v is None else float(v.norm()))
    if quotient is None:
        nan, why = float("nan"), "the solver fails nearby"
        check.rows.append(GradientRow(name, label, mode, "differences", nan, nan, 0.0, nan, "inconclusive", why))
        return
    value, truncation, noise = quotient.value, quotient.truncation, quotient.noise
    entry = entry_along(check, label)
    if v is not None:
        value, truncation, noise = torch.dot(value, v), torch.dot(truncation, v.abs()), torch.dot(noise, v.abs())
        value, got, truncation, noise = value[None], got[None], truncation[None], noise[None]
        entry = lambda i: label  # noqa: E731
    if check.system is None:  # a derivative moves with x as much as x itself, or ten times
        coarse = 10 * check.accuracy.relative * value.norm()
    parts = {**difference_errors(truncation, noise + coarse, COARSE), LINEAR: linear}
    check.rows.append(
        compare(Place(name, entry, mode, "differences"), value, got, parts, natural, resolved=quotient.resolved)
    )


def entry_along(check: Check, label: str) -> Callable[[int], str]:
    """Names entry i of x, moved along a direction of theta."""
    return lambda i: check.equation.entry(i) + (f" along {label}" if label else "")


# Whether autograd's derivatives of the objective are those of its values: no solver, no layer.
#
# A custom autograd.Function with a wrong backward, a detached theta, a value that goes through NumPy: the layer then
# differentiates another objective than the one the solver minimises. Three differences tell, each with a step of
# eps^(1/3), since there is only rounding to compete with:
#     f along a direction in x, away from the solution (at the solution the gradient is zero, with either sign)
#     F along a direction in x, against H
#     F along a direction in every theta leaf, against B

DOMAIN = "the step leaves the domain"
_RETRIES = 5
_SHORTER = 32.0
# A tenth of a difference is what its own truncation may be; a third is no straight line.
_BEND = 0.3


def check_objective(check: Check) -> None:
    """Rows of mode "objective"; none above the limit of unknowns."""
    equation, system, accuracy = check.equation, check.system, check.accuracy
    if system is None:
        return
    step = equation.eps ** (1 / 3)
    direction = check.random(equation.num_unknowns) * accuracy.size / equation.num_unknowns**0.5
    small = ROUNDINGS * equation.eps
    theta_terms = [m.abs() @ plain(t).reshape(-1).abs() for m, t in zip(system.mixed, equation.theta, strict=True)]
    terms = torch.stack([system.matrix.abs() @ accuracy.x.abs() + system.matrix.abs() @ direction.abs(), *theta_terms])
    noise = small * terms.sum(0)

    def equation_along_x(h: float) -> tuple[torch.Tensor, torch.Tensor]:
        return equation.residual_at(equation.split(accuracy.x + h * direction), equation.theta), noise

    _add(check, "x", equation_along_x, system.matrix @ direction, step)
    for j, name in enumerate(equation.names):
        d = check.directions[j][0][1]

        def equation_along_theta(h: float, j: int = j, d: torch.Tensor = d) -> tuple[torch.Tensor, torch.Tensor]:
            return equation.residual_at(accuracy.leaves, check.moved({j: d}, h)), noise

        _add(check, name, equation_along_theta, system.mixed[j] @ d, step)
    if equation.kind == "argmin":
        away = accuracy.x + 0.1 * direction
        quadratic = float(away.abs() @ system.matrix.abs() @ away.abs())  # terms that may cancel in f

        def value_along_x(h: float) -> tuple[torch.Tensor, torch.Tensor]:
            x = equation.tree(equation.split(away + h * direction))
            with torch.no_grad():
                value = plain(equation.function(x, *equation.arguments(equation.theta))).sum()
            return value[None], small * (value.abs()[None] + quadratic)

        try:
            slope = torch.dot(equation.residual_at(equation.split(away), equation.theta), direction)
        except Exception:  # as in _add
            check.rows.append(_outside("x (value)"))
        else:
            _add(check, "x (value)", value_along_x, slope[None], step)


def _add(check: Check, name: str, sample: differences.Sample, autograd: torch.Tensor, step: float) -> None:
    """The row of one comparison; a failure is believed where the sample is straight between the steps.

    NOTE [domain] A step across a pole or a barrier gives a difference of two branches, which can be finite and agree
    with that of twice the step. But then the forward and the backward difference do not agree at all. Smaller steps
    are tried; where none stays inside, or rounding comes first, the row is inconclusive.
    """
    if not bool(autograd.isfinite().all()):
        return
    row = _outside(name)
    left = False
    for _ in range(_RETRIES):
        try:
            found = differences.central(sample, step, check.equation.eps, rounds=3)
        except Exception:  # an objective may refuse what is outside its domain, with any error
            found = None
        if found is not None:
            row = _row(name, found, autograd)
            if row.status != "failed" or _straight(sample, found):
                break
        left, step = True, (step if found is None else found.step) / _SHORTER
    else:
        row = replace(row, status="inconclusive")
    if left and row.status == "inconclusive":
        row = replace(row, dominating=DOMAIN)
    elif row.status == "inconclusive":  # a derivative too small for the rounding of its values says nothing
        return
    check.rows.append(row)


def _outside(name: str) -> GradientRow:
    nan = math.nan
    return GradientRow(name, RANDOM, "objective", "differences", nan, nan, 0.0, nan, "inconclusive", DOMAIN)


def _row(name: str, found: differences.Difference, autograd: torch.Tensor) -> GradientRow:
    parts = differences.difference_errors(found.truncation, found.noise, ROUNDING)
    place, natural = Place(name, lambda i: RANDOM, "objective", "differences"), autograd.norm() + found.value.norm()
    return compare(place, found.value, autograd, parts, float(natural), resolved=found.resolved)


def _straight(sample: differences.Sample, found: differences.Difference) -> bool:
    """Whether the forward and the backward difference agree, up to what rounding does (its bound has room of 10)."""
    before, here, after = (sample(h)[0] for h in (-found.step, 0.0, found.step))
    ahead, behind = (after - here) / found.step, (here - before) / found.step
    bend = float((ahead - behind).norm())
    return bend <= max(_BEND * float(ahead.norm() + behind.norm()), 0.1 * float(found.noise.norm()))
