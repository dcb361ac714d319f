"""The conformance checks of inner solvers. Each takes a claim, and raises AssertionError with the numbers."""

# n: unknowns, B: problems side by side. All objectives have Hessians between 10^-log10_cond / 2 and 1.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from implicitlayer.api._argmin import argmin
from implicitlayer.base._tree import flatten, flatten_with_names
from implicitlayer.linear._cg import ConjugateGradient
from implicitlayer.testing import _arrays as arrays
from implicitlayer.testing import _families as families
from implicitlayer.testing._claims import InnerClaim, require
from implicitlayer.testing._families import ArgminProblem

F64, F32 = torch.float64, torch.float32
SIZES = (1, 2, 5)

Check = Callable[[InnerClaim], None]
Family = Callable[..., ArgminProblem]


def check_minimises_quadratics(claim: InnerClaim) -> None:
    """The minimiser of quadratics is found to the promised accuracy."""
    _minimises(claim, families.quadratic_problem, F64)


def check_minimises_smooth_convex_functions(claim: InnerClaim) -> None:
    """The minimiser of regularised softplus losses is found to the promised accuracy."""
    _minimises(claim, families.smooth_convex_problem, F64)


def check_minimises_in_float32(claim: InnerClaim) -> None:
    """The same for float32 quadratics, to an accuracy of 1e-2 at least."""
    _minimises(claim, families.quadratic_problem, F32)


def check_a_scalar_unknown(claim: InnerClaim) -> None:
    """An unknown of shape () keeps its shape."""
    target = torch.tensor(0.7, dtype=F64)
    (x,) = _solve(claim, lambda x, t: 0.5 * (x - t) ** 2, torch.zeros((), dtype=F64), target)
    _distance_is_small(claim, x, target, F64, "1/2 (x - 0.7)^2 with a 0-d x")


def check_structure_of_init(claim: InnerClaim) -> None:
    """A pytree comes back as the same pytree, leaf by leaf, with leaves of shape (), (1,), (2, 3) and (0,)."""
    shapes: list[tuple[int, ...]] = [(), (1,), (2, 3), (0,)]
    targets = [arrays.normal_tensor(shape, seed=i) for i, shape in enumerate(shapes)]

    def tree(leaves: Sequence[torch.Tensor]) -> Any:
        return {"a": leaves[0], "b": [leaves[1], (leaves[2],)], "c": leaves[3]}

    def objective(x: Any, target: Any) -> torch.Tensor:
        parts = zip((0.2, 0.5, 1.0, 1.0), flatten(x)[0], flatten(target)[0], strict=True)
        return torch.stack([0.5 * c * ((p - t) ** 2).sum() for c, p, t in parts]).sum()

    init = tree([torch.zeros(shape, dtype=F64) for shape in shapes])
    found = _solve(claim, objective, init, tree(targets))
    for x, target in zip(found, targets, strict=True):
        _distance_is_small(claim, x, target, F64, f"the leaf of shape {tuple(target.shape)} of a pytree")


def check_init_and_theta_are_left_alone(claim: InnerClaim) -> None:
    """Neither init nor theta is changed in place."""
    problem = _problem(claim, families.smooth_convex_problem, 3, 40)
    init, theta = torch.ones(3, dtype=F64), _detached(problem)
    tensors = [init, *theta]
    before, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    _solve(claim, problem.objective, init, *theta)
    for i, (now, then) in enumerate(zip(tensors, before, strict=True)):
        name = f"theta[{i - 1}]" if i else "init"
        require(torch.equal(now, then), claim, f"changed {name} in place")
        require(now._version == versions[i], claim, f"wrote to {name} in place")


def check_the_graph_of_init_is_ignored(claim: InnerClaim) -> None:
    """An init with a graph gives the same answer, and nothing flows back to it."""
    problem = _problem(claim, families.quadratic_problem, 3, 41)
    leaf = torch.full((3,), 0.5, dtype=F64, requires_grad=True)
    plain = _solve(claim, problem.objective, leaf.detach().clone(), *_detached(problem))[0]
    (x,) = _solve(claim, problem.objective, leaf * 1, *_detached(problem))
    apart, allowed = float((x - plain).norm()), 2 * claim.accuracy * max(1.0, float(plain.norm()))
    require(apart <= allowed, claim, f"gives another answer ({apart:.2e} apart)")
    require(leaf.grad is None, claim, "left a gradient behind in the tensor that init was made from")


