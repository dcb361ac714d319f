"""Strengths of the proximal term beyond numbers: a matrix, a factor of one, an operator; and learned positive ones."""

# Legend: n: entries of phi of one task, in the order of its leaves; d = phi - theta; the term is 1/2 d' Lambda d.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from implicitlayer import _torch
from implicitlayer.base._sharding import is_sharded
from implicitlayer.base._tree import flatten, ravel, unflatten


@dataclass(frozen=True, eq=False)
class MatrixStrength:
    """A full positive semidefinite matrix as the strength of :func:`proximal`.

    The meta-gradient is ``(Lambda + H)^-1 Lambda v``. Conjugate gradients are preconditioned by Lambda where it is
    positive definite, which is conjugate gradients on ``I + Lambda^-1/2 H Lambda^-1/2``: zero steps give v itself.

    Args:
        matrix: Lambda, [n, n], symmetric.
        factor: L, [n, k] of any k, in place of the matrix: Lambda = L L', positive semidefinite whatever L is, so it
            can be learned freely.

    Raises:
        ValueError: both or none given; a matrix that is not square, symmetric and positive semidefinite.

    Source: Rajeswaran et al. 2019 (arXiv:1909.04630), section 6 (more flexible regularisers) and Lemma 1.

    Example:
        >>> import torch, implicitlayer as il
        >>> strength = il.MatrixStrength(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
        >>> objective = il.proximal(lambda phi: 0.5 * (phi**2).sum(), strength)  # phi = (Lambda + I)^-1 Lambda theta
        >>> layer = il.argmin(objective, il.solvers.GradientDescent(0.3, max_steps=200))
        >>> theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> [round(v, 9) for v in layer(theta, theta).tolist()]
        [0.75, 0.75]
    """

    matrix: torch.Tensor | None = None
    factor: torch.Tensor | None = None

    def __post_init__(self) -> None:
        given = [t for t in (self.matrix, self.factor) if t is not None]
        if len(given) != 1 or not isinstance(given[0], torch.Tensor) or given[0].ndim != 2:
            raise ValueError("give one tensor: a matrix [n, n], or factor= [n, k] for the matrix L L'.")
        _refuse_dtensors(given)
        if not given[0].is_floating_point():
            raise ValueError(f"a strength must be floating, got {given[0].dtype}. Use .double().")
        matrix = self.matrix
        if matrix is None or _torch.is_wrapped(matrix):
            return
        matrix = matrix.detach()
        if not bool(matrix.isfinite().all()):
            raise ValueError("matrix holds NaN or Inf; a strength is finite.")
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}; a strength is square, [n, n].")
        size = float(matrix.abs().max()) if matrix.numel() else 0.0
        rounding = 10 * torch.finfo(matrix.dtype).eps * max(len(matrix), 1) * size
        if not float((matrix - matrix.mT).abs().max() if size else 0.0) <= rounding:
            raise ValueError(
                "matrix is not symmetric: (phi - theta)' A (phi - theta) sees (A + A') / 2 only. Pass that. As a step "
                "size, which may be any matrix P, pass il.OperatorStrength(lambda g: P @ g)."
            )
        lowest = float(torch.linalg.eigvalsh(matrix.double())[0]) if size else 0.0
        if not lowest >= -rounding:
            raise ValueError(
                f"matrix has the eigenvalue {lowest:.3g}; a strength is positive semidefinite. To learn one, pass "
                "factor= and let the matrix be L L'."
            )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensor that it was made of."""
        return [t for t in (self.matrix, self.factor) if t is not None]

    def quadratic(self, difference: Any, lane_dims: int) -> torch.Tensor:
        """``d' Lambda d`` per lane, [*lanes]."""
        d = _entries(difference, lane_dims, len(self.tensors[0]))
        if self.factor is not None:
            part = d @ self.factor.to(d.dtype)
            return (part * part).sum(-1)
        return (d * (d @ self.dense().to(d.dtype))).sum(-1)

    def dense(self) -> torch.Tensor:
        """Lambda, [n, n]."""
        # a copy: only what enters an operation can be replaced where a layer feeds closed-over tensors back
        return self.factor @ self.factor.mT if self.factor is not None else self.tensors[0].clone()


