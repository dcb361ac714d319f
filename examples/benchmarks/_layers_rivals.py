"""The problems of `layers.py` in other libraries, each at the best settings found; one without a way to state a problem
has no row there.

Every maker takes a problem and returns a call without arguments: forward and gradient, from numbers to numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _layers_problems import Problem, Solved, newton_logistic, svm_program

Call = Callable[[], Solved]
Solver = Callable[..., torch.Tensor]  # (x [B, n], *thetas) -> x
Makers = dict[str, Callable[[Problem], Call]]
RTOL = 1e-10  # asked of everybody: gradient norm relative to the start, residual of the linear solve


def by_autograd(problem: Problem, layer: Callable[..., torch.Tensor]) -> Call:
    """Forward and backward of a PyTorch layer ``layer(*thetas) -> x [B, n]``."""

    def call() -> Solved:
        leaves = [t.detach().requires_grad_() for t in problem.thetas]
        x = layer(*leaves)
        return x.detach(), list(torch.autograd.grad((x * x).sum(), leaves))

    return call


# --- The objectives in torch, one value per lane.


def ridge(x: Any, s: Any, b: Any, A: Any) -> torch.Tensor:
    return 0.5 * ((x @ A.T - b) ** 2).mean(-1) + 0.5 * s.exp() * (x * x).sum(-1)


def logistic(x: Any, s: Any, A: Any, y: Any) -> torch.Tensor:
    return F.softplus(-y * (x @ A.T)).mean(-1) + 0.5 * s.exp() * (x * x).sum(-1)


def squares(x: Any, t: Any, b: Any, A: Any) -> torch.Tensor:
    """The smooth part of the lasso."""
    return 0.5 * ((x @ A.T - b) ** 2).mean(-1)


OBJECTIVES: dict[str, Callable[..., torch.Tensor]] = {"ridge": ridge, "logistic": logistic, "lasso": squares}


def direct(problem: Problem, *thetas: torch.Tensor) -> torch.Tensor:
    """The solver that somebody who knows the problem would write: one linear solve, or Newton with dense Hessians."""
    if problem.kind == "logistic":
        return newton_logistic(problem.constants, thetas[0])
    (A,), (s, b) = problem.constants, thetas[:2]
    H = A.T @ A / len(A) + s.exp()[:, None, None] * torch.eye(A.shape[1], dtype=A.dtype)
    return torch.cholesky_solve((b @ A / len(A))[..., None], torch.linalg.cholesky(H))[..., 0]


def step_of(problem: Problem) -> float:
    """One over the largest curvature of the lasso's smooth part: everybody is told, and nobody searches for it."""
    (A,) = problem.constants
    return 1 / float(torch.linalg.matrix_norm(A, 2) ** 2 / len(A))


