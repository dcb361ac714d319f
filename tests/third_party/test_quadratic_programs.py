"""``il.qp`` around other packages' solvers: OSQP, Clarabel, CVXPY, and scikit-learn's support vector machines."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from references import F64, randn
from torch import Tensor

import implicitlayer as il

Data = tuple[Tensor, ...]
SolverMaker = Callable[[], Callable[..., Any]]


def osqp_solver() -> Callable[..., Any]:
    osqp, sparse = pytest.importorskip("osqp"), pytest.importorskip("scipy.sparse")

    def solve(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Any:
        program = osqp.OSQP()
        rows = sparse.csc_matrix(torch.cat([A, G]).numpy())
        lower = np.concatenate([b.numpy(), np.full(len(h), -np.inf)])
        upper = torch.cat([b, h]).numpy()
        settings = {"verbose": False, "eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 100_000}
        program.setup(sparse.csc_matrix(np.triu(Q.numpy())), p.numpy(), rows, lower, upper, **settings)
        return program.solve(raise_error=True).x

    return solve


def clarabel_solver() -> Callable[..., Any]:
    clarabel, sparse = pytest.importorskip("clarabel"), pytest.importorskip("scipy.sparse")

    def solve(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Any:
        settings = clarabel.DefaultSettings()
        settings.verbose, settings.tol_gap_abs, settings.tol_gap_rel, settings.tol_feas = False, 1e-11, 1e-11, 1e-11
        cones = [clarabel.ZeroConeT(len(b)), clarabel.NonnegativeConeT(len(h))]
        P, rows = sparse.csc_matrix(np.triu(Q.numpy())), sparse.csc_matrix(torch.cat([A, G]).numpy())
        program = clarabel.DefaultSolver(P, p.numpy(), rows, torch.cat([b, h]).numpy(), cones, settings)
        return np.array(program.solve().x)

    return solve


def cvxpy_solver() -> Callable[..., Any]:
    cp = pytest.importorskip("cvxpy")

    def solve(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Any:
        x = cp.Variable(len(p))
        value = 0.5 * cp.quad_form(x, cp.psd_wrap(Q.numpy())) + p.numpy() @ x
        rows = [A.numpy() @ x == b.numpy(), G.numpy() @ x <= h.numpy()]
        tight = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
        cp.Problem(cp.Minimize(value), rows).solve(solver=cp.CLARABEL, **tight)
        return x.value

    return solve


SOLVERS: dict[str, SolverMaker] = {"osqp": osqp_solver, "clarabel": clarabel_solver, "cvxpy": cvxpy_solver}


def program() -> Data:
    """Three unknowns of six at their bound in the end, and a sum that is held."""
    root = randn(6, 6, seed=1)
    Q, p = root @ root.T / 6 + torch.eye(6, dtype=F64), randn(6, seed=2)
    return (
        Q,
        p,
        torch.ones(1, 6, dtype=F64),
        torch.ones(1, dtype=F64),
        -torch.eye(6, dtype=F64),
        torch.zeros(6, dtype=F64),
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_a_quadratic_program_has_the_gradient_of_the_same_solvers_differences(name: str) -> None:
    solver, data = SOLVERS[name](), program()

    def value(*moved: Tensor) -> Tensor:
        x: Tensor = il.qp(*moved, solver=solver, on_failure="raise")
        return (x * torch.arange(6, dtype=F64)).sum()

    leaves = [t.clone().requires_grad_() for t in data]
    gradients = torch.autograd.grad(value(*leaves), leaves)
    for k, gradient in enumerate(gradients):
        direction = randn(*data[k].shape, seed=10 + k)
        direction = direction + direction.mT if k == 0 else direction
        h = 1e-4
        ahead, behind = (solver(*(t + s * h * direction if j == k else t for j, t in enumerate(data))) for s in (1, -1))
        slope = torch.from_numpy((ahead - behind) / (2 * h)) @ torch.arange(6, dtype=F64)
        # the solvers' 1e-9 over h is 1e-5, the truncation h^2 = 1e-8
        assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=0, abs=1e-4)
        assert abs(float(slope)) > 1e-2


# Support vector classification: min 1/2 a'Q a - 1'a subject to y'a = 0, 0 <= a <= C, with Q = (y y') * K.
POINTS = randn(20, 2, seed=3)
LABELS = torch.where(POINTS[:, 0] + 0.8 * randn(20, seed=4) > 0, 1.0, -1.0).to(F64)
NEW = randn(5, 2, seed=5)


def kernel(a: Tensor, b: Tensor, gamma: Tensor) -> Tensor:
    return torch.exp(-gamma * (a[:, None] - b[None]).square().sum(-1))


def test_the_decisions_of_a_support_vector_machine_are_differentiated_in_c_and_in_the_width_of_its_kernel() -> None:
    svm = pytest.importorskip("sklearn.svm")

    def fitted(C: float, gram: Tensor) -> Any:
        return svm.SVC(C=C, kernel="precomputed", tol=1e-10).fit(gram.numpy(), LABELS.numpy())

    def solver(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Any:
        model, alpha = fitted(h[0].item(), LABELS[:, None] * Q * LABELS), np.zeros(len(p))
        alpha[model.support_] = np.abs(model.dual_coef_[0])
        return alpha

    def decisions(C: Tensor, gamma: Tensor) -> Tensor:
        n = len(LABELS)
        Q = LABELS[:, None] * kernel(POINTS, POINTS, gamma) * LABELS
        ones, eye, zero = torch.ones(n, dtype=F64), torch.eye(n, dtype=F64), torch.zeros(1, dtype=F64)
        box = torch.cat([eye, -eye]), torch.cat([C * ones, 0 * ones])
        alpha, rest = il.qp(Q, -ones, LABELS[None], zero, *box, solver=solver, return_multipliers=True)
        # the offset is the multiplier of y'a = 0
        return (alpha * LABELS) @ kernel(POINTS, NEW, gamma) + rest.equality

    C, gamma = torch.tensor(1.5, dtype=F64), torch.tensor(0.7, dtype=F64)

    def by_sklearn(C: float, gamma: float) -> Tensor:
        width = torch.tensor(gamma, dtype=F64)
        model = fitted(C, kernel(POINTS, POINTS, width))
        return torch.from_numpy(model.decision_function(kernel(NEW, POINTS, width).numpy()))

    # libsvm keeps the kernel in float32, so scikit-learn's own numbers are good to some 1e-7
    torch.testing.assert_close(decisions(C, gamma), by_sklearn(1.5, 0.7), rtol=0, atol=1e-6)
    found = torch.func.jacrev(decisions, (0, 1))(C, gamma)
    h = 1e-3  # 1e-7 / h = 1e-4, the truncation h^2 = 1e-6
    expected = (
        (by_sklearn(1.5 + h, 0.7) - by_sklearn(1.5 - h, 0.7)) / (2 * h),
        (by_sklearn(1.5, 0.7 + h) - by_sklearn(1.5, 0.7 - h)) / (2 * h),
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert min(float(part.abs().max()) for part in found) > 0.1  # a hundred times that