@dataclass(frozen=True, eq=False)
class OperatorStrength:
    """A strength known by its products only: ``product(d) -> Lambda d``, in the structure of phi.

    Args:
        product: linear, symmetric and positive semidefinite, for one task, in plain torch code; tensors that it closes
            over and that need a gradient get one. Of an operator that is not symmetric the symmetric part acts.

    Example:
        >>> import torch, implicitlayer as il
        >>> def smooth(d):  # 1/2 sum of squared differences of neighbours
        ...     return torch.nn.functional.pad(d.diff(), (1, 0)) - torch.nn.functional.pad(d.diff(), (0, 1))
        >>> objective = il.proximal(lambda phi: (phi**2).sum(), il.OperatorStrength(smooth))
        >>> objective(torch.tensor([0.0, 1.0]), torch.zeros(2)).item()  # 1 + 1/2
        1.5
    """

    product: Callable[[Any], Any]

    def quadratic(self, difference: Any, lane_dims: int) -> torch.Tensor:
        """``d' Lambda d`` per lane, [*lanes]."""
        leaves, spec = flatten(difference)

        def of_one(*d: torch.Tensor) -> torch.Tensor:
            moved, moved_spec = flatten(self.product(unflatten(d, spec)))
            shapes = [tuple(m.shape) for m in moved]
            expected = [tuple(leaf.shape) for leaf in d]
            if moved_spec != spec or shapes != expected:
                raise ValueError(
                    f"product must return the structure and shapes of phi - theta: expected {expected}, got {shapes}."
                )
            return torch.stack([(a * b).sum() for a, b in zip(d, moved, strict=True)]).sum()

        function: Callable[..., torch.Tensor] = of_one
        for _ in range(lane_dims):
            function = torch.vmap(function)
        return function(*leaves)


class LearnedStrength(nn.Module):
    """A strength that is learned and stays positive: the softplus of its parameters, or L L' for a matrix.

    Args:
        initial: number, tensor or pytree of them, positive: the strength to start from; a :class:`MatrixStrength` gives
            a factor L to learn (one that was given, or the Cholesky factor of the matrix).

    Raises:
        ValueError: an initial value that is not positive; a matrix that is not positive definite.

    Example:
        >>> import torch, implicitlayer as il
        >>> strength = il.LearnedStrength(2.0)
        >>> method = il.meta.iMAML(lambda params, batch: batch, il.solvers.GradientDescent(0.1), strength=strength)
        >>> round(strength().item(), 6), len(method.parameters())
        (2.0, 1)
    """

    def __init__(self, initial: Any) -> None:
        super().__init__()
        self._matrix = isinstance(initial, MatrixStrength)
        if isinstance(initial, MatrixStrength):
            factor = initial.factor
            if factor is None:
                factor, info = torch.linalg.cholesky_ex(initial.dense().detach())
                if int(info) != 0:
                    raise ValueError(
                        "the matrix is not positive definite: pass MatrixStrength(factor=...) to learn it."
                    )
            self.raw = nn.ParameterList([nn.Parameter(factor.detach().clone())])
            return
        leaves, self._spec = flatten(initial)
        tensors = [torch.as_tensor(leaf).detach() for leaf in leaves]
        tensors = [t if t.is_floating_point() else t.to(torch.get_default_dtype()) for t in tensors]
        if not tensors or not all(bool(((t > 0) & t.isfinite()).all()) for t in tensors):
            raise ValueError(
                f"initial={initial} must be positive and finite: a learned strength starts above zero and stays so."
            )
        # softplus(r) = t  <=>  r = log(e^t - 1) = t + log(1 - e^-t)
        self.raw = nn.ParameterList([nn.Parameter(t + torch.log(-torch.expm1(-t))) for t in tensors])

    def forward(self) -> Any:
        """The strength now, differentiable in the parameters."""
        if self._matrix:
            return MatrixStrength(factor=self.raw[0])
        return unflatten([nn.functional.softplus(raw) for raw in self.raw], self._spec)


def _refuse_dtensors(tensors: list[torch.Tensor]) -> None:
    if any(map(is_sharded, tensors)):
        raise ValueError(
            "il.MatrixStrength weighs all entries of phi together, which is not possible where they or the matrix are "
            "DTensors, on several processes. Give a number, a strength for each tensor or one for each entry of phi."
        )


def _entries(difference: Any, lane_dims: int, n: int) -> torch.Tensor:
    leaves = flatten(difference)[0]
    _refuse_dtensors(leaves)
    d = ravel(leaves, lane_dims)
    if d.shape[-1] != n:
        raise ValueError(f"the strength is a matrix for {n} entries, but phi has {d.shape[-1]} (per task).")
    return d
