"""The five problems of `layers.py`, each with its data and an independent reference for the solution and its gradient.

The outer loss is the sum of the squares of x everywhere, so the cotangent is 2 x.
"""

# n: unknowns, m: rows of the design A, B: lanes (problems solved together).

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from qp_layers import program, reference

import implicitlayer as il

Tensor = torch.Tensor
Solved = tuple[Tensor, list[Tensor]]  # x [B, n] and the gradient in each theta


@dataclass(frozen=True)
class Problem:
    """What everybody is given: constants of the problem, and the thetas that get a gradient."""

    kind: str
    n: int
    lanes: int
    constants: tuple[Tensor, ...]
    thetas: tuple[Tensor, ...]
    expected: Solved

    @property
    def name(self) -> str:
        return f"{self.kind} n={self.n} x{self.lanes}"


def make(kind: str, n: int, lanes: int, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    constants, thetas = DATA[kind](n, lanes, generator)
    return Problem(kind, n, lanes, constants, thetas, EXPECTED[kind](constants, thetas))


def errors(found: Solved, expected: Solved) -> tuple[float, float]:
    """Distance to x, and of the gradients, the worst lane and theta, each relative to the norm of what is right.

    A gradient that is small beside those in the other thetas of its lane (zero, where no row of a program is active) is
    taken relative to 1e-3 of theirs.
    """
    lanes = len(expected[0])
    rows = [[g.reshape(lanes, -1) for g in gradients] for gradients in (found[1], expected[1])]
    least = 1e-3 * torch.cat(rows[1], 1).norm(dim=1)

    def worst(got: Tensor, right: Tensor, least: Tensor) -> float:
        size = torch.maximum(right.norm(dim=1), least)
        return float(((got - right).norm(dim=1) / size).nan_to_num(torch.inf).max())

    of_x = worst(found[0], expected[0], torch.full_like(least, 1e-12))
    return of_x, max(worst(*pair, least) for pair in zip(*rows, strict=True))


# --- Data.


def ridge_data(n: int, lanes: int, generator: torch.Generator) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A [m, n] shared; log-penalties s [B] and targets b [B, m]: 1/(2m) ||A x - b||^2 + e^s / 2 ||x||^2."""
    A = torch.randn(2 * n, n, dtype=torch.float64, generator=generator)
    b = torch.randn(lanes, 2 * n, dtype=torch.float64, generator=generator)
    return (A,), (log_penalties(lanes), b)


def logistic_data(n: int, lanes: int, generator: torch.Generator) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A [m, n] pixel-like, labels y = +-1 [m] shared; s [B]: mean log(1 + exp(-y A x)) + e^s / 2 ||x||^2."""
    m, strokes = 4 * n, max(4, n // 6)  # a picture is a sum of few strokes, some noise, and has no negative pixel
    A = torch.randn(m, strokes, dtype=torch.float64, generator=generator) @ torch.randn(
        strokes, n, dtype=torch.float64, generator=generator
    )
    A = (A / strokes**0.5 + 0.3 * torch.randn(m, n, dtype=torch.float64, generator=generator)).clamp(min=0)
    truth, noise = (torch.randn(k, dtype=torch.float64, generator=generator) for k in (n, m))
    scores = (A - A.mean(0)) @ truth
    return (A, (scores / scores.std() + 0.5 * noise).sign()), (log_penalties(lanes),)


def lasso_data(n: int, lanes: int, generator: torch.Generator) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A [m, n] shared; strengths t [B], targets b [B, m]: 1/(2m) ||A x - b||^2 + t ||x||_1, 10 % of x not zero."""
    A = torch.randn(2 * n, n, dtype=torch.float64, generator=generator)
    few = torch.rand(lanes, n, dtype=torch.float64, generator=generator) < 0.1
    truth = few * torch.randn(lanes, n, dtype=torch.float64, generator=generator)
    truth[:, 0] = 1.0
    b = truth @ A.T + 0.5 * torch.randn(lanes, 2 * n, dtype=torch.float64, generator=generator)
    largest = (b @ A / len(A)).abs().amax(1)  # x = 0 above it
    return (A,), (largest * torch.linspace(0.3, 0.05, lanes, dtype=torch.float64), b)


def svm_data(n: int, lanes: int, generator: torch.Generator) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """n points in the plane: squared distances D [n, n], labels y [n] shared; log C [B] and log gamma [B]."""
    points = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    noise = 0.3 * torch.randn(n, dtype=torch.float64, generator=generator)
    y = torch.where(points.square().sum(1) + noise > 1.4, 1.0, -1.0).double()
    D = torch.cdist(points, points).square()
    return (D, y), (torch.linspace(0.2, 1.0, lanes).double(), torch.linspace(0.2, 1.1, lanes).double())


def qp_data(n: int, lanes: int, generator: torch.Generator) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The programs of `qp_layers.py`: Q, p, A, b, G, h, n inequalities and n / 10 equations."""
    return (), tuple(program(lanes, n, generator.initial_seed()))


def log_penalties(lanes: int) -> Tensor:
    return torch.logspace(-2, 0, lanes, dtype=torch.float64).log()


def svm_program(constants: tuple[Tensor, ...], log_c: Tensor, log_gamma: Tensor) -> list[Tensor]:
    """The dual: 1/2 a'Qa - sum a, y'a = 0, 0 <= a <= C; Q = yy' * (exp(-gamma D) + I/10): the machine with a
    quadratic slack besides, so that Q is well conditioned and a is unique."""
    D, y = constants
    lanes, n = len(log_c), len(y)
    kernel = torch.exp(-log_gamma.exp()[:, None, None] * D) + 0.1 * torch.eye(n, dtype=torch.float64)
    bounds = torch.cat([torch.zeros(lanes, n).double(), log_c.exp()[:, None].expand(lanes, n)], 1)
    eye = torch.eye(n, dtype=torch.float64)
    rows = torch.cat([-eye, eye]).expand(lanes, 2 * n, n)
    ones = torch.ones(lanes, n, dtype=torch.float64)
    return [kernel * torch.outer(y, y), -ones, y.expand(lanes, 1, n), torch.zeros(lanes, 1).double(), rows, bounds]


# --- References: dense linear algebra by hand; nothing here goes through a layer.


def dense_gradient(H: Tensor, x: Tensor) -> Tensor:
    """u = H^-1 (2 x), lane by lane; the gradient in theta is -(d^2 f / dtheta dx) u."""
    return torch.linalg.solve(H, 2 * x)


def ridge_expected(constants: tuple[Tensor, ...], thetas: tuple[Tensor, ...]) -> Solved:
    (A,), (s, b) = constants, thetas
    H = A.T @ A / len(A) + s.exp()[:, None, None] * torch.eye(A.shape[1], dtype=torch.float64)
    x = torch.linalg.solve(H, b @ A / len(A))
    u = dense_gradient(H, x)
    return x, [-s.exp() * (x * u).sum(1), u @ A.T / len(A)]


def logistic_expected(constants: tuple[Tensor, ...], thetas: tuple[Tensor, ...]) -> Solved:
    x = newton_logistic(constants, thetas[0])
    slope, H = logistic_derivatives(constants, thetas[0], x)
    assert float(slope.abs().max()) < 1e-13, "the reference is not at the minimum"
    u = dense_gradient(H, x)
    return x, [-thetas[0].exp() * (x * u).sum(1)]


def logistic_derivatives(constants: tuple[Tensor, ...], s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [B, n] and Hessian [B, n, n], written out."""
    A, y = constants
    p = torch.sigmoid(-y * (x @ A.T))  # [B, m]
    slope = -(p * y) @ A / len(A) + s.exp()[:, None] * x
    eye = torch.eye(A.shape[1], dtype=torch.float64)
    return slope, (A.T * (p * (1 - p) / len(A))[:, None]) @ A + s.exp()[:, None, None] * eye


def newton_logistic(constants: tuple[Tensor, ...], s: Tensor) -> Tensor:
    """x [B, n] by Newton's method from zero; the error after a step is of the order of its square."""
    x = torch.zeros(len(s), constants[0].shape[1], dtype=torch.float64)
    for _ in range(50):
        slope, H = logistic_derivatives(constants, s, x)
        step = torch.cholesky_solve(slope[..., None], torch.linalg.cholesky(H))[..., 0]
        x = x - step
        if float((step.norm(dim=1) / x.norm(dim=1)).max()) < 1e-7:
            break
    return x


def lasso_expected(constants: tuple[Tensor, ...], thetas: tuple[Tensor, ...]) -> Solved:
    """Coordinate descent finds the signs; with them x is the solution of a linear system, which must confirm them."""
    (A,), (t, b) = constants, thetas
    gram, right = A.T @ A / len(A), b @ A / len(A)
    x = torch.zeros_like(right)
    for _ in range(200):
        for j in range(len(gram)):
            free = right[:, j] - x @ gram[:, j] + gram[j, j] * x[:, j]
            x[:, j] = free.sign() * (free.abs() - t).clamp(min=0) / gram[j, j]
    by_t, by_b = torch.zeros_like(t), torch.zeros_like(b)
    for i in range(len(t)):
        on = x[i] != 0
        sign, H = x[i, on].sign(), gram[on][:, on]
        exact = torch.linalg.solve(H, right[i, on] - t[i] * sign)
        x[i, on] = exact
        off = (right[i] - gram @ x[i])[~on].abs()
        assert bool((exact.sign() == sign).all()) and bool((off < t[i]).all()), "the reference has wrong signs"
        u = torch.linalg.solve(H, 2 * exact)
        by_t[i], by_b[i] = -sign @ u, A[:, on] @ u / len(A)
    return x, [by_t, by_b]


def svm_expected(constants: tuple[Tensor, ...], thetas: tuple[Tensor, ...]) -> Solved:
    leaves = [t.clone().requires_grad_() for t in thetas]
    data = svm_program(constants, *leaves)
    x, by_data = qp_expected((), tuple(t.detach() for t in data))
    moving = [(d, g) for d, g in zip(data, by_data, strict=True) if d.requires_grad]
    return x, list(torch.autograd.grad([d for d, _ in moving], leaves, [g for _, g in moving]))


def qp_expected(constants: tuple[Tensor, ...], thetas: tuple[Tensor, ...]) -> Solved:
    """The interior point only says which rows are active: those with more force than slack.

    The point of these rows has to satisfy the conditions of optimality, which prove it to be the solution.
    """
    near = il.solvers.InteriorPoint()(*thetas)
    points, gradients = [], []
    for i in range(len(near.x)):
        lane = [t[i] for t in thetas]
        x = certified(lane, near.inequality[i] > lane[5] - lane[4] @ near.x[i])
        points.append(x)
        gradients.append(reference([t[None] for t in lane], x[None]))
    return torch.stack(points), [torch.stack(parts) for parts in zip(*gradients, strict=True)]


def certified(lane: list[Tensor], active: Tensor) -> Tensor:
    Q, p, A, b, G, h = lane
    rows, n = torch.cat([A, G[active]]), len(p)
    matrix = torch.zeros(n + len(rows), n + len(rows), dtype=torch.float64)
    matrix[:n, :n], matrix[:n, n:], matrix[n:, :n] = Q, rows.T, rows
    point = torch.linalg.solve(matrix, torch.cat([-p, b, h[active]]))
    x, force = point[:n], point[n + len(b) :]
    assert bool((force > 0).all()) and bool((G[~active] @ x < h[~active]).all()), "the reference has a wrong active set"
    return x


DATA: dict[str, Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]] = {
    "ridge": ridge_data,
    "logistic": logistic_data,
    "lasso": lasso_data,
    "svm": svm_data,
    "qp": qp_data,
}
EXPECTED: dict[str, Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Solved]] = {
    "ridge": ridge_expected,
    "logistic": logistic_expected,
    "lasso": lasso_expected,
    "svm": svm_expected,
    "qp": qp_expected,
}
