"""All linear and inner solvers of the package, each with what it promises: what the conformance tests run over."""

# The objectives of the checks have Hessians between mu = 1/20 and beta = 1 (log10_cond = 1), so that a gradient of
# norm g leaves x at most 20 g away from the minimiser.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import implicitlayer as il
from implicitlayer import testing

F64 = torch.float64
solvers = il.solvers


class OnTheGradient:
    """A solver of roots or fixed points as a minimiser: of ``grad f = 0``, or of ``x = x - grad f``."""

    def __init__(self, solver: Any, fixed_point: bool = False) -> None:
        self.solver, self.fixed_point = solver, fixed_point
        self.batched = bool(solver.batched)

    def __call__(self, objective: Callable[..., Tensor], init: Any, *theta: Any) -> Any:
        gradient = torch.func.grad(lambda x: objective(x, *theta).sum())

        def function(x: Any) -> Any:
            slope = gradient(x)
            return pytree.tree_map(torch.sub, x, slope) if self.fixed_point else slope

        function.lane_dims = objective(init, *theta).ndim  # type: ignore[attr-defined]
        return self.solver(function, init)


class SumOfSquares:
    """A solver of least squares as a minimiser: the residuals are the entries of the gradient."""

    def __init__(self, solver: Any) -> None:
        self.solver, self.batched = solver, bool(solver.batched)

    def __call__(self, objective: Callable[..., Tensor], init: Any, *theta: Any) -> Any:
        lanes = objective(init, *theta).ndim

        def half_squares(slopes: list[Tensor]) -> Tensor:
            squares: list[Tensor] = [0.5 * s.reshape(*s.shape[:lanes], -1).square().sum(-1) for s in slopes]
            return torch.stack(squares).sum(0)

        def gradient(x: Any) -> Any:
            return pytree.tree_leaves(torch.func.grad(lambda x: objective(x, *theta).sum())(x))

        return self.solver(il.composite(half_squares, gradient), init)


def classes_of(claims: list[Any]) -> set[type]:
    """The classes of the solvers that the claims are about, and of those inside of them."""
    solvers = [claim.solver for claim in claims]
    return {type(one) for solver in solvers for one in (solver, getattr(solver, "solver", solver))}


def unlisted(listed: list[Any], base: Any, claim: Any) -> list[Any]:
    """Claims for the package's solvers below ``base`` that ``listed`` says nothing of."""
    known = classes_of(listed)
    kinds = [kind for kind in testing.extensions(base, "implicitlayer") if kind not in known]
    return [claim(example) for kind in kinds for example in kind.examples()]


LINEAR = [
    testing.linear(il.ConjugateGradient()),
    testing.linear(il.ConjugateGradient(preconditioner=il.Jacobi()), name="ConjugateGradient, Jacobi"),
    testing.linear(il.ConjugateGradient(preconditioner=il.Nystrom(3)), name="ConjugateGradient, Nystrom"),
    # its number of steps, and so its rounding, depends on the solve before
    testing.linear(il.WarmStart(il.ConjugateGradient()), "positive definite", deterministic=False),
    testing.linear(il.Minres()),
    testing.linear(il.Minres(preconditioner=il.Jacobi()), name="Minres, Jacobi"),
    testing.linear(il.Gmres()),
    testing.linear(il.Gmres(restart=7), "contraction", name="Gmres, restarted"),  # may stagnate on the others
    testing.linear(il.Gmres(preconditioner=il.Jacobi()), name="Gmres, Jacobi"),
    testing.linear(il.Bicgstab()),
    testing.linear(il.Bicgstab(preconditioner=il.Jacobi()), name="Bicgstab, Jacobi"),
    testing.linear(il.NormalEquations()),
    # MINRES ends where A'r is small: in float32 that is enough up to a condition of 10, squared in A'A
    testing.linear(il.NormalEquations(il.Minres()), "general", log10_cond=1, name="NormalEquations, Minres"),
    testing.linear(il.Dense()),
    testing.linear(il.Neumann(40)),  # 0.5^40 = 1e-12
]
LINEAR += unlisted(LINEAR, il.LinearSolver, testing.linear)

# A tolerance of 2e-8 on the gradient leaves x within 4e-7. It is absolute, because one check begins at the solution.
# In float32 nobody reaches it: the limits of steps are what the promise takes in float64, with some to spare.
TO = {"atol": 2e-8}
# momentum 1/2 multiplies the slowest direction by 0.885 a step: 0.885^100 = 5e-6
SGD = solvers.TorchOptimizer(torch.optim.SGD, max_steps=100, lr=1.0, momentum=0.5)
TORCH_LBFGS = solvers.TorchOptimizer(
    torch.optim.LBFGS, max_steps=20, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-16
)
WIDE = il.sets.Box(-1e3, 1e3)  # never active: the projected method must then be the plain one

INNER = [
    testing.inner(solvers.GradientDescent(1.0, max_steps=400)),  # 0.95^400 = 1e-9
    testing.inner(solvers.GradientDescent(1.0, max_steps=400, **TO), name="GradientDescent, atol"),
    testing.inner(
        solvers.GradientDescent(1.0, max_steps=400, line_search="armijo", **TO), name="GradientDescent, armijo"
    ),
    testing.inner(
        solvers.AcceleratedGradient(1.0, strong_convexity=0.05, max_steps=100, **TO), name="AcceleratedGradient"
    ),
    testing.inner(solvers.AcceleratedGradient(max_steps=150, **TO), name="AcceleratedGradient, searched"),
    testing.inner(solvers.LBFGS(max_steps=50, **TO)),
    testing.inner(solvers.NewtonCG(max_steps=20, **TO)),
    testing.inner(solvers.NewtonCG(max_steps=20, line_search="wolfe", **TO), name="NewtonCG, wolfe"),
    testing.inner(SumOfSquares(solvers.LevenbergMarquardt(max_steps=20, **TO)), name="LevenbergMarquardt, gradient"),
    testing.inner(solvers.ProximalGradient(il.L1(0.0), max_steps=150, **TO), name="ProximalGradient, L1(0)"),
    testing.inner(solvers.ProjectedGradient(WIDE, max_steps=150, **TO), name="ProjectedGradient, wide box"),
    testing.inner(SGD, 1e-4, name="TorchOptimizer, SGD"),
    testing.inner(TORCH_LBFGS, name="TorchOptimizer, LBFGS"),
    # BFGS and L-BFGS-B stop where values of the objective differ by rounding: the square root of eps, 1e-8
    *(
        testing.inner(solvers.SciPyMinimize(method, tol=tol), 1e-5, name=f"SciPyMinimize, {method}")
        # trust-ncg says so only by its step limit
        for method, tol in (("BFGS", 1e-12), ("L-BFGS-B", 1e-12), ("Newton-CG", 1e-12), ("trust-ncg", 1e-7))
    ),
    testing.inner(OnTheGradient(solvers.Newton(atol=1e-12, max_steps=20)), name="Newton, gradient"),
    testing.inner(OnTheGradient(solvers.Broyden(atol=1e-9, max_steps=40)), name="Broyden, gradient"),
    testing.inner(
        OnTheGradient(solvers.AndersonAcceleration(atol=1e-9, max_steps=40), fixed_point=True),
        name="AndersonAcceleration, gradient",
    ),
]
INNER += unlisted(INNER, il.RecordingSolver, testing.inner)
