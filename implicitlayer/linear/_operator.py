"""The flat linear operator that every linear solver works on, and the base class of linear solvers."""

# Shapes: lanes: leading batch dimensions of independent systems; n: unknowns of one system, counted in elements.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.base._tree import flatten, ravel, unflatten, unravel
from implicitlayer.base._types import Extension

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
