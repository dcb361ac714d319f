"""The flat linear operator that linear solvers work on, their base class, and preconditioners made of products."""

# Shapes: lanes: leading batch dimensions of independent systems; n: unknowns of one system, counted in elements.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.base._tree import flatten, name_lanes, ravel, unflatten, unravel
from implicitlayer.base._types import Extension

# A preconditioner is any callable v -> M^-1 v on flat vectors [*lanes, n]; the classes here build one from an operator.
# n: unknowns, l: rank of the sketch. Products are made in the operator's dtype, small factorisations in float64.

Precondition = Callable[[torch.Tensor], torch.Tensor]


class Preconditioner:
    """Base class of preconditioners that are built from the operator, once per solve."""

    def build(self, operator: FlatOperator, like: torch.Tensor) -> Precondition:
        """``v -> M^-1 v`` for this operator; ``like`` [*lanes, n] gives shape, dtype and device."""
        raise NotImplementedError


@dataclass(frozen=True)
class Jacobi(Preconditioner):
    """Divide by the absolute value of the operator's diagonal, found by products.

    With ``num_probes >= n`` the diagonal is exact: n products with the unit vectors. Otherwise it is the mean of
    ``v * (A v)`` over random sign vectors v (``E[v_i v_j] = 0`` leaves the diagonal), and no entry is believed below
    its own standard error, so that noise cannot make a huge step. Entries that are zero or not finite count as 1 on
    the scale of the largest. Worth its products where the diagonal of A varies over orders of magnitude.

    Args:
        num_probes: products to spend, at least 1.
        seed: of the random signs, the same in every lane.

    Source: C. Bekas, E. Kokiopoulou and Y. Saad, An estimator for the diagonal of a matrix, Appl. Numer. Math. 57
    (2007), with sign vectors; the standard error as a floor is ours.
    """

    num_probes: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise ValueError(f"num_probes={self.num_probes} must be at least 1: each is one product with the operator.")

    def build(self, operator: FlatOperator, like: torch.Tensor) -> Precondition:
        """The diagonal and its division."""
        diagonal = operator_diagonal(operator, like, self.num_probes, self.seed)
        largest = diagonal.amax(-1, keepdim=True) if like.shape[-1] else diagonal
        usable = diagonal.isfinite() & (diagonal > torch.finfo(like.dtype).eps * largest)
        inverse = torch.where(usable, 1 / diagonal, torch.where(largest > 0, 1 / largest, 1.0))
        inverse = torch.where(inverse.isfinite(), inverse, 1.0).to(like.dtype)
        return lambda vector: vector * inverse


def operator_diagonal(operator: FlatOperator, like: torch.Tensor, num_probes: int, seed: int) -> torch.Tensor:
    """|diag A| [*lanes, n] in float64: exact if n <= num_probes, else estimated from below by its standard error."""
    n = like.shape[-1]
    if n <= num_probes:
        diagonal = torch.zeros_like(like, dtype=torch.float64)
        for i in range(n):
            unit = torch.zeros_like(like)
            unit[..., i] = 1
            diagonal[..., i] = operator(unit)[..., i]
        return diagonal.abs()
    # NOTE [safe squares]: sums of squares of samples are kept relative to the first sample's largest entry
    signs = _random(n, num_probes, seed).sign().to(like)
    total = square = torch.zeros_like(like, dtype=torch.float64)
    unit = torch.zeros_like(total[..., :1])
    for k in range(num_probes):
        probe = signs[:, k].expand(like.shape).contiguous()
        sample = (probe * operator(probe)).double()
        if k == 0:
            unit = lane_scale(sample)
        total, square = total + sample / unit, square + (sample / unit) ** 2
    mean = total / num_probes
    error = ((square / num_probes - mean**2).clamp(min=0) / max(num_probes - 1, 1)).sqrt()
    return torch.maximum(mean.abs(), error) * unit


