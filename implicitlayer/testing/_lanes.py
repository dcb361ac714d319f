"""Batches and second derivatives in a gradient check."""

# s(theta) = sum over leaves of <w, J'v>. Its derivative along d is taken twice over reverse mode, and forward over
# reverse, which use different rules: both must be the difference of s, where s comes from dense H and B at the
# solver's answers (above the limit of unknowns, from the layer's first derivative).

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from implicitlayer.testing import _differences as differences
from implicitlayer.testing._differences import Difference
from implicitlayer.testing._modes import RANDOM, SAFE_RTOL, Check, add_quotient, prefixed, push, total
from implicitlayer.testing._references import ROUNDINGS, DenseSystem, Leaves, filled, flat, plain, pull, scales
from implicitlayer.testing._report import COARSE, LINEAR, ROUNDING, Place, compare, entry_of

_NUM_LANES = 3
_LANE_SPREAD = 0.03
_SAFE = 10.0

Expected = tuple[torch.Tensor, torch.Tensor]  # a derivative, and what a linear solve may do to it


def _pulled(check: Check, system: DenseSystem | None, theta: Leaves, v: torch.Tensor) -> list[Expected]:
    """J'v per leaf of theta: by H, or by the layer alone."""
    if system is not None:
        return [(system.vjp(j, v), system.vjp_error(j, v, check.rtol)) for j in range(len(theta))]
    return [(g, check.fuzzy(float(g.norm()))) for g in check.gradients(theta, v)]


@dataclass(frozen=True, eq=False)
class _Lane:
    """theta of one lane, a cotangent and a direction there, and the dense system, if there is one."""

    check: Check
    theta: Leaves
    v: torch.Tensor
    direction: dict[int, torch.Tensor]
    system: DenseSystem | None

    def pushed(self) -> Expected:
        """J d."""
        if self.system is None:
            alone = push(self.check, self.direction, self.theta)
            return alone, self.check.fuzzy(float(alone.norm()))
        values = [self.system.jacobian(j) @ d for j, d in self.direction.items()]
        errors = [self.system.jvp_error(j, d, self.check.rtol) for j, d in self.direction.items()]
        return torch.stack(values).sum(0), torch.stack(errors).sum(0)


def check_vmap(check: Check) -> None:
    """Lanes of nearby theta: answers, backward of vmap, vmap of grad, vmap of jvp; then what all lanes share."""
    equation = check.equation
    size = (_NUM_LANES, len(equation.theta))
    factors = 1 + _LANE_SPREAD * torch.randn(size, dtype=torch.float64, generator=check.generator)
    thetas = [[(t * float(f)).to(t.dtype) for t, f in zip(equation.theta, row, strict=True)] for row in factors]
    stacked = [torch.stack(column).requires_grad_() for column in zip(*thetas, strict=True)]
    x = torch.func.vmap(lambda *leaves: tuple(check.call(list(leaves))))(*stacked)
    lanes = []
    for k, theta in enumerate(thetas):
        own = [leaf[k].detach() for leaf in x]
        _check_answer(check, k, own, theta)  # before any derivative, which may raise
        v = flat(equation.split(check.random(equation.num_unknowns)))
        direction = {j: chosen[0][1] * (1 - 0.1 * k) for j, chosen in enumerate(check.directions)}
        system = None if check.system is None else DenseSystem.at(equation, own, theta)
        lanes.append(_Lane(check, theta, v, direction, system))
    cotangents = [torch.stack(column) for column in zip(*(equation.split(lane.v) for lane in lanes), strict=True)]
    expected = [_pulled(check, lane.system, lane.theta, lane.v) for lane in lanes]
    points = [t.detach() for t in stacked]
    for how, gradients in (
        ("", lambda: pull(list(x), stacked, cotangents)),
        ("vmap(grad) ", lambda: torch.func.vmap(torch.func.grad(check.product))(points, cotangents)),
    ):
        found = gradients()
        for k, lane in enumerate(lanes):
            got = filled([None if g is None else g[k] for g in found], lane.theta)
            for j, (value, linear) in enumerate(expected[k]):
                _add(check, j, f"{how}lane {k} ", value, got[j], {LINEAR: linear}, check.natural(j, lane.v))
    _check_vmap_of_jvp(check, points, lanes)
    _check_shared(check, cotangents, [lane.v for lane in lanes])


def _check_answer(check: Check, k: int, x: Leaves, theta: Leaves) -> None:
    if check.layer.polish:
        return
    equation, system = check.equation, check.system
    alone = check.answer(theta)
    # in a batch a solver may stop elsewhere, but about as near to the solution as alone
    distance = check.accuracy.error
    if system is not None:
        distance += float((system.inverse @ equation.residual_at(alone, theta)).norm())
    rounding = ROUNDINGS * equation.eps * check.accuracy.size
    parts = {COARSE: torch.tensor(_SAFE * distance), ROUNDING: torch.tensor(rounding)}
    _add(check, "x", f"lane {k} ", flat(alone), flat(x), parts, check.accuracy.size)