def proximal_step(problem: Problem) -> Callable[..., torch.Tensor]:
    """One step of the proximal gradient method for the lasso, written out; made once for a problem."""
    (A,), step = problem.constants, step_of(problem)

    def moved(x: torch.Tensor, t: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = x - step * (x @ A.T - b) @ A / len(A)
        return F.relu(y - step * t[:, None]) - F.relu(-y - step * t[:, None])

    return moved


def fista(problem: Problem) -> Solver:
    """The lasso's solver by hand: gradient and prox written out, one momentum for all lanes."""
    (A,), moved, step = problem.constants, proximal_step(problem), step_of(problem)

    def solve(x: torch.Tensor, t: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        z, k, limit = x, 1.0, RTOL * float((b @ A / len(A)).norm()) * step
        for _ in range(5000):
            new = moved(z, t, b)
            if float((z - new).norm()) <= limit:
                return new
            next_k = (1 + (1 + 4 * k * k) ** 0.5) / 2
            if float(((z - new) * (new - x)).sum()) > 0:  # uphill: start the momentum anew
                next_k, k = 1.0, 1.0
            x, z, k = new, new + (k - 1) / next_k * (new - x), next_k
        return x

    return solve


def active_set(problem: Problem) -> Solver:
    """The lasso's exact solver by hand: signs s are guessed, C_SS x_S = d_S - t s_S solved, and those that are wrong
    (x against its sign, a gradient above t) changed, for C = A'A / m, d = A'b / m; FISTA where that does not end.
    """
    (A,), other = problem.constants, fista(problem)
    C = A.T @ A / len(A)

    def solve(start: torch.Tensor, t: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        d, t = b @ A / len(A), t[:, None]
        x = signs = torch.zeros_like(start)
        for _ in range(20):
            slope = x @ C - d
            new = torch.where(signs == 0, torch.where(slope.abs() > t, -slope.sign(), 0.0), signs)
            new = torch.where(signs * x < 0, 0.0, new)
            if torch.equal(new, signs):
                return x
            signs, held = new, new.abs()
            system = C * held[:, :, None] * held[:, None, :] + torch.diag_embed(1 - held)
            factor, _ = torch.linalg.cholesky_ex(system)
            x = torch.cholesky_solve((held * (d - t * signs))[..., None], factor)[..., 0]
        return other(start, t[:, 0], b)

    return solve


# --- TorchOpt: all lanes as one problem, which its CG solves faster than a loop over them. It has no constraints.


def torchopt_makers() -> Makers:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchopt

    def layer(problem: Problem, solver: Callable[..., torch.Tensor], optimality: Callable, solve: Any) -> Call:
        argnums = tuple(range(1, 1 + len(problem.thetas)))
        start = torch.zeros(problem.lanes, problem.n, dtype=torch.float64)

        @torchopt.diff.implicit.custom_root(optimality, argnums=argnums, solve=solve)
        def fit(x: torch.Tensor, *thetas: torch.Tensor) -> torch.Tensor:
            return solver(x, *(t.detach() for t in thetas))

        return by_autograd(problem, lambda *thetas: fit(start, *thetas))

    def smooth(problem: Problem, solver: Callable[..., torch.Tensor]) -> Call:
        value = lambda x, *thetas: OBJECTIVES[problem.kind](x, *thetas, *problem.constants).sum()  # noqa: E731
        cg = torchopt.linear_solve.solve_cg(rtol=RTOL, maxiter=10 * problem.n * problem.lanes)
        return layer(problem, solver, torch.func.grad(value), cg)

    def with_lbfgs(problem: Problem) -> Call:
        def solver(x: torch.Tensor, *thetas: torch.Tensor) -> torch.Tensor:
            x = x.clone().requires_grad_()
            value = lambda: OBJECTIVES[problem.kind](x, *thetas, *problem.constants).sum()  # noqa: E731
            with torch.enable_grad():
                limit = RTOL * float(torch.autograd.grad(value(), x)[0].norm())
                settings = {"tolerance_grad": limit, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
                optimizer = torch.optim.LBFGS([x], max_iter=2000, max_eval=10**6, history_size=20, **settings)

                def closure() -> torch.Tensor:
                    optimizer.zero_grad()
                    loss = value()
                    loss.backward()
                    return loss

                optimizer.step(closure)
            return x.detach()

        return smooth(problem, solver)

    def with_direct(problem: Problem) -> Call:
        return smooth(problem, lambda _, *thetas: direct(problem, *thetas))

    def lasso(problem: Problem, solver: Callable[[Problem], Solver]) -> Call:
        moved = proximal_step(problem)
        # x - moved(x) is not symmetric in x, so its transpose needs the normal equations
        cg = torchopt.linear_solve.solve_normal_cg(rtol=RTOL, maxiter=10 * problem.n * problem.lanes)
        return layer(problem, solver(problem), lambda x, t, b: x - moved(x, t, b), cg)

    makers: Makers = {}
    makers |= {f"{k}: TorchOpt, torch.optim.LBFGS + CG": with_lbfgs for k in ("ridge", "logistic")}
    makers |= {f"{k}: TorchOpt, direct + CG": with_direct for k in ("ridge", "logistic")}
    makers["lasso: TorchOpt, FISTA by hand + normal CG"] = lambda p: lasso(p, fista)
    return makers | {"lasso: TorchOpt, active set by hand + normal CG": lambda p: lasso(p, active_set)}


# --- cvxpylayers.


def cvxpylayers_makers() -> Makers:
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    def make(problem: Problem, mode: str) -> Call:
        if problem.kind == "logistic" and problem.n > 20:
            raise TimeoutError("not run: minutes a call (two exponential cones for each of the 4 n points)")
        x = cp.Variable(problem.n)
        A = problem.constants[0].numpy()
        if problem.kind == "logistic":
            penalty = cp.Parameter(nonneg=True)
            value = cp.sum(cp.logistic(-cp.multiply(problem.constants[1].numpy(), A @ x))) / len(A)
            parameters, value = [penalty], value + 0.5 * penalty * cp.sum_squares(x)
        else:
            penalty, b = cp.Parameter(nonneg=True), cp.Parameter(len(A))
            value = 0.5 / len(A) * cp.sum_squares(A @ x - b)
            other = 0.5 * cp.sum_squares(x) if problem.kind == "ridge" else cp.norm1(x)
            parameters, value = [penalty, b], value + penalty * other
        layer = CvxpyLayer(cp.Problem(cp.Minimize(value)), parameters, [x])
        to_penalty = torch.clone if problem.kind == "lasso" else torch.exp
        arguments = {"mode": mode, **TIGHT}
        return by_autograd(problem, lambda s, *rest: layer(to_penalty(s), *rest, solver_args=arguments)[0])

    kinds = ("ridge", "logistic", "lasso")
    makers: Makers = {f"{k}: cvxpylayers, LSQR": lambda p: make(p, "lsqr") for k in kinds}
    return makers | {f"{k}: cvxpylayers, dense": lambda p: make(p, "dense") for k in kinds}


# The most accurate of its solvers here: Clarabel at 1e-12 leaves 1e-5 in x, SCS 1e-12, in the same time.
TIGHT = {"solve_method": "SCS", "eps": 1e-12}


# --- Layers for quadratic programs.


def by_program(problem: Problem, layer: Callable[..., torch.Tensor]) -> Call:
    """The same call for both kinds: the machine's program is made of its thetas first."""
    if problem.kind == "qp":
        return by_autograd(problem, layer)
    return by_autograd(problem, lambda *thetas: layer(*svm_program(problem.constants, *thetas)))


def qpth_makers() -> Makers:
    from qpth.qp import QPFunction

    # its default tolerance: a tighter one costs time and leaves the error of the gradient as it is
    def layer(Q: Any, p: Any, A: Any, b: Any, G: Any, h: Any) -> torch.Tensor:
        return QPFunction(verbose=-1)(Q, p, G, h, A, b)

    return {f"{kind}: qpth": lambda problem: by_program(problem, layer) for kind in ("svm", "qp")}


def cvxpylayers_qp_makers() -> Makers:
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    # x'Qx is ||root x||^2: a matrix parameter inside a quadratic form it cannot have
    def machine(problem: Problem, mode: str) -> Call:
        n, y = problem.n, problem.constants[1]  # the rows are constants here: the kernel's root and C are parameters
        a, root, c = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(nonneg=True)
        value = cp.Minimize(0.5 * cp.sum_squares(root @ a) - cp.sum(a))
        layer = CvxpyLayer(cp.Problem(value, [y.numpy() @ a == 0, a >= 0, a <= c]), [root, c], [a])

        def solve(log_c: torch.Tensor, log_gamma: torch.Tensor) -> torch.Tensor:
            Q = svm_program(problem.constants, log_c, log_gamma)[0]
            return layer(torch.linalg.cholesky(Q).mT, log_c.exp(), solver_args={"mode": mode, **TIGHT})[0]

        return by_autograd(problem, solve)

    def program(problem: Problem, mode: str) -> Call:
        n = problem.n
        x, root = cp.Variable(n), cp.Parameter((n, n))
        p, A, b, G, h = (cp.Parameter(t.shape[1:]) for t in problem.thetas[1:])
        value = cp.Minimize(0.5 * cp.sum_squares(root @ x) + p @ x)
        layer = CvxpyLayer(cp.Problem(value, [A @ x == b, G @ x <= h]), [root, p, A, b, G, h], [x])

        def solve(Q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            return layer(torch.linalg.cholesky(Q).mT, *rest, solver_args={"mode": mode, **TIGHT})[0]

        return by_autograd(problem, solve)

    makers: Makers = {}
    for kind, build in (("svm", machine), ("qp", program)):
        makers[f"{kind}: cvxpylayers, LSQR"] = partial(build, mode="lsqr")
        makers[f"{kind}: cvxpylayers, dense"] = partial(build, mode="dense")
    return makers