@dataclass(frozen=True)
class Nystrom(Preconditioner):
    """Undo the ``rank`` largest eigenvalues of a positive semidefinite operator, estimated from a random sketch.

    For an operator ``A + damping I``: with the randomised approximation ``A ~ U diag(lambda) U'``,
    ``M^-1 v = (lambda_rank + damping) U (U'v / (lambda + damping)) + (v - U U'v)``. Conjugate gradients on the
    preconditioned system then see a condition number of a few units once ``rank`` is about twice the number of
    eigenvalues above ``damping`` (Frangella, Tropp & Udell, theorem 5.1). A lane whose sketch is not positive
    semidefinite (an indefinite or NaN matrix, a damping too large) is left without a preconditioner.

    Args:
        rank: size of the sketch, at least 1; that many products are spent per solve (n at most).
        damping: the multiple of the identity that the operator contains, if it is known; non-negative.
        seed: of the sketch, the same in every lane.

    Source: Z. Frangella, J. A. Tropp and M. Udell, Randomized Nystrom preconditioning, SIAM J. Matrix Anal. Appl. 44
    (2023), arXiv:2110.02820, algorithm 2.1 and equation (1.3).
    """

    rank: int
    damping: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1: it is the number of products that are spent.")
        if not self.damping >= 0:
            raise ValueError(f"damping={self.damping} must be non-negative: the operator is A + damping I, A >= 0.")

    def build(self, operator: FlatOperator, like: torch.Tensor) -> Precondition:
        """The sketch, its eigenvalues, and the formula above."""
        n = like.shape[-1]
        if n == 0:
            return lambda vector: vector
        test = torch.linalg.qr(_random(n, min(self.rank, n), self.seed)).Q.to(like.device)  # [n, l]
        columns = [operator(column.to(like.dtype).expand(like.shape).contiguous()).double() for column in test.mT]
        sketch = torch.stack(columns, -1) - self.damping * test  # [*lanes, n, l]
        basis, eigenvalues, usable = _nystrom(sketch, test, torch.finfo(like.dtype).eps)
        weights = (eigenvalues[..., -1:] + self.damping) / (eigenvalues + self.damping)
        gain = torch.where(usable.unsqueeze(-1), weights - 1, 0.0).unsqueeze(-1)  # M^-1 = I + U (weights - 1) U'

        def precondition(vector: torch.Tensor) -> torch.Tensor:
            part = gain * (basis.mT @ vector.double().unsqueeze(-1))
            return vector + (basis @ part)[..., 0].to(vector.dtype)

        return precondition


