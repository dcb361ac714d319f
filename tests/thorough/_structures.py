"""Trees of any shape and memory layout, roles of theta, and faulty solvers."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import implicitlayer as il
from implicitlayer import testing
from tests.thorough._family import DrawnFamily, StrategyFamily
from tests.thorough._quadratics import SEEDS, condition_of, must_be_right
from tests.thorough._reference import F64, Dense, Tensor
from tests.thorough._trial import Trial, residual_allowed

LAYOUTS = ("contiguous", "offset", "strided", "transposed")


def reversed_keys(tree: Any) -> Any:
    """The same tree, dicts with their keys the other way round: their order must not matter."""
    if isinstance(tree, dict):
        return {key: reversed_keys(tree[key]) for key in reversed(list(tree))}
    if isinstance(tree, testing.Pair):
        return testing.Pair(*[reversed_keys(part) for part in tree])
    if isinstance(tree, list | tuple):
        return type(tree)(reversed_keys(part) for part in tree)
    return tree


def flat(tree: Any) -> Tensor:
    leaves = pytree.tree_leaves(tree)
    return torch.cat([leaf.reshape(-1).double() for leaf in leaves])


def like(vector: Tensor, tree: Any) -> Any:
    leaves, spec = pytree.tree_flatten(tree)
    parts = vector.split([leaf.numel() for leaf in leaves])
    return pytree.tree_unflatten([p.reshape(t.shape).to(t.dtype) for p, t in zip(parts, leaves, strict=True)], spec)


def tree_arguments() -> st.SearchStrategy[Any]:
    return st.tuples(
        testing.pytrees(6, dtype=st.sampled_from([F64, F64, F64, torch.float32])),
        st.integers(0, 20),  # tenths of log10 of the condition
        st.integers(0, 999),  # seed
        st.sampled_from(LAYOUTS),
        st.sampled_from(["normal", "unit", "zero"]),
    )


def work_tree(trial: Trial, arguments: Any) -> None:
    """1/2 x'Ax - c'x over all entries of a tree: x = A^-1 c; gradients in the tree c and in A."""
    c, tenths, seed, layout, kind = arguments
    leaves = pytree.tree_leaves(c)
    single = any(leaf.dtype == torch.float32 for leaf in leaves)
    n = sum(leaf.numel() for leaf in leaves)
    mixed = len({leaf.dtype for leaf in leaves}) > 1
    trial.kind = ("mixed" if mixed else "f32" if single else "f64") + (", empty" if n == 0 else "")
    matrix = testing.spd_matrix(n, log10_cond=tenths / 10, seed=seed) if n else torch.zeros(0, 0, dtype=F64)
    # Leaves of mixed dtypes are solved to float64's tolerance, with products that pass through float32: it may be said
    # that this was not reached.
    dtype = torch.float32 if single else F64
    condition = condition_of(matrix) if n else 1.0
    trial.must = "either" if mixed else must_be_right(condition, n, dtype)
    matrix = testing.relayout(matrix, layout).requires_grad_()
    c = pytree.tree_map(lambda t: testing.relayout(t, layout).requires_grad_(), c)

    def objective(x: Any, matrix: Tensor, c: Any) -> Tensor:
        at = flat(x)
        return 0.5 * at @ (matrix @ at) - flat(c) @ at

    def solver(f: Any, x: Any, matrix: Tensor, c: Any) -> Any:
        return reversed_keys(like(torch.linalg.solve(matrix, flat(c)), x))

    layer = il.argmin(objective, solver)
    init = pytree.tree_map(torch.zeros_like, c)
    x = layer(init, matrix, c)
    trial.claim(pytree.tree_structure(x) == pytree.tree_structure(c), "x has not the structure of init")
    v = testing.cotangent(init, kind, seed=seed)
    outputs = [
        (leaf, w) for leaf, w in zip(pytree.tree_leaves(x), pytree.tree_leaves(v), strict=True) if leaf.requires_grad
    ]
    inputs = [matrix, *pytree.tree_leaves(c)]
    if not outputs:
        trial.claim(False, "no output requires grad")
        return
    got = torch.autograd.grad([o for o, _ in outputs], inputs, [w for _, w in outputs], materialize_grads=True)
    trial.claim(
        all(g.shape == t.shape and g.dtype == t.dtype for g, t in zip(got, inputs, strict=True)), "shape or dtype"
    )
    with torch.no_grad():
        u = torch.linalg.solve(matrix, flat(v)) if n else flat(v)
        at = flat(x)
        expected = [-(torch.outer(u, at) + torch.outer(at, u)) / 2, *pytree.tree_leaves(like(u, c))]
    trial.compare("gradient", got, expected, 2**0.5 * condition * residual_allowed(dtype, max(n, 1)))


PROBLEMS = (testing.quadratic_problem, testing.smooth_convex_problem, testing.nonconvex_problem, testing.root_problem)


def role_arguments() -> st.SearchStrategy[Any]:
    sizes, conditions = st.integers(1, 6), st.integers(0, 2)
    problems = [
        testing.quadratic_problems(n=sizes, log10_cond=conditions),
        testing.smooth_convex_problems(n=sizes, log10_cond=conditions),
        testing.nonconvex_problems(n=sizes, log10_cond=conditions),
        testing.root_problems(n=sizes, log10_cond=conditions),
    ]
    return st.tuples(testing.theta_roles(), st.one_of(problems), st.integers(0, 999))


def work_role(trial: Trial, arguments: Any) -> None:
    """The gradient of every tensor, in whatever way it entered the problem."""
    role, problem, seed = arguments
    trial.kind = role.name
    case = role(problem)
    make = il.root if isinstance(problem, testing.RootProblem) else il.argmin
    v = testing.cotangent(problem.init, seed=seed)
    x = make(case.objective, case.solver)(case.init, *case.theta)
    inputs = [t for t in case.inputs if t.requires_grad]
    got = dict(zip(map(id, inputs), torch.autograd.grad(x, inputs, v, allow_unused=True), strict=True))
    pairs = []
    for tensor, right in zip(case.inputs, case.expected(v), strict=True):
        gradient = got.get(id(tensor))
        if right is None:
            trial.claim(gradient is None or not bool(gradient.any()), "a gradient where None or zero is right")
        else:
            trial.claim(gradient is not None, "no gradient")
            pairs.append((torch.zeros_like(right) if gradient is None else gradient, right))
    # 3 t - 2 t, in one of the roles, adds up to five roundings for one; allowed is far above that
    allowed = Dense.of(problem, range(len(pairs))).allowed_vjp(v, F64)
    trial.compare(role.name, [g for g, _ in pairs], [r for _, r in pairs], allowed)


FAULTS = [fault.name for fault in testing.faults(lambda f, x: x)]


def work_fault(trial: Trial, fault: int, problem: int, n: int, tenths: int, seed: int, policy: int) -> None:
    """A solver that misbehaves: the named error, the named warning, or the right gradient."""
    case = PROBLEMS[problem](n, log10_cond=tenths / 10, seed=seed)
    faulty = testing.Fault(FAULTS[fault], case.solver)
    trial.kind = faulty.name
    trial.must = "report" if faulty.raises or faulty.warns else "right"
    trial.allowed_errors = (testing.SolverFailedError,)
    make = il.root if isinstance(case, testing.RootProblem) else il.argmin
    layer = make(case.function, faulty, on_failure="raise" if policy else "warn")
    wanted: type[Exception] | None = faulty.raises or (
        il.StationarityError if policy and faulty.warns else faulty.warns
    )
    before = [t.detach().clone() for t in case.theta]
    start = case.init.clone()
    try:
        x = layer(start, *case.theta)
    except Exception as error:
        if wanted is not None and not isinstance(error, wanted):
            raise RuntimeError(f"{faulty.must}, but it raised {type(error).__name__}: {error}") from error
        raise
    if trial.must == "report":
        return  # the warning is collected by the trial
    trial.claim(torch.equal(start, case.init), "the caller's init was changed")
    trial.claim(all(torch.equal(a, t) for a, t in zip(before, case.theta, strict=True)), "theta was changed")
    v = testing.cotangent(case.init, seed=seed + 11)
    got = torch.autograd.grad(x, case.theta, v)
    dense = Dense.of(case)
    allowed = dense.allowed_vjp(v, F64)
    # An answer rounded by fault.error moves H and B by their derivatives in x, whose relative size is below 10 (6 y of
    # the wells; tanh and sigmoid are flatter); such a change of H is amplified as any other is. 100: for both.
    exact = case.solution(*case.theta)
    allowed += 100 * faulty.error * float(1 + exact.norm()) * allowed / residual_allowed(F64, n)
    trial.compare("gradient", got, dense.vjp(v), allowed)


FAMILIES = [
    StrategyFamily("tree", "trees with leaves of every shape and layout", 500, tree_arguments, work_tree),
    StrategyFamily("role", "every way in which a tensor can enter as theta", 400, role_arguments, work_role),
    DrawnFamily("fault", "solvers that misbehave", 600,
                {"fault": (0, len(FAULTS) - 1), "problem": (0, 3), "n": (1, 8), "tenths": (0, 20), "seed": SEEDS,
                 "policy": (0, 1)}, work_fault),
]  # fmt: skip
