"""What a bilevel optimisation leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from implicitlayer._errors import extra
from implicitlayer.base._status import Status


@dataclass(frozen=True, eq=False)
class BilevelResult:
    """The answer of :func:`bilevel`, and how sure it is.

    Attributes:
        theta: the outer parameters, detached, in the structure given.
        x: the solution of the layer there, detached.
        value: the outer loss at both.
        gradient_norm: Euclidean norm of the outer gradient in theta, as computed.
        gradient_error: estimate of the distance from that gradient to the exact one; a bound of the part that the inner
            and the linear solve have in it where the layer has ``assumptions``.
        tolerance: what ``gradient_norm + gradient_error`` had to reach.
        status: CONVERGED, MAX_STEPS_REACHED, or STAGNATED: the gradient cannot be had more accurately, or the optimizer
            no longer moves theta; ``explain()`` says which.
        num_steps: steps of the outer optimizer.
        history: one record per gradient: ``step, value, gradient_norm, gradient_error`` (None where it was not
            estimated), ``solve_tolerance, inner_steps`` (None for a solver that does not count), ``linear_steps,
            seconds``. An outer optimizer that searches along lines has several gradients in one step.
    """

    theta: Any
    x: Any
    value: float
    gradient_norm: float
    gradient_error: float
    tolerance: float
    status: Status
    num_steps: int
    history: list[dict[str, Any]]

    @property
    def num_inner_steps(self) -> int:
        """All steps of the inner solver, where it counts them."""
        return sum(record["inner_steps"] or 0 for record in self.history)

    @property
    def num_linear_steps(self) -> int:
        """All products with the Hessian (Jacobian) in the linear solves behind the gradients."""
        return sum(record["linear_steps"] for record in self.history)

    def explain(self) -> str:
        """Two sentences: how it ended, and what to do about it."""
        numbers = (
            f"the outer gradient has norm {self.gradient_norm:.2e} and an error of about {self.gradient_error:.1e}; "
            f"both together were to be at most {self.tolerance:.2e}"
        )
        if self.status is Status.CONVERGED:
            return f"Converged after {self.num_steps} steps: {numbers}. There is nothing to do."
        if self.status is Status.STAGNATED and self.gradient_error <= self.tolerance:
            return (
                f"Stopped after {self.num_steps} steps, because the optimizer no longer moves theta: {numbers}. Give "
                "it tighter tolerances or another learning rate, begin elsewhere, or ask for a larger rtol."
            )
        if self.status is Status.STAGNATED:
            return (
                f"Stopped after {self.num_steps} steps: {numbers}, and no tighter solve makes the error smaller. Use "
                "float64, a solver that reaches smaller tolerances, a better conditioned problem, or a larger rtol."
            )
        if self.gradient_error > max(self.gradient_norm, self.tolerance):
            return (
                f"Stopped at the limit of {self.num_steps} steps: {numbers}. The error is what keeps it: raise the "
                "max_steps of the layer's solver and linear solver."
            )
        first = self.history[0]["gradient_norm"]
        return (
            f"Stopped at the limit of {self.num_steps} steps: {numbers} (at the start it was {first:.2e}). Raise "
            "max_steps or the optimizer's learning rate, optimise the logarithm of what must be positive, or ask for "
            "a larger rtol."
        )

    def plot(self, path: str | Path | None = None) -> Any:
        """Outer loss, gradient norm with its error, and tolerance of the solves against gradients; needs matplotlib.

        Args:
            path: where to write the picture; None leaves that to the caller.

        Returns:
            The matplotlib figure.
        """
        with extra("progress", "plot() needs matplotlib"):
            from matplotlib.figure import Figure
        figure = Figure(figsize=(8, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        column = lambda name: [record[name] for record in self.history]  # noqa: E731
        left.plot(column("value"), color="C0")
        left.set(xlabel="gradients taken", ylabel="outer loss")
        right.semilogy(column("gradient_norm"), color="C0", label="norm of the outer gradient")
        errors = [(k, r["gradient_error"]) for k, r in enumerate(self.history) if r["gradient_error"]]
        right.semilogy(*zip(*errors, strict=True), "o", ms=3, color="C3", label="its error") if errors else None
        right.semilogy(column("solve_tolerance"), color="0.6", ls="--", label="tolerance of the solves")
        right.axhline(self.tolerance, color="k", lw=0.8, ls=":", label="asked for")
        right.set(xlabel="gradients taken")
        right.legend(frameon=False, fontsize=8)
        if path is not None:
            figure.savefig(path, dpi=110)
        return figure
