"""Problems with known answers: families made from a size, exponents and a seed, and the implicit gradient of each."""

# n: unknowns, m: rows of a weight. Answers are computed in float64 from the very entries that the problem holds, also
# for float32 problems, by plain formulas without derivative rules. Nothing here calls the derivative code of the
# package: a reference shares no code with its test.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from implicitlayer.testing import _arrays as arrays

Theta = tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False, repr=False)
class _Problem:
    """What both kinds of problems hold, for :attr:`objective` or :attr:`residual` as ``function``."""

    function: Callable[..., torch.Tensor]
    init: torch.Tensor
    theta: Theta
    solution: Callable[..., torch.Tensor]
    recipe: str

    def __repr__(self) -> str:
        return self.recipe

    def solver(self, function: Callable[..., Any], init: torch.Tensor, *theta: torch.Tensor) -> torch.Tensor:
        """The exact solution as a solver: ``solver(objective, init, *theta) -> x``, in the dtype of ``init``."""
        return self.solution(*theta).to(init.dtype)

    def stationarity(self, x: torch.Tensor, *theta: torch.Tensor) -> torch.Tensor:
        """The function whose zero is the solution, [n]; with a graph in x and theta."""
        raise NotImplementedError

    def dense_jacobian(self) -> torch.Tensor:
        """Derivative of :meth:`stationarity` in x at the solution, [n, n], in float64; symmetric for an objective."""
        theta = [t.detach().double() for t in self.theta]
        x = self.solution(*theta).requires_grad_()
        value = self.stationarity(x, *theta)
        return torch.stack([torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in value])

    def dense_gradient(self, cotangent: torch.Tensor) -> list[torch.Tensor]:
        """The implicit gradient ``-(dF/dtheta)' u`` with ``(dF/dx)' u = cotangent`` [n] by a dense solve."""
        jacobian = self.dense_jacobian()
        # one power of two for all entries: no overflow inside the factorisation, no rounding
        unit = 2.0 ** math.floor(math.log2(float(jacobian.abs().max())))
        u = dense_solve(jacobian.T / unit, cotangent.detach().double()) / unit
        theta = [t.detach().double().requires_grad_() for t in self.theta]
        value = self.stationarity(self.solution(*[t.detach() for t in theta]).requires_grad_(), *theta)
        return [-g for g in torch.autograd.grad(value, theta, u, materialize_grads=True)]


@dataclass(frozen=True, eq=False, repr=False)
class ArgminProblem(_Problem):
    """An objective with its exact minimiser.

    Attributes:
        objective: ``objective(x, *theta) -> 0-d tensor``, plain torch code.
        init: tensor [n], a starting point; never the solution.
        theta: floating leaf tensors that require grad.
        solution: ``solution(*theta) -> x``, exact to rounding, in float64; a plain function, no derivative rules.
        mu: strong convexity, a lower bound of all eigenvalues of the Hessian at every x; None where there is none.
        beta: smoothness, an upper bound of them.
        rho: Lipschitz constant of the Hessian, ``||H(x) - H(y)||_2 <= rho ||x - y||_2``.
        saddle: another stationary point, where the Hessian has a negative eigenvalue; None where there is none.
        recipe: the call that makes this problem again; also its repr.

    Example:
        >>> import implicitlayer as il, torch
        >>> problem = il.testing.quadratic_problem(3, log10_cond=1)
        >>> x = il.argmin(problem.objective, problem.solver)(problem.init, *problem.theta)
        >>> v = torch.ones(3, dtype=torch.float64)
        >>> for got, right in zip(torch.autograd.grad(x, problem.theta, v), problem.dense_gradient(v)):
        ...     assert torch.allclose(got, right, rtol=1e-7)
    """

    mu: float | None = None
    beta: float | None = None
    rho: float | None = None
    saddle: torch.Tensor | None = None

    @property
    def objective(self) -> Callable[..., torch.Tensor]:
        """``objective(x, *theta) -> 0-d tensor``."""
        return self.function

    def stationarity(self, x: torch.Tensor, *theta: torch.Tensor) -> torch.Tensor:
        """The gradient of the objective in x, [n]; with a graph."""
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(self.function(x, *theta), x, create_graph=True)[0]