def _nystrom(sketch: torch.Tensor, test: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orthonormal U [*lanes, n, l], eigenvalues [*lanes, l] falling, and whether the lane is usable [*lanes].

    With Y = A W for the test matrix W, A ~ Y (W'Y)^-1 Y' = B B' where B = Y C^-1 and C'C = W'Y (Cholesky); the singular
    values of B squared are the eigenvalues. A shift of A by nu, taken off again, keeps the Cholesky factor real.
    """
    finite = sketch.isfinite().flatten(-2).all(-1)
    size = torch.where(finite, sketch.abs().flatten(-2).amax(-1), 0.0)
    usable = finite & (size > 0)
    scaled = torch.where(usable[..., None, None], sketch / torch.where(usable, size, 1.0)[..., None, None], test)
    # the products carry an error of eps times their norm: the shift must be larger than it
    shift = math.sqrt(test.shape[0]) * eps * scaled.flatten(-2).norm(dim=-1)[..., None]
    shifted = scaled + shift.unsqueeze(-1) * test
    core = test.mT @ shifted
    factor, info = torch.linalg.cholesky_ex((core + core.mT) / 2, upper=True)
    usable = usable & (info == 0)
    identity = torch.eye(test.shape[1], dtype=test.dtype, device=test.device)
    factor = torch.where(usable[..., None, None], factor, identity)
    root = torch.linalg.solve_triangular(factor, shifted, upper=True, left=False)
    basis, values, _ = torch.linalg.svd(root, full_matrices=False)
    eigenvalues = (values**2 - shift).clamp(min=0)
    eigenvalues = torch.maximum(eigenvalues, shift)  # what lies below the shift is not known
    return basis, eigenvalues * size.unsqueeze(-1), usable


def _random(n: int, columns: int, seed: int) -> torch.Tensor:
    """[n, columns] normal float64 numbers, the same on every device."""
    return torch.randn(n, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Given:
    """The preconditioner of a solver: what it returns is checked, and looked at where the solve fails."""

    def __init__(self, solver: Any, operator: FlatOperator, rhs: torch.Tensor) -> None:
        self.solver, self.operator, self.rhs = solver, operator, rhs
        self.broken = self.negative = torch.zeros(rhs.shape[:-1], dtype=torch.bool, device=rhs.device)

    @cached_property
    def function(self) -> Precondition:
        """Made at its first use: a zero rhs makes no product."""
        given = self.solver.preconditioner
        made: Precondition = given.build(self.operator, self.rhs) if isinstance(given, Preconditioner) else given
        return made

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        answer = self.function(vector)
        form, wanted = ((getattr(t, "shape", type(t).__name__), getattr(t, "dtype", "")) for t in (answer, vector))
        if form != wanted:
            raise TypeError(
                f"the preconditioner of {type(self.solver).__name__} must return a tensor of the shape and dtype that "
                "it is given: expected {} {}, got {} {}.".format(*wanted, *form)
            )
        product = lane_dot(vector, answer)
        self.broken = self.broken | (vector.isfinite().all(-1) & ~answer.isfinite().all(-1))
        self.negative = self.negative | ((product <= 0) & vector.any(-1))
        return answer

    def judged(self, found: LinearSolution) -> LinearSolution:
        """The solution, which tells of NaN that came from here; what is not positive definite is refused."""
        failed, nonfinite = found.codes > int(Status.STAGNATED), found.codes == int(Status.NONFINITE)
        bad = failed & self.negative & ~self.broken
        if is_for_symmetric(self.solver) and bool(bad.any()):
            raise ValueError(
                f"the preconditioner of {type(self.solver).__name__} must be symmetric positive definite: it gave "
                f"<r, M^-1 r> <= 0{name_lanes(bad)} (a negative direction, or a singular one). Use the absolute value "
                "of what it approximates."
            )
        broken = bool(nonfinite.any()) and not bool((nonfinite & ~self.broken).any())
        return replace(found, preconditioned=True, broken_preconditioner=broken)


Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class FlatOperator:
    """A square matrix A, known by its products; independent systems ("lanes") lie side by side.

    Attributes:
        matvec: ``v -> A v``, both [*lanes, n].
        transpose_matvec: ``v -> A' v``; None where the transpose is not known.
        symmetric: whether A = A' is known.
        inverse_metric: [*lanes, n] or [*lanes, 1], the inverse of a diagonal positive D that is close to A; used as a
            preconditioner and as the answer of zero steps. None is the identity.
        metric_factor: [*lanes, n, n] or [n, n], the Cholesky factor of a full matrix D in its place.
        prepare: makes what the first ``matvec`` would make and keep, outside of any transform; None where nothing is,
            or nobody knows.
    """

    matvec: Product
    transpose_matvec: Product | None = None
    symmetric: bool = True
    inverse_metric: torch.Tensor | None = None
    metric_factor: torch.Tensor | None = None
    prepare: Callable[[], None] | None = None

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        return self.matvec(vector)

    def precondition(self, vector: torch.Tensor) -> torch.Tensor:
        """The inverse metric times a vector [*lanes, n]; the vector itself without one."""
        if self.metric_factor is not None:
            return torch.cholesky_solve(vector.unsqueeze(-1), self.metric_factor)[..., 0]
        return vector if self.inverse_metric is None else vector * self.inverse_metric

    def metric(self, vector: torch.Tensor) -> torch.Tensor:
        """The metric times a vector [*lanes, n]; the vector itself without one."""
        if self.metric_factor is not None:
            return (self.metric_factor @ (self.metric_factor.mT @ vector.unsqueeze(-1)))[..., 0]
        return vector if self.inverse_metric is None else vector / self.inverse_metric

    def inverse_metric_norm(self) -> float | torch.Tensor:
        """The norm of the inverse metric, per lane (of a full matrix, by the pivots of its factor)."""
        if self.metric_factor is not None:
            return self.metric_factor.diagonal(dim1=-2, dim2=-1).double().amin(-1) ** -2
        return 1.0 if self.inverse_metric is None else self.inverse_metric.double().amax(-1)


class LinearSolver(Extension):
    """Base class of linear solvers: ``solver(operator, rhs) -> LinearSolution``.

    ``operator`` is a function ``v -> A v``, a tensor [*lanes, n, n], or a :class:`FlatOperator`; ``rhs`` is a tensor
    or a pytree of tensors. Only a matrix [*lanes, n, n] or a FlatOperator with a right-hand side [*lanes, n] has
    lanes; for a plain function all entries of ``rhs``, whatever its shape, are the unknowns of one system.

    A subclass defines ``solve``. ``il.testing.extension_checks(il.LinearSolver)`` finds it, and tests what it says of
    itself.

    Attributes:
        systems: which matrices it is for: ``"general"``, ``"symmetric"``, ``"positive definite"``, or
            ``"contraction"`` (I - J with ``||J|| < 1``). One for symmetric matrices is refused where a system
            cannot be symmetric, and asked for a transposed solve by :func:`linear_solve` of a matrix only.
        in_parts: whether it may be given vectors of which every process holds a part only, where unknowns are DTensors:
            it uses them entry by entry and in sums over all entries (products, norms, ``amax``), and in no other way.
    """

    systems: ClassVar[Literal["positive definite", "symmetric", "general", "contraction"]] = "general"
    in_parts: ClassVar[bool] = False

    def solve(self, operator: FlatOperator, rhs: torch.Tensor) -> LinearSolution | torch.Tensor:
        """Solve for a flat right-hand side [*lanes, n].

        Where it returns a bare tensor, its residual and status are computed by one product more.
        """
        raise NotImplementedError

    def __call__(self, operator: Any, rhs: Any) -> LinearSolution:
        if isinstance(operator, torch.Tensor):
            operator = _matrix_operator(operator, rhs)
        if isinstance(operator, FlatOperator):
            return wrap_value(operator, rhs, self.solve(operator, rhs), type(self).__name__)
        leaves, spec = flatten(rhs)
        if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise TypeError(f"rhs must be a tensor or a pytree of tensors, got {type(rhs).__name__}.")

        def matvec(vector: torch.Tensor) -> torch.Tensor:
            u = unravel(vector, leaves, 0)
            with tell_unknowns(u):
                product, _ = flatten(operator(unflatten(u, spec)))
            return ravel(product, 0).to(vector.dtype)

        solution = self(FlatOperator(matvec), ravel(leaves, 0))
        return replace(solution, value=unflatten(unravel(solution.value, leaves, 0), spec))


@contextmanager
def tell_unknowns(leaves: Sequence[torch.Tensor]) -> Iterator[None]:
    """Add a note to an error of torch's in a function of the user's that makes products: what it was called with.

    Python 3.10 has no notes; there the error stays as it is.
    """
    try:
        yield
    except RuntimeError as error:
        if hasattr(error, "add_note"):
            error.add_note(
                "The function that makes products A u was called with u like the right-hand side: "
                f"{', '.join([f'{tuple(leaf.shape)} {leaf.dtype}' for leaf in leaves])}. What it multiplies u with "
                "must fit, in shape and dtype: convert one of them, A.to(rhs.dtype) or rhs.to(A.dtype)."
            )
        raise


def is_for_symmetric(solver: Any) -> bool:
    """Whether a linear solver says that it is for symmetric systems only; a plain function says nothing."""
    return getattr(solver, "systems", "general") in ("symmetric", "positive definite")


def _matrix_operator(matrix: torch.Tensor, rhs: torch.Tensor) -> FlatOperator:
    square = matrix.ndim > 1 and matrix.shape[-1] == matrix.shape[-2] and matrix.dtype == rhs.dtype
    if not square or matrix.shape[:-1] != rhs.shape:
        raise ValueError(
            f"a matrix [*lanes, n, n] needs a right-hand side [*lanes, n] of its dtype: got {tuple(matrix.shape)} "
            f"{matrix.dtype} and {tuple(rhs.shape)} {rhs.dtype}."
        )
    return FlatOperator(
        lambda v: torch.linalg.vecdot(matrix.conj(), v.unsqueeze(-2)),
        lambda v: torch.linalg.vecdot(matrix.mT.conj(), v.unsqueeze(-2)),
        # a broken lane decides nothing
        symmetric=bool(((matrix == matrix.mT) | ~(matrix + matrix.mT).isfinite()).all()),
    )


def default_rtol(dtype: torch.dtype) -> float:
    """1e-10 for float64, 1e-5 for float32, eps for shorter floats."""
    return {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)


def lane_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product per lane, as float64.

    torch sums by cascades, whose rounding error grows like log n: no worse than that of the products. A float64
    accumulation of float32 products was 4 times as slow and no more accurate here.
    """
    return (a * b).sum(-1).double()


def lane_scale(vector: torch.Tensor) -> torch.Tensor:
    """Largest magnitude per lane, [*lanes, 1]; 1 for a zero, empty or non-finite lane.

    Squares of entries near 1e-25 vanish in float32 and those near 1e200 overflow in float64, so every solve is made
    on a right-hand side divided by this number.
    """
    if vector.shape[-1] == 0:
        return vector.new_ones(*vector.shape[:-1], 1)
    scale = vector.abs().amax(-1, keepdim=True)
    return torch.where((scale > 0) & (scale < math.inf), scale, torch.ones_like(scale))


def wrap_value(operator: FlatOperator, rhs: torch.Tensor, value: Any, method: str) -> LinearSolution:
    """The solution record of a linear solver that returned a bare tensor: its residual is computed here."""
    if isinstance(value, LinearSolution):
        return value
    if not isinstance(value, torch.Tensor) or value.shape != rhs.shape:
        raise TypeError(
            f"linear solver {method} must return il.LinearSolution or a tensor of the shape of rhs "
            f"{tuple(rhs.shape)}, got {getattr(value, 'shape', type(value).__name__)}."
        )
    scale = lane_scale(rhs)
    residual = lane_dot(*[(rhs - operator(value)) / scale] * 2).sqrt()
    norm = lane_dot(*[rhs / scale] * 2).sqrt()
    relative = torch.where(norm > 0, residual / norm, residual)
    rtol = 10 * default_rtol(rhs.dtype)
    codes = torch.where(relative <= rtol, int(Status.CONVERGED), int(Status.STAGNATED))
    codes = torch.where(relative < 1, codes, int(Status.DIVERGED))
    codes = torch.where(relative.isfinite(), codes, int(Status.NONFINITE))
    numbers = (torch.zeros_like(codes), residual * scale[..., 0], relative, torch.full_like(relative, math.inf))
    return LinearSolution(value, codes, *numbers, residual_is_true=True, method=method, rtol=rtol)
