"""Any ``torch.optim`` optimizer as an inner solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch

from implicitlayer.base._solution import RecordingSolver, SolverResult
from implicitlayer.base._tree import flatten, leaves_norm, unflatten
from implicitlayer.solvers._leaves import check_attached, check_limits, check_num_steps, check_unknowns
from implicitlayer.solvers._outcome import codes_of, finite_leaves, outcome
from implicitlayer.solvers._progress import Iteration, reporting

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
        callback: called with an :class:`Iteration` at the start and after every call of ``step``, from the evaluation
            that the next one begins with; without a tolerance this costs one more gradient, at the end.
        progress: show a bar (needs tqdm, extra ``implicitlayer[progress]``).
        settings: keyword arguments of the optimizer, such as ``lr``.

    Raises:
        TypeError: an optimizer that was already made.
        ValueError: a negative limit or tolerance.
        ImportError: ``progress=True`` without tqdm.

    Batched for the optimizers of torch that work entry by entry (SGD, Adam, ...) when no tolerance is given; LBFGS
    and unknown ones are called lane by lane.

    Example:
        >>> import torch, implicitlayer as il
        >>> solver = il.solvers.TorchOptimizer(torch.optim.LBFGS, max_steps=5, line_search_fn="strong_wolfe")
        >>> x = solver(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2, dtype=torch.float64))
        >>> [round(v, 6) for v in x.tolist()]
        [3.0, 3.0]
    """

    finds: ClassVar[Literal["minimum"]] = "minimum"

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer],
        *,
        max_steps: int,
        rtol: float = 0.0,
        atol: float = 0.0,
        callback: Callable[[Iteration], None] | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> None:
        if not callable(optimizer):
            raise TypeError(f"optimizer must be a class or function, got {type(optimizer).__name__}. Pass it uncalled.")
        self.optimizer, self.settings = optimizer, settings
        self.callback, self.progress = callback, progress
        self.max_steps, self.rtol, self.atol = max_steps, rtol, atol
        check_limits(self)
        check_num_steps(max_steps)

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
        step, told, lane_dims = 0, -1, 0

        def closure() -> torch.Tensor:
            nonlocal told, lane_dims
            value = objective(unflatten(x, spec), *theta)
            check_attached(value)
            lane_dims = value.ndim
            total = value.sum()
            # never .backward(): it would also fill .grad of module weights that the objective closes over
            gradients = torch.autograd.grad(total, x, materialize_grads=True)
            for leaf, gradient in zip(x, gradients, strict=True):
                leaf.grad = gradient
            if report is not None and told < step:  # the first evaluation since the last step is at the point reached
                told = step
                kept = unflatten([leaf.detach().clone() for leaf in x], spec)
                report(Iteration(step, value.detach(), leaves_norm(gradients, value.ndim), kept))
            return total.detach()

        has_tolerance = self.rtol > 0 or self.atol > 0
        reached, tolerance = False, 0.0
        with reporting(self.callback, self.progress, self.max_steps) as report, torch.enable_grad():
            while True:
                if has_tolerance:
                    closure()
                    norm = float(leaves_norm([leaf.grad for leaf in x if leaf.grad is not None], 0))
                    tolerance = tolerance if step else max(self.atol, self.rtol * norm)
                    reached = norm <= tolerance
                if reached or step == self.max_steps:
                    break
                optimizer.step(closure)  # type: ignore[arg-type]  # torch itself documents closures returning tensors
                step += 1
            if report is not None and told < step:
                closure()
        x = [leaf.detach() for leaf in x]
        if has_tolerance:
            lane_dims = 0  # one test for all of them
        finite = finite_leaves(x, lane_dims)
        arrived = torch.full_like(finite, reached)
        return outcome(unflatten(x, spec), step, codes_of(has_tolerance, arrived, finite))
