"""Any ``torch.optim`` optimizer as an inner solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from implicitlayer._solution import RecordingSolver, SolverResult
from implicitlayer._status import Status
from implicitlayer._tree import flatten, leaves_norm, unflatten
from implicitlayer.solvers._inputs import check_attached, check_num_steps, check_unknowns

__all__ = ["TorchOptimizer"]

# Their update of an entry reads the history of that entry alone, so lanes stay independent.
_ENTRYWISE = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop")


class TorchOptimizer(RecordingSolver):
    """Minimise with a ``torch.optim`` optimizer, made anew for every solve.

    Stops when the norm of the gradient over all unknowns is at most ``max(atol, rtol * norm at init)``, else after
    ``max_steps`` calls of ``step``; with NaN or Inf in x at the end the status is ``NONFINITE``. Optimizers that need a
    closure (LBFGS) get one.

    Args:
        optimizer: the class, such as ``torch.optim.Adam``, or a function of the parameter list.
        max_steps: limit of steps; without a tolerance, their number.
        rtol, atol: tolerances on the norm of the gradient; both 0 means none.
        settings: keyword arguments of the optimizer, such as ``lr``.

    Batched for the optimizers of torch that work entry by entry (SGD, Adam, ...) when no tolerance is given; LBFGS
    and unknown ones are called lane by lane.

    Example:
        >>> import torch, implicitlayer as il
        >>> solver = il.solvers.TorchOptimizer(torch.optim.LBFGS, max_steps=5, line_search_fn="strong_wolfe")
        >>> x = solver(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2, dtype=torch.float64))
        >>> [round(v, 6) for v in x.tolist()]
        [3.0, 3.0]
    """

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer],
        *,
        max_steps: int,
        rtol: float = 0.0,
        atol: float = 0.0,
        **settings: Any,
    ) -> None:
        if not callable(optimizer):
            raise TypeError(f"optimizer must be a class or function, got {type(optimizer).__name__}. Pass it uncalled.")
        for name, value in (("max_steps", max_steps), ("rtol", rtol), ("atol", atol)):
            if not value >= 0:
                raise ValueError(f"{name}={value} must be non-negative.")
        check_num_steps(max_steps)
        self.optimizer, self.settings = optimizer, settings
        self.max_steps, self.rtol, self.atol = max_steps, rtol, atol

    @property
    def batched(self) -> bool:
        known = getattr(torch.optim, getattr(self.optimizer, "__name__", ""), None) is self.optimizer
        return known and self.optimizer.__name__ in _ENTRYWISE and self.rtol == 0 and self.atol == 0

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        leaves, spec = flatten(init)
        check_unknowns(leaves)
        x = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        optimizer = self.optimizer(x, **self.settings)

        def closure() -> torch.Tensor:
            value = objective(unflatten(x, spec), *theta)
            check_attached(value)
            value = value.sum()
            # never .backward(): it would also fill .grad of module weights that the objective closes over
            for leaf, gradient in zip(x, torch.autograd.grad(value, x, materialize_grads=True), strict=True):
                leaf.grad = gradient
            return value.detach()

        status, step = Status.STEP_LIMIT, 0
        tolerance: float | None = None
        with torch.enable_grad():
            while True:
                if self.rtol > 0 or self.atol > 0:
                    closure()
                    norm = float(leaves_norm([leaf.grad for leaf in x if leaf.grad is not None], 0))
                    tolerance = max(self.atol, self.rtol * norm) if tolerance is None else tolerance
                    status = Status.CONVERGED if norm <= tolerance else Status.MAX_STEPS_REACHED
                if status is Status.CONVERGED or step == self.max_steps:
                    break
                optimizer.step(closure)  # type: ignore[arg-type]  # torch itself documents closures returning tensors
                step += 1
        if not all(bool(leaf.isfinite().all()) for leaf in x):
            status = Status.NONFINITE
        return SolverResult(unflatten([leaf.detach() for leaf in x], spec), status, step)