@dataclass(frozen=True, eq=False, repr=False)
class RootProblem(_Problem):
    """A residual ``residual(x, *theta) -> [n]`` with its exact zero; all else is as in :class:`ArgminProblem`.

    The Jacobian is not symmetric where n > 1.
    """

    @property
    def residual(self) -> Callable[..., torch.Tensor]:
        """``residual(x, *theta) -> [n]``."""
        return self.function

    def stationarity(self, x: torch.Tensor, *theta: torch.Tensor) -> torch.Tensor:
        """The residual itself."""
        return self.function(x, *theta)


def dense_solve(matrix: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """``torch.linalg.solve``, with its type."""
    answer: torch.Tensor = torch.linalg.solve(matrix, rhs)
    return answer


def quadratic_problem(
    n: int, *, log10_cond: float = 0, log10_scale: float = 0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> ArgminProblem:
    """``1/2 x'Ax - b'x`` with theta = (A, b) and the solution ``x = S^-1 b``, S = (A + A')/2.

    A is :func:`spd_matrix` of these arguments, so ``log10_scale`` scales the objective and leaves x; b = A z with a
    random normal z. The gradient in A is the symmetric matrix ``-(u x' + x u')/2`` with u = S^-1 v; mu and beta are the
    ends of the spectrum, rho is 0.

    Example:
        >>> import implicitlayer as il
        >>> problem = il.testing.quadratic_problem(4, log10_cond=2)
        >>> problem.mu, problem.beta, problem.rho
        (0.01, 1.0, 0.0)
        >>> problem
        quadratic_problem(4, log10_cond=2, log10_scale=0, seed=0, dtype=torch.float64)
    """
    matrix = arrays.spd_matrix(n, log10_cond=log10_cond, log10_scale=log10_scale, seed=seed, dtype=dtype)
    b = matrix.double() @ arrays.normal_tensor((n,), seed=seed + 7)

    def objective(x: torch.Tensor, matrix: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 0.5 * x @ (matrix @ x) - b @ x

    def solution(matrix: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        matrix, b = matrix.detach().double(), b.detach().double()
        unit = matrix.abs().max()  # no overflow inside the factorisation
        return dense_solve((matrix + matrix.T) / 2 / unit, b / unit)

    scale, cond = arrays.ten_to(log10_scale), arrays.ten_to(log10_cond)
    theta, recipe = _leaves(matrix, b.to(dtype)), _recipe("quadratic", n, log10_cond, log10_scale, seed, dtype)
    constants = (scale / cond if n > 1 else scale, scale, 0.0)
    return ArgminProblem(objective, torch.zeros(n, dtype=dtype), theta, solution, recipe, *constants)


def smooth_convex_problem(
    n: int, *, log10_cond: float = 0, log10_scale: float = 0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> ArgminProblem:
    """``scale (sum_i softplus(w_i'x + o_i) + 1/2 e^s |x|^2)`` with theta = (W [m, n], o [m], s), m = n + 2.

    Strongly convex, with derivatives of every order and no symmetry: a regularised logistic regression with valid
    bounds mu, beta and rho. Its solution is found by dense Newton steps, to rounding.

    Args:
        n, seed, dtype: as in :func:`spd_matrix`.
        log10_cond: the ratio beta / mu is ``2 * 10^log10_cond``.
        log10_scale: logarithm of the factor in front; it is no theta, so the gradients do not depend on it.
    """
    # With p = sigmoid(Wx + o) the Hessian is H = scale (W' diag(p (1 - p)) W + e^s I). From 0 < p (1 - p) <= 1/4,
    #     mu = scale e^s,    beta = scale (e^s + ||W||^2 / 4),
    # and |d/dt p (1 - p)| <= 1 / (6 sqrt 3) =: c (its maximum, where p = 1/2 +- 1/sqrt 12) gives
    #     ||H(x) - H(y)|| <= scale ||W||^2 c max_i |w_i'(x - y)| <= scale c ||W||^2 max_i |w_i| |x - y|.
    # e^s = 10^-cond / 2 and ||W||^2 / 4 = 1 - e^s make beta = scale.
    arrays.check_matrix(n, log10_cond, log10_scale, seed, dtype)
    strength = 0.5 * arrays.ten_to(-log10_cond)
    weight = arrays.normal_tensor((n + 2, n), seed=seed)
    weight = weight * (2 * math.sqrt(1 - strength) / float(torch.linalg.matrix_norm(weight, 2)))
    offset, scale = arrays.normal_tensor((n + 2,), seed=seed + 1), arrays.ten_to(log10_scale)

    def objective(
        x: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor, log_strength: torch.Tensor
    ) -> torch.Tensor:
        fit = torch.nn.functional.softplus(weight @ x + offset).sum()
        return scale * (fit + 0.5 * log_strength.exp() * (x * x).sum())

    def solution(weight: torch.Tensor, offset: torch.Tensor, log_strength: torch.Tensor) -> torch.Tensor:
        weight, offset, log_strength = (t.detach().double() for t in (weight, offset, log_strength))
        return _logistic_minimiser(weight, offset, log_strength.exp())

    theta = _leaves(weight.to(dtype), offset.to(dtype), torch.tensor(math.log(strength), dtype=dtype))
    e_s = float(theta[2].detach().double().exp())
    size = float(torch.linalg.matrix_norm(theta[0].detach().double(), 2)) ** 2
    longest = float(theta[0].detach().double().norm(dim=1).max())
    constants = (scale * e_s, scale * (e_s + size / 4), scale * size * longest / (6 * math.sqrt(3)))
    recipe = _recipe("smooth_convex", n, log10_cond, log10_scale, seed, dtype)
    return ArgminProblem(objective, torch.zeros(n, dtype=dtype), theta, solution, recipe, *constants)


def nonconvex_problem(
    n: int, *, log10_cond: float = 0, log10_scale: float = 0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> ArgminProblem:
    """``scale (1/4 sum_i e^{d_i} ((Mx)_i^2 - 1)^2 - t'x)`` with theta = (M [n, n], d [n], t [n]).

    In y = Mx these are n double wells, tilted: 3^n stationary points, 2^n of them minima. ``init`` lies in the basin
    of one of them, and ``solution`` is that nondegenerate minimum; ``saddle`` differs from it in the first well only,
    where it sits on the barrier (for n = 1 it is a maximum). mu, beta and rho do not exist globally: None.

    Args:
        n, log10_scale, seed, dtype: as in :func:`smooth_convex_problem`.
        log10_cond: logarithm of the ratio of the deepest to the shallowest well; close to that of the condition.
    """
    # The gradient M'(e^d (y^2 - 1) y) - t vanishes where e^{d_i} (y_i^3 - y_i) = q_i with q = M^-T t: one cubic per
    # well. The tilt below has |q_i| e^{-d_i} <= 0.2 < 2 / (3 sqrt 3) = 0.385, so that all three roots are real and
    # simple: near -1, 0 and 1, with |3 y^2 - 1| >= 0.86.
    arrays.check_matrix(n, log10_cond, log10_scale, seed, dtype)
    scale = arrays.ten_to(log10_scale)
    depth = arrays.spd_matrix(n, log10_cond=log10_cond, seed=seed)
    depth = torch.linalg.eigvalsh(depth) if n > 1 else torch.ones(1, dtype=torch.float64)
    basis = arrays.orthogonal(n, seed + 1)
    tilt = basis.T @ (depth * 0.2 * torch.tanh(arrays.normal_tensor((n,), seed=seed + 2)))
    sides = torch.where(arrays.normal_tensor((n,), seed=seed + 3) < 0, -1.0, 1.0).double()

    def objective(x: torch.Tensor, basis: torch.Tensor, log_depth: torch.Tensor, tilt: torch.Tensor) -> torch.Tensor:
        wells = log_depth.exp() * ((basis @ x) ** 2 - 1) ** 2
        return scale * (0.25 * wells.sum() - tilt @ x)

    def stationary_point(start: torch.Tensor, *theta: torch.Tensor) -> torch.Tensor:
        basis, log_depth, tilt = (t.detach().double() for t in theta)
        q = dense_solve(basis.T, tilt) / log_depth.exp()
        y = start
        for _ in range(60):  # Newton on the cubic, quadratic from a start this close
            y = y - (y**3 - y - q) / (3 * y**2 - 1)
        return dense_solve(basis, y)

    theta = _leaves(basis.to(dtype), depth.log().to(dtype), tilt.to(dtype))
    barrier = sides.clone()
    barrier[0] = 0
    recipe, init = _recipe("nonconvex", n, log10_cond, log10_scale, seed, dtype), (basis.T @ (0.9 * sides)).to(dtype)
    saddle, solution = stationary_point(barrier, *theta).to(dtype), partial(stationary_point, sides)
    return ArgminProblem(objective, init, theta, solution, recipe, saddle=saddle)


def root_problem(
    n: int, *, log10_cond: float = 0, log10_scale: float = 0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> RootProblem:
    """``scale (A x + e^s tanh(x) - b)`` with theta = (A [n, n], b [n], s) and a non-symmetric A.

    e^s is half the smallest singular value of A, so that the zero is unique and the Jacobian
    ``A + e^s diag(1 - tanh(x)^2)`` has no singular value below that half. The solution is found by a contraction and
    Newton steps, to rounding.

    Args:
        n, log10_cond, seed, dtype: as in :func:`general_matrix`, which makes A.
        log10_scale: as in :func:`smooth_convex_problem`.
    """
    scale = arrays.ten_to(log10_scale)
    arrays.check_matrix(n, log10_cond, log10_scale, seed, dtype)
    matrix = arrays.general_matrix(n, log10_cond=log10_cond, seed=seed)
    strength = 0.5 * (arrays.ten_to(-log10_cond) if n > 1 else 1.0)
    z = arrays.normal_tensor((n,), seed=seed + 7)
    b = matrix @ z + strength * z.tanh()

    def residual(x: torch.Tensor, matrix: torch.Tensor, b: torch.Tensor, log_strength: torch.Tensor) -> torch.Tensor:
        return scale * (matrix @ x + log_strength.exp() * x.tanh() - b)

    def solution(matrix: torch.Tensor, b: torch.Tensor, log_strength: torch.Tensor) -> torch.Tensor:
        matrix, b, log_strength = (t.detach().double() for t in (matrix, b, log_strength))
        strength = log_strength.exp()
        x = dense_solve(matrix, b)
        for _ in range(60):  # x <- A^-1 (b - e^s tanh x) contracts by e^s ||A^-1|| = 1/2
            x = dense_solve(matrix, b - strength * x.tanh())
        for _ in range(3):
            jacobian = matrix + torch.diag(strength * (1 - x.tanh() ** 2))
            x = x - dense_solve(jacobian, matrix @ x + strength * x.tanh() - b)
        return x

    theta = _leaves(matrix.to(dtype), b.to(dtype), torch.tensor(math.log(strength), dtype=dtype))
    recipe = _recipe("root", n, log10_cond, log10_scale, seed, dtype)
    return RootProblem(residual, torch.zeros(n, dtype=dtype), theta, solution, recipe)


def _logistic_minimiser(weight: torch.Tensor, offset: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Damped dense Newton on sum softplus(Wx + o) + strength/2 |x|^2, gradient and Hessian written out."""

    def value(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(weight @ x + offset).sum() + 0.5 * strength * (x @ x)

    x = weight.new_zeros(weight.shape[1])
    identity = torch.eye(len(x), dtype=x.dtype)
    for _ in range(60):
        p = torch.sigmoid(weight @ x + offset)
        gradient = weight.T @ p + strength * x
        hessian = weight.T @ ((p * (1 - p))[:, None] * weight) + strength * identity
        step = dense_solve(hessian, gradient)
        length = 1.0
        while length > 1e-4 and value(x - length * step) > value(x) * (1 + 1e-14):
            length /= 2
        x = x - length * step
        if float(step.norm()) <= 1e-15 * (1 + float(x.norm())):
            break
    return x


def _leaves(*tensors: torch.Tensor) -> Theta:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def _recipe(name: str, n: int, log10_cond: float, log10_scale: float, seed: int, dtype: torch.dtype) -> str:
    return f"{name}_problem({n}, log10_cond={log10_cond}, log10_scale={log10_scale}, seed={seed}, dtype={dtype})"