def _check_vmap_of_jvp(check: Check, points: Leaves, lanes: list[_Lane]) -> None:
    tangents = tuple(
        torch.stack([lane.direction[j].reshape(t.shape).to(t) for lane in lanes])
        for j, t in enumerate(check.equation.theta)
    )

    def pushed(leaves: tuple[torch.Tensor, ...], moved: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        result: tuple[torch.Tensor, ...] = torch.func.jvp(lambda *t: tuple(check.call(list(t))), leaves, moved)[1]
        return result

    got = torch.func.vmap(pushed)(tuple(points), tangents)
    for k, lane in enumerate(lanes):
        value, linear = lane.pushed()
        own = flat([leaf[k] for leaf in got])
        _add(check, "all leaves", f"vmap(jvp) lane {k} ", value, own, {LINEAR: linear}, check.accuracy.size)


def _check_shared(check: Check, cotangents: Leaves, vectors: list[torch.Tensor]) -> None:
    """theta shared by all lanes, whose gradients add up; then many cotangents of one answer at once."""
    equation = check.equation
    points = [t.clone().requires_grad_() for t in equation.theta]
    alone = check.call(points)
    expected = [_pulled(check, check.system, equation.theta, v) for v in vectors]
    starts = [t.expand(len(vectors), *t.shape).clone() for t in equation.init]
    x = torch.func.vmap(lambda *leaves: tuple(check.call(points, list(leaves))))(*starts)
    pulled = filled(pull(list(x), points, cotangents), points)
    together = pull(alone, points, cotangents, is_grads_batched=True)
    for j, gradient in enumerate(together):
        value, linear = (torch.stack([one[j][part] for one in expected]).sum(0) for part in (0, 1))
        natural = check.natural(j, torch.stack(vectors).norm(dim=0))
        _add(check, j, "shared ", value, pulled[j], {LINEAR: linear}, natural)
        for k, one in enumerate(expected):
            got = filled([None if gradient is None else gradient[k]], [points[j]])[0]
            _add(check, j, f"cotangent {k} ", one[j][0], got, {LINEAR: one[j][1]}, check.natural(j, vectors[k]))


def _add(
    check: Check,
    leaf: int | str,
    label: str,
    expected: torch.Tensor,
    got: torch.Tensor,
    parts: dict[str, torch.Tensor],
    natural: float,
) -> None:
    """The row of a leaf of theta, by its number, or of entries of x under a name."""
    name = leaf if isinstance(leaf, str) else check.equation.names[leaf]
    entry = prefixed(
        label, check.equation.entry if isinstance(leaf, str) else entry_of(check.equation.theta[leaf].shape)
    )
    check.rows.append(compare(Place(name, entry, "vmap", "loop"), expected, got, parts, natural))


_SECOND_ORDER_LEAVES = 8
_DRAWS = 3
_ROUNDING_FLOOR = 10.0


@dataclass(frozen=True, eq=False)
class _Slope:
    """s for a fixed v and w, the sizes of its terms, added and in the 2-norm, and what rounding does to it."""

    check: Check
    v: torch.Tensor
    weights: list[torch.Tensor]
    size: float
    norm: float
    rounding: float = 0.0

    def dense(self, system: DenseSystem) -> torch.Tensor:
        return total(torch.dot(system.vjp(j, self.v), w) for j, w in enumerate(self.weights))

    def at(self, theta: Leaves) -> tuple[torch.Tensor, torch.Tensor]:
        """s and how far it may be off."""
        check, equation = self.check, self.check.equation
        if check.system is None:
            gradients = check.gradients(theta, self.v)
            value = total(torch.dot(g, w) for g, w in zip(gradients, self.weights, strict=True))
            # the signs of w are random: errors of the terms, which know nothing of them, add up in squares
            return value, 3 * check.fuzzy(self.norm) + 10 * check.accuracy.relative * self.norm
        leaves = check.answer(theta)
        system = DenseSystem.at(equation, leaves, theta)
        value, noise = self.dense(system), torch.tensor(self.rounding, dtype=self.v.dtype)
        step = system.newton_step
        if float(step.norm()) > 1e-14 * check.accuracy.size:
            nearer = DenseSystem.at(equation, equation.split(flat(leaves) - step), theta)
            noise = noise + (self.dense(nearer) - value).abs()
        return value, noise

    def along(self, direction: dict[int, torch.Tensor]) -> Difference | None:
        """Difference of s; None where the solver fails nearby."""
        check = self.check
        known = check.quotients[next(iter(direction))][0]
        step = check.first_step(direction) if known is None else known.step
        if check.system is None:
            step = max(step, float(check.fuzzy(1.0)) ** (1 / 3))  # the linear solves are the noise

        def sample(h: float) -> tuple[torch.Tensor, torch.Tensor]:
            try:
                return self.at(check.moved(direction, h))
            except Exception:  # as for first differences: a smaller step is tried
                return torch.tensor(torch.nan, dtype=self.v.dtype), torch.zeros((), dtype=self.v.dtype)

        return differences.central(sample, step, check.equation.eps)

    def measured_rounding(self) -> float:
        """The largest change of s in a few draws of x and theta changed by eps."""
        check = self.check
        if check.system is None:
            return 0.0
        base, changes, eps = self.dense(check.system), [0.0], 2 * check.equation.eps
        for _ in range(_DRAWS):
            x, theta = (
                [(plain(t) * (1 + eps * check.random(t.numel()).reshape(t.shape))).to(t) for t in leaves]
                for leaves in (check.accuracy.leaves, check.equation.theta)
            )
            changes.append(abs(float(self.dense(DenseSystem.at(check.equation, x, theta)) - base)))
        return 2 * max(changes) + _ROUNDING_FLOOR * check.equation.eps * self.size


def check_double(check: Check) -> None:
    """Reverse over reverse and forward over reverse, along one direction per leaf."""
    equation, v = check.equation, check.cotangents[0][1]
    weights = [check.random(t.numel()) * scales(t) for t in equation.theta]
    got, size, norm = _reverse_over_reverse(check, v, weights)
    slope = _Slope(check, v, weights, size, norm)
    slope = replace(slope, rounding=slope.measured_rounding())
    condition = 1.0 if check.system is None else check.system.condition
    # two solves, one inside the other; the condition number is room enough, so rtol is that of the solver itself
    small = (2 * check.rtol / SAFE_RTOL + ROUNDINGS * equation.eps) * condition
    groups = [(name, {j: check.directions[j][0][1]}) for j, name in enumerate(equation.names)]
    if len(groups) > _SECOND_ORDER_LEAVES:
        rest = {j: check.directions[j][0][1] for j in range(_SECOND_ORDER_LEAVES, len(groups))}
        groups = [*groups[:_SECOND_ORDER_LEAVES], ("the other leaves", rest)]
    for name, direction in groups:
        reverse = total(torch.dot(got[j], d) for j, d in direction.items())
        scale = size + sum(float((got[j] * d).abs().sum()) for j, d in direction.items())
        quotient = slope.along(direction)
        if quotient is None:
            add_quotient(check, name, RANDOM, "double", None, reverse, v, (reverse, reverse))
            continue
        parts = differences.difference_errors(quotient.truncation, quotient.noise, COARSE)
        parts[LINEAR] = torch.tensor(small * scale, dtype=v.dtype)
        random = f" along {RANDOM}" if sum(len(d) for d in direction.values()) > 1 else ""
        for how, value in (("reverse", reverse), ("forward", _forward_over_reverse(check, v, weights, direction))):
            if value is None:
                continue
            label = f"{how} over reverse{random}"
            place = Place(name, lambda i, s=label: s, "double", "differences")  # type: ignore[misc]
            check.rows.append(
                compare(place, quotient.value[None], value[None], parts, size, resolved=quotient.resolved)
            )


def _reverse_over_reverse(
    check: Check, v: torch.Tensor, weights: list[torch.Tensor]
) -> tuple[list[torch.Tensor], float, float]:
    """The gradient of s per leaf, and the size of the terms of s, added and in the 2-norm."""
    points = [t.clone().requires_grad_() for t in check.equation.theta]
    first = pull(check.call(points), points, check.equation.split(v), create_graph=True)
    terms = [
        (g.cpu().double().reshape(-1) * w).sum()
        for g, w in zip(first, weights, strict=True)
        if g is not None and g.requires_grad
    ]
    second: list[torch.Tensor | None] = [None] * len(points)
    if terms:
        second = list(torch.autograd.grad(torch.stack(terms).sum(), points, allow_unused=True))
    products = torch.cat([g * w for g, w in zip(filled(first, points), weights, strict=True)])
    return filled(second, points), float(products.abs().sum()), float(products.norm())


def _forward_over_reverse(
    check: Check, v: torch.Tensor, weights: list[torch.Tensor], direction: dict[int, torch.Tensor]
) -> torch.Tensor | None:
    """The same number by ``jvp`` of ``grad``; None where an operation of the objective has no forward mode."""
    theta, slope = [t.clone() for t in check.equation.theta], torch.func.grad(check.product)
    zeros = {j: torch.zeros_like(t) for j, t in enumerate(theta)}
    tangents = [(zeros | direction)[j].reshape(t.shape).to(t) for j, t in enumerate(theta)]
    try:
        moved = torch.func.jvp(lambda leaves: slope(leaves, check.equation.split(v)), (theta,), (tangents,))[1]
    except (NotImplementedError, RuntimeError) as error:
        if "forward" in str(error).lower() or "jvp" in str(error):
            check.notes.append(f"double: forward over reverse was not checked: {error}")
            return None
        raise
    return total(torch.dot(plain(m).reshape(-1), w) for m, w in zip(moved, weights, strict=True))
