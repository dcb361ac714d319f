"""Normal equations: a symmetric positive-definite solver for general systems, at the price of the condition squared."""

# A u = b becomes A'A u = A'b. With B = A / sigma, sigma = ||A'r|| / ||r|| of about the size of A, the system solved is
#     B'B w = B'r,   u = w / sigma,
# which cannot overflow where A'A would.

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.linear._cg import ConjugateGradient
from implicitlayer.linear._common import CONTINUE, LIMIT, Correction, Limits, Round, lane_norm, refine, select
from implicitlayer.linear._operator import FlatOperator, LinearSolver, Product


@dataclass(frozen=True)
class NormalEquations(LinearSolver):
    """Solve ``A u = b`` for any square A by ``A'A u = A'b`` and a solver for positive-definite systems.

    Needs products with the transpose. Robust (A'A is positive semidefinite whatever A is, rotations included) but the
    condition number is squared: conjugate gradients take about as many steps as A has condition. The tolerances and the
    step limit are those of ``solver``; it applies them to ``A'(b - A u)``, and ``b - A u`` itself is computed
    afterwards: while it is above the tolerance, the solve is repeated for that residual as long as it halves. A
    right-hand side outside the range of A leaves a residual that A' does not see: status SINGULAR.

    Args:
        solver: solver of the positive-definite system. One step of it makes a product and a transposed product.

    Raises:
        ValueError: the operator is not symmetric and has no ``transpose_matvec``.

    Source: Hestenes & Stiefel 1952, section 10; Saad, Iterative Methods for Sparse Linear Systems, 2nd ed., chapter 8.
    Difference from ``scipy.sparse.linalg.lsqr``: any inner solver, lanes, and refinement in place of bidiagonalisation,
    so that a residual near eps needs a condition number below about ``eps^-1/2``.
    """

    solver: LinearSolver = field(default_factory=ConjugateGradient)

    in_parts: ClassVar[Any] = property(lambda self: self.solver.in_parts)

    def __post_init__(self) -> None:
        if not isinstance(self.solver, LinearSolver):
            raise TypeError(f"solver must be a linear solver such as il.ConjugateGradient(), got {self.solver!r}.")

    def solve(self, operator: FlatOperator, rhs: torch.Tensor) -> LinearSolution:
        """Solve for a flat right-hand side [*lanes, n]."""
        transpose = operator.transpose_matvec or (operator.matvec if operator.symmetric else None)
        if transpose is None:
            raise ValueError(
                "il.NormalEquations needs products with the transpose: pass a matrix or a FlatOperator with "
                "transpose_matvec, or use il.Gmres() or il.Bicgstab(), which need none."
            )
        transposed: Product = transpose
        inner: Any = self.solver
        limits = Limits(getattr(inner, "rtol", None), getattr(inner, "atol", 0.0), getattr(inner, "max_steps", None))
        if limits.atol > 0:  # in units of b, which the inner system does not have
            inner = replace(inner, rtol=limits.relative(rhs.dtype), atol=0.0)

        def correct(start: Round) -> Correction:
            r = start.residual
            gradient, size = transposed(r), lane_norm(r)
            slope = lane_norm(gradient)
            steep = start.running & (slope > 0) & slope.isfinite()
            sigma = torch.where(steep, slope / size, 1.0).to(r.dtype).unsqueeze(-1)
            normal = FlatOperator(
                lambda v: transposed(operator(v) / sigma) / sigma,
                symmetric=True,
                inverse_metric=None if operator.inverse_metric is None else (operator.inverse_metric * sigma) ** 2,
            )
            found = inner(normal, select(steep, gradient / sigma))
            value = found.value / sigma
            norm = lane_norm(r - operator(value))
            # found: A'(r - A d) is a small part of A'r. If r - A d is not a small part of r, A' does not see it.
            codes = torch.where(found.codes >= int(Status.STAGNATED), CONTINUE, found.codes)
            stopped = (found.codes == int(Status.STEP_LIMIT)) | (found.codes == int(Status.MAX_STEPS_REACHED))
            codes = torch.where(stopped, LIMIT, codes)
            ended = (codes == int(Status.CONVERGED)) | (found.codes == int(Status.SINGULAR))
            ended = ended | (found.codes == int(Status.INDEFINITE))  # A'A is not: rounding in a flat direction
            codes = torch.where(ended & (norm > 0.5 * size), int(Status.SINGULAR), codes)
            lost = ~slope.isfinite() | (found.codes == int(Status.NONFINITE))
            codes = torch.where(lost, int(Status.NONFINITE), codes)
            return Correction(value, codes, found.steps, norm, growth=torch.where(steep, slope / size, 0.0))

        return refine(operator, rhs, limits, correct, f"Normal equations by {type(self.solver).__name__}")
