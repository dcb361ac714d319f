"""``il.constrained_argmin``: minima under equations and inequalities, differentiated through their KKT conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from implicitlayer._active_set import ActiveSet
from implicitlayer._capture import ClosedOver
from implicitlayer._errors import NonFiniteError, SolverOutputError
from implicitlayer._flat import Signature
from implicitlayer._records import Record
from implicitlayer._solution import RecordingSolver, SolverResult
from implicitlayer._surroundings import outside_compiled_code
from implicitlayer._tree import TreeSpec, flatten, flatten_with_names, unflatten
from implicitlayer._types import FlatFunction, Leaves, OnFailure
from implicitlayer.implicit._forward import Constraints, _check_leaf
from implicitlayer.implicit._kkt_active import ActiveConstraints, Conditions, Tolerances, stacked
from implicitlayer.implicit._kkt_lagrangian import ConstrainedProblem, Form, Lagrangian, Unknowns
from implicitlayer.implicit._kkt_linear import KktSolver
from implicitlayer.implicit._kkt_multipliers import multipliers as fitted
from implicitlayer.implicit._kkt_point import PointOfProblem
from implicitlayer.implicit._layer import ImplicitLayer, check_init
from implicitlayer.linear._residual import Residual

__all__ = ["ConstrainedLayer", "Multipliers", "constrained_argmin"]

AtKink = Literal["inactive", "active"]


class Multipliers(NamedTuple):
    """Multipliers of a solution, in the structure of what the constraint functions return (None where there is none).

    ``grad f + J_h' equality + J_g' inequality = 0`` with ``inequality >= 0``: the rate at which the smallest value of
    the objective rises when a constraint is tightened.
    """

    equality: Any
    inequality: Any


def constrained_argmin(
    objective: Callable[..., Any],
    solver: Callable[..., Any],
    *,
    equality: Callable[..., Any] | None = None,
    inequality: Callable[..., Any] | None = None,
    solver_returns_multipliers: bool = False,
    return_multipliers: bool = False,
    linear_solver: Callable[..., Any] | None = None,
    on_failure: OnFailure = "warn",
    stationarity_rtol: float | None = 1e-3,
    active_rtol: float = 1e-6,
    at_kink: AtKink = "inactive",
    polish: int = 0,
) -> ConstrainedLayer:
    """A layer ``(init, *theta) -> argmin_x objective(x, *theta)`` under ``h(x, *theta) = 0`` and ``g(x, *theta) <= 0``.

    At the solver's answer the inequalities that are active are found, and the conditions of optimality with these as
    equations are differentiated: with H the Hessian of the Lagrangian f + lambda'h + mu'g and J the gradients of the
    equations and active inequalities, one solve with the symmetric matrix [H J'; J 0] per derivative. Right where
    the active set does not change with theta to first order: at a kink (an inequality at its border with a zero
    multiplier) the derivative is that of one side, and said to be so.

    Args:
        objective: ``objective(x, *theta) -> 0-d tensor``, plain torch code; x and every theta are pytrees.
        solver: any callable ``solver(problem, init, *theta) -> x``. ``problem`` is the objective, with the constraints
            as ``problem.equality(x, *theta)`` and ``problem.inequality(x, *theta)``; a solver may use its own form of
            them. Under vmap it is called lane by lane.
        equality, inequality: ``(x, *theta) -> tensor or pytree``, one entry per constraint. Tensors that objective and
            constraints close over are found and differentiated, as in :func:`argmin`.
        solver_returns_multipliers: the solver returns ``(x, (lambda, mu))``, None for what it does not know, with the
            signs of f + lambda'h + mu'g, mu >= 0. Without it, multipliers are fitted to the stationarity condition by
            least squares, non-negative where they must be.
        return_multipliers: the layer returns ``(x, Multipliers)``, all of it differentiable.
        linear_solver: for the symmetric indefinite system; default a dense solve that checks that the point is a
            minimum (n + 1 products, n the number of entries of x). :class:`Minres` for large problems, without that
            check.
        on_failure: ``"warn"``: outside of the constraints is an error; not stationary and at a kink are warnings.
            ``"raise"``: all are errors. ``"ignore"``: none is. Linear solves as in :func:`argmin`.
        stationarity_rtol: allowed remainder of the gradient of the Lagrangian, relative to ||grad f|| + ||H x||, and
            allowed distance from the constraints, relative to the size of x. None judges neither.
        active_rtol: an inequality is at its border if x is nearer to it than this times the size of x, and active if
            its force mu ||grad g|| is above this times ||grad f|| + ||H x||. Not below the accuracy of the solver. One
            that is not active is at a kink too if its border is within twice the error of x that the remaining gradient
            implies.
        at_kink: what an inequality at a kink counts as for derivatives.
        polish: Newton steps on the conditions of optimality after the solver, kept where they bring it nearer.

    Returns:
        The layer. ``layer.active_set`` is what was found at the latest call that was differentiable, also
        ``record.active_set``: masks of active inequalities and of kinks, multipliers, violation.

    Raises:
        InfeasibleError, StationarityError, KinkError: see ``on_failure``.
        IndefiniteError: when differentiated, at a point that is no minimum (second-order sufficiency fails).
        SingularError: dependent constraints, or a flat direction, and a derivative that does not exist because of it.

    Source: A. V. Fiacco, Introduction to Sensitivity and Stability Analysis in Nonlinear Programming (1983), theorem
    2.1.1; Nocedal & Wright, Numerical Optimization, 2nd ed., chapters 12 and 16.

    Example:
        >>> import torch, implicitlayer as il
        >>> layer = il.constrained_argmin(  # the point of the disc x'x <= r that is nearest to t
        ...     lambda x, t, r: ((x - t) ** 2).sum(),
        ...     lambda problem, init, t, r: t * (r**0.5 / t.norm()).clamp(max=1.0),
        ...     inequality=lambda x, t, r: (x**2).sum() - r,
        ... )
        >>> t, r = torch.tensor([3.0, 4.0]).double(), torch.tensor(4.0).double().requires_grad_()
        >>> x = layer(torch.zeros(2).double(), t, r)  # sqrt(r) t / 5
        >>> x.sum().backward()
        >>> round(r.grad.item(), 12)  # 7/5 / (2 sqrt(r))
        0.35
    """
    return ConstrainedLayer(
        objective,
        solver,
        equality,
        inequality,
        solver_returns_multipliers,
        return_multipliers,
        linear_solver,
        on_failure,
        Tolerances(stationarity_rtol, active_rtol),
        at_kink,
        polish,
    )


@dataclass(eq=False)
class ConstrainedLayer:
    """A differentiable layer ``(init, *theta) -> x``; made by :func:`constrained_argmin`."""

    objective: Callable[..., Any]
    solver: Callable[..., Any]
    equality: Callable[..., Any] | None
    inequality: Callable[..., Any] | None
    solver_returns_multipliers: bool
    return_multipliers: bool
    linear_solver: Callable[..., Any] | None
    on_failure: OnFailure
    tolerances: Tolerances
    at_kink: AtKink
    polish: int

    def __post_init__(self) -> None:
        self.records: list[Record] = []
        self.active_set: ActiveConstraints | None = None
        for name in ("objective", "solver"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be callable, got {type(getattr(self, name)).__name__}.")
        for name in ("equality", "inequality", "linear_solver"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name} must be callable or None, got {type(getattr(self, name)).__name__}.")
        if self.equality is None and self.inequality is None:
            raise ValueError("constrained_argmin needs equality= or inequality=. Without constraints use il.argmin.")
        if self.at_kink not in ("inactive", "active"):
            raise ValueError(f"at_kink={self.at_kink!r} must be 'inactive' or 'active'.")
        if not self.polish >= 0:
            raise ValueError(f"polish={self.polish} must be non-negative.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "records": [], "active_set": None}  # they belong to calls, not to the layer

    @property
    def last_record(self) -> Record | None:
        """The latest diagnostics record, None before the first call."""
        return self.records[-1] if self.records else None

    @outside_compiled_code
    def __call__(self, init: Any, *theta: Any) -> Any:
        """Solve from ``init`` at ``theta``; return x in the structure of ``init``, or (x, :class:`Multipliers`)."""
        leaves, names = flatten_with_names(init, "x")
        check_init(leaves, names, 0)
        forms = (
            Form.of("equality", self.equality, init, theta),
            Form.of("inequality", self.inequality, init, theta),
        )
        scalar = Lagrangian(self.objective, self.equality, self.inequality, forms)
        finder = _Finder(self, forms, names)
        sizes = sum(leaf.numel() for leaf in leaves), forms[0].size, forms[1].size
        layer = KktLayer(
            scalar,
            finder,
            self.linear_solver if self.linear_solver is not None else KktSolver(*sizes),
            "argmin",
            False,
            False,
            self.on_failure,
            None,  # the conditions are judged by constraint, not by the norm of the gradient of the scalar
            0,
            0,
            found=finder.found,
            tolerances=self.tolerances,
        )
        z = layer(scalar.start(init), *theta)
        self.records = layer.records
        self.active_set = layer.active_set
        if not self.return_multipliers:
            return z.x
        return z.x, Multipliers(forms[0].rebuild(z.equality), forms[1].rebuild(z.inequality))


@dataclass(eq=False)
class KktLayer(ImplicitLayer):
    """The argmin layer of a scalar of :class:`Unknowns`, which reports what its solver found about the constraints."""

    found: list[ActiveConstraints] = field(default_factory=list)
    tolerances: Tolerances = field(default_factory=Tolerances)
    active_set: ActiveConstraints | None = None

    def _equation(
        self, user_function: Callable[..., Any], x_spec: TreeSpec, signature: Signature, hidden: ClosedOver
    ) -> tuple[FlatFunction, Residual, Constraints | None]:
        function, residual, _ = super()._equation(user_function, x_spec, signature, hidden)
        return function, residual, Constraints(None, _no_prox, self._examine, self._judge)

    def _examine(self, residual: Residual, x: Leaves, theta: Leaves) -> ActiveSet:
        lanes = x[0].shape[: residual.lane_dims]
        # a solver of all lanes reports once, a solver of one lane at a time once per lane
        batched = len(self.found) == 1 and self.found[0].num_active.shape == lanes
        self.active_set = self.found[0] if batched else stacked(self.found, lanes)
        return self.active_set

    def _judge(self, found: ActiveSet, on_failure: OnFailure) -> None:
        assert isinstance(found, ActiveConstraints)
        found.judge(on_failure, self.tolerances.stationarity_rtol)


def _no_prox(y: Leaves, theta: Leaves) -> Leaves:
    raise TypeError("a layer with equality= or inequality= has no proximal operator: its solver needs another method.")


@dataclass(eq=False)
class _Finder:
    """The user's solver as a solver of the scalar: its answer, with multipliers and the active set."""

    layer: ConstrainedLayer
    forms: tuple[Form, Form]
    names: list[str]
    found: list[ActiveConstraints] = field(default_factory=list)

    def __call__(self, scalar: Callable[..., torch.Tensor], start: Unknowns, *theta: Any) -> SolverResult:
        problem = ConstrainedProblem(scalar, start, self.forms)
        init, spec = flatten(start.x)
        before = [leaf.clone() for leaf in init]
        solver = self.layer.solver
        answer = (solver.run if isinstance(solver, RecordingSolver) else solver)(problem, start.x, *theta)
        result = answer if isinstance(answer, SolverResult) else SolverResult(answer)
        x, given = self._read(result.value, before)
        point = PointOfProblem(problem, spec, theta, before)
        conditions = point.conditions(x)
        y, z = self._multipliers(given, conditions)
        for _ in range(self.layer.polish):
            _, held = self._classify(conditions, y, z)
            better = point.newton_step(x, y, torch.where(held, z, 0.0), held)
            if better is None:
                break
            x, y, z = better
            conditions = point.conditions(x)
        active, held = self._classify(conditions, y, z)
        rtol = self.layer.tolerances.stationarity_rtol
        if rtol is not None and bool(
            active.stationarity <= rtol
        ):  # how far an answer is off that is none, nobody knows
            active, held = self._classify(conditions, y, z, point.error(x, active.equality, active.inequality))
        self.found.append(active)
        like = before[0]
        rest = [t.to(like.dtype) for t in (active.equality, torch.where(held, active.inequality, 0.0), held)]
        return SolverResult(Unknowns(unflatten(x, spec), *rest), result.status, result.num_steps, result.message)

    def _classify(
        self, conditions: Conditions, y: torch.Tensor, z: torch.Tensor, wrong_by: torch.Tensor | None = None
    ) -> tuple[ActiveConstraints, torch.Tensor]:
        layer = self.layer
        return conditions.active_set(y, z, layer.tolerances.active_rtol, layer.at_kink == "active", wrong_by)

    def _read(self, answer: Any, like: Leaves) -> tuple[Leaves, tuple[Any, Any]]:
        """x leaves and what the solver gave as multipliers."""
        given: tuple[Any, Any] = (None, None)
        if self.layer.solver_returns_multipliers:
            if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], tuple | list):
                raise SolverOutputError(
                    "with solver_returns_multipliers=True the solver must return (x, (lambda, mu)), got "
                    f"{type(answer).__name__}. Give None for multipliers that it does not know."
                )
            answer, pair = answer
            if len(pair) != 2:
                raise SolverOutputError(f"the solver must return two multipliers, (lambda, mu), got {len(pair)}.")
            given = (pair[0], pair[1])
        leaves, names = flatten_with_names(answer, "x")
        if names != self.names:
            raise SolverOutputError(
                f"the solver must return the structure of init: expected leaves {self.names}, got {names}. If it "
                "returns multipliers too, pass solver_returns_multipliers=True."
            )
        x = [_check_leaf(leaf, name, t) for leaf, name, t in zip(leaves, names, like, strict=True)]
        for leaf, name in zip(x, names, strict=True):
            if not bool(leaf.isfinite().all()):
                raise NonFiniteError(f"the solver returned NaN or Inf in {name}: it diverged or failed.")
        return x, given

    def _multipliers(self, given: tuple[Any, Any], at: Conditions) -> tuple[torch.Tensor, torch.Tensor]:
        """The solver's own multipliers, or fitted ones where it gave none."""
        near = at.near(self.layer.tolerances.active_rtol)
        known = [self._as_vector(value, form, at.x.device) for value, form in zip(given, self.forms, strict=True)]
        y, z = known
        if y is not None and z is not None:
            return y, z
        gradient = at.gradient
        rows_h, rows_g = at.rows_h, at.rows_g
        if y is not None:
            gradient, rows_h = gradient + rows_h.mT @ y, rows_h[:0]
        if z is not None:
            gradient, near = gradient + rows_g.mT @ z, torch.zeros_like(near)
        fit_y, fit_z = fitted(gradient, rows_h, rows_g, near)
        return fit_y if y is None else y, fit_z if z is None else z

    def _as_vector(self, value: Any, form: Form, device: torch.device) -> torch.Tensor | None:
        if form.spec is None or value is None:
            return torch.zeros(0, dtype=torch.float64, device=device) if form.spec is None else None
        parts = [torch.as_tensor(leaf).detach().to(device, torch.float64) for leaf in flatten(value)[0]]
        vector = torch.cat([part.reshape(-1) for part in parts]) if parts else torch.zeros(0, dtype=torch.float64)
        if vector.numel() != form.size:
            raise SolverOutputError(
                f"the solver returned {vector.numel()} multipliers for {form.name}, which has {form.size} entries."
            )
        if not bool(vector.isfinite().all()):
            raise NonFiniteError(f"the solver returned NaN or Inf in the multipliers of {form.name}.")
        return vector