def check_repeats_are_bitwise_equal(claim: InnerClaim) -> None:
    """The same problem gives the same bits, also after another one was solved."""
    problem, other = (_problem(claim, families.smooth_convex_problem, 4, seed) for seed in (42, 43))
    init = problem.init
    first = _solve(claim, problem.objective, init, *_detached(problem))[0].clone()
    _solve(claim, other.objective, init + 1, *_detached(other))
    second = _solve(claim, problem.objective, init, *_detached(problem))[0]
    apart = float((second - first).norm())
    require(torch.equal(first, second), claim, f"gave two answers to one problem, {apart:.2e} apart")


def check_gradients_of_an_argmin_layer(claim: InnerClaim) -> None:
    """il.argmin around it has the dense implicit gradient."""
    for family in (families.quadratic_problem, families.smooth_convex_problem):
        problem = _problem(claim, family, 4, 44)
        v = arrays.normal_tensor((4,), seed=45)
        x = _layer(claim, problem.objective)(problem.init, *problem.theta)
        _gradients_agree(claim, problem, torch.autograd.grad(x, problem.theta, v), problem.dense_gradient(v), "a layer")


def check_a_layer_under_vmap(claim: InnerClaim) -> None:
    """torch.func.vmap of il.argmin around it has the values and gradients of its lanes."""
    problem = _problem(claim, families.smooth_convex_problem, 3, 46)
    weight, offset, log_strength = _detached(problem)
    offsets = torch.stack([offset, offset + 1, -offset])  # [B, m]
    v = arrays.normal_tensor((3,), seed=49)
    layer = _layer(claim, problem.objective)

    def pulled(offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x: torch.Tensor = layer(problem.init, weight, offset, log_strength)
        return x @ v, x

    gradients, x = torch.func.vmap(torch.func.grad(pulled, has_aux=True))(offsets)
    for i in range(len(offsets)):
        lane = replace(problem, theta=tuple(t.requires_grad_() for t in (weight, offsets[i].clone(), log_strength)))
        what = f"lane {i} of a layer under vmap"
        _distance_is_small(claim, x[i], lane.solution(*lane.theta), F64, what)
        _gradients_agree(claim, lane, [gradients[i]], [lane.dense_gradient(v)[1]], what, ["theta[1]"])


def check_batch_equals_loop(claim: InnerClaim) -> None:
    """Many problems at once, called as the protocol of ``batched`` solvers says, are solved as one by one."""
    problems = [_problem(claim, families.smooth_convex_problem, 3, seed) for seed in (50, 51, 52)]
    stacked = _stacked(problems)
    init = arrays.normal_tensor((3, 3), seed=53)
    init[1] = problems[1].solution(*problems[1].theta)  # this lane is finished before it starts
    over_lanes = torch.func.vmap(problems[0].objective)
    (together,) = _solve(claim, over_lanes, init, *stacked)
    for i, problem in enumerate(problems):
        (alone,) = _solve(claim, problem.objective, init[i].clone(), *_detached(problem))
        apart = float((together[i] - alone).norm())
        allowed = 2 * claim.accuracy * max(1.0, float(alone.norm()))
        text = f"solves lane {i} of a batch otherwise than alone: {apart:.2e} apart, {allowed:.2e} allowed"
        require(apart <= allowed, claim, text)


def check_a_finished_lane_is_frozen(claim: InnerClaim) -> None:
    """The answer of a lane is bitwise the same whether its neighbours finish before it or long after it."""
    conditions = [0.0, claim.log10_cond / 3, 0.0, claim.log10_cond]  # neighbour, the lane itself, two neighbours
    make = families.smooth_convex_problem
    problems = [make(3, log10_cond=c, seed=55 + i) for i, c in enumerate(conditions)]
    stacked = _stacked(problems)
    done = torch.stack([p.solution(*p.theta) for p in problems])
    done[1] = 0
    far = 10 * arrays.normal_tensor((4, 3), seed=59)
    far[1] = 0
    over_lanes = torch.func.vmap(problems[0].objective)
    early, late = (_solve(claim, over_lanes, init, *(t.clone() for t in stacked))[0][1] for init in (done, far))
    apart = float((early - late).norm())
    text = f"gave one lane of a batch two answers, {apart:.2e} apart, as its neighbours finished early or late"
    require(torch.equal(early, late), claim, text)


def inner_checks(claim: InnerClaim) -> Iterator[Check]:
    yield from (check_minimises_quadratics, check_minimises_smooth_convex_functions)
    if F32 in claim.dtypes:
        yield check_minimises_in_float32
    yield from (check_a_scalar_unknown, check_structure_of_init, check_init_and_theta_are_left_alone)
    yield check_the_graph_of_init_is_ignored
    if claim.deterministic:
        yield check_repeats_are_bitwise_equal
    yield from (check_gradients_of_an_argmin_layer, check_a_layer_under_vmap)
    if claim.batched:
        yield check_batch_equals_loop
        if claim.deterministic:
            yield check_a_finished_lane_is_frozen


def _problem(claim: InnerClaim, family: Family, n: int, seed: int) -> ArgminProblem:
    return family(n, log10_cond=claim.log10_cond, seed=seed)


def _stacked(problems: Sequence[ArgminProblem]) -> list[torch.Tensor]:
    return [torch.stack([t.detach() for t in leaves]) for leaves in zip(*(p.theta for p in problems), strict=True)]


def _detached(problem: ArgminProblem) -> list[torch.Tensor]:
    """Theta as a layer hands it to a solver."""
    return [t.detach().clone() for t in problem.theta]


def _solve(claim: InnerClaim, objective: Callable[..., Any], init: Any, *theta: Any) -> list[torch.Tensor]:
    """The leaves of the answer, detached, after its structure and shapes were checked."""
    answer = claim.solver(objective, init, *theta)
    leaves, names = flatten_with_names(answer, "x")
    expected, expected_names = flatten_with_names(init, "x")
    require(names == expected_names, claim, f"returned the leaves {names}, but init has {expected_names}")
    checked = []
    for leaf, like, name in zip(leaves, expected, names, strict=True):
        value = torch.as_tensor(leaf).detach()
        shapes = f"returned {name} with shape {tuple(value.shape)}, but init has shape {tuple(like.shape)}"
        require(value.shape == like.shape, claim, shapes)
        checked.append(value.to(like.dtype))
    return checked


def _minimises(claim: InnerClaim, family: Family, dtype: torch.dtype) -> None:
    for n in SIZES:
        for log10_cond in sorted({0.0, claim.log10_cond}):
            problem = family(n, log10_cond=log10_cond, seed=n + 54, dtype=dtype)
            (x,) = _solve(claim, problem.objective, problem.init.clone(), *_detached(problem))
            _distance_is_small(claim, x, problem.solution(*problem.theta), dtype, repr(problem))


def _distance_is_small(claim: InnerClaim, x: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    error = float((x.double() - right).norm()) / max(1.0, float(right.norm()))
    allowed = claim.accuracy if dtype == F64 else max(claim.accuracy, 1e-2)
    text = f"ended {error:.2e} away from the minimiser, {allowed:.1e} is promised ({what})"
    require(error <= allowed, claim, text)


def _layer(claim: InnerClaim, objective: Callable[..., Any]) -> Callable[..., Any]:
    """The layer; a solver of low accuracy by its own claim is not told that it is not stationary."""
    rtol = max(1e-3, 10 * claim.accuracy)
    return argmin(objective, claim.solver, linear_solver=ConjugateGradient(rtol=1e-12), stationarity_rtol=rtol)


def _gradients_agree(
    claim: InnerClaim,
    problem: ArgminProblem,
    got: Sequence[torch.Tensor],
    right: Sequence[torch.Tensor],
    what: str,
    names: Sequence[str] = ("theta[0]", "theta[1]", "theta[2]"),
) -> None:
    """Each gradient against the size of all, to first order in the error delta of x.

    With |dH| <= rho delta the solution of H u = v moves by |H^-1 dH u| <= (rho / mu) delta |u|, and the mixed
    derivative by as much again or by delta itself; twice that for the higher orders.
    """
    assert problem.rho is not None and problem.mu is not None
    delta = claim.accuracy * max(1.0, float(problem.solution(*problem.theta).norm()))
    size = max(float(r.norm()) for r in right)
    allowed = 4 * (1 + problem.rho / problem.mu) * delta + 1e-10 * 10**claim.log10_cond
    for i, (g, r) in enumerate(zip(got, right, strict=True)):
        error = float((g - r).norm()) / size
        text = f"gives {what} a gradient in {names[i]} that is off by {error:.2e}, {allowed:.2e} allowed ({problem!r})"
        require(error <= allowed, claim, text)
