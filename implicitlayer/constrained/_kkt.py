"""``il.constrained_argmin``: minima under equations and inequalities, differentiated through their KKT conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from implicitlayer.base._records import Record
from implicitlayer.base._sharding import Sharding, everywhere, mesh_of
from implicitlayer.base._solution import ActiveSet
from implicitlayer.base._surroundings import outside_compiled_code
from implicitlayer.base._tree import CopiesFunctions, TreeSpec, flatten_with_names
from implicitlayer.base._types import FlatFunction, Leaves, OnFailure
from implicitlayer.constrained._kkt_lagrangian import ConditionsResidual, Form, Lagrangian, masked
from implicitlayer.constrained._kkt_point import Caller, Finder
from implicitlayer.equation._capture import ClosedOver
from implicitlayer.equation._distance import AnswerCheck
from implicitlayer.equation._flat import Signature
from implicitlayer.equation._residual import Attached, Residual
from implicitlayer.layer._forward import Constraints
from implicitlayer.layer._layer import ImplicitLayer, check_init
from implicitlayer.layer._roles import check_roles, check_settings
from implicitlayer.layer._verdict import tell_step_limit
from implicitlayer.programs._kkt_active import ActiveConstraints, Tolerances, stacked
from implicitlayer.programs._kkt_linear import KktSolver

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
    batch_dims: int = 0,
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
            them. One without ``batched = True`` is called lane by lane, under vmap and with ``batch_dims``.
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
            ``"raise"``: all are errors. ``"ignore"``: none is. ``"mask"`` and linear solves as in :func:`argmin`.
        stationarity_rtol: allowed remainder of the gradient of the Lagrangian, relative to ||grad f|| + ||H x||, and
            allowed distance from the constraints, relative to the size of x. None judges neither.
        active_rtol: an inequality is at its border if x is nearer to it than this times the size of x, and active if
            its force mu ||grad g|| is above this times ||grad f|| + ||H x||. Not below the accuracy of the solver. One
            that is not active is at a kink too if its border is within twice the error of x that the remaining gradient
            implies.
        at_kink: what an inequality at a kink counts as for derivatives.
        polish: Newton steps on the conditions of optimality after the solver, kept where they bring it nearer.
        batch_dims: leading dimensions of every leaf of x that enumerate independent problems, lanes. The objective
            returns one value per lane, [*lanes], constraints return [*lanes, ...]. A theta may have lanes of its own
            or be shared. A solver that is called lane by lane gets theta whole; ``t[problem.lane]`` is the part of its
            lane. To evaluate its problem, objective and constraints are run for all lanes.

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
    check_roles("constrained_argmin", objective, solver, "objective")
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
        batch_dims,
    )


@dataclass(eq=False)
class ConstrainedLayer(CopiesFunctions):
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
    batch_dims: int = 0

    def __post_init__(self) -> None:
        self.records: list[Record] = []
        self.active_set: ActiveConstraints | None = None
        needed, optional = ("objective", "solver"), ("equality", "inequality", "linear_solver")
        check_settings(self, needed, optional, ("polish", "batch_dims"))
        if self.equality is None and self.inequality is None:
            raise ValueError("constrained_argmin needs equality= or inequality=. Without constraints use il.argmin.")
        if self.at_kink not in ("inactive", "active"):
            raise ValueError(f"at_kink={self.at_kink!r} must be 'inactive' or 'active'.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "records": [], "active_set": None}  # they belong to calls, not to the layer

    @property
    def last_record(self) -> Record | None:
        """The latest of :attr:`records`, after a backward that of its solve; None before the first call."""
        return self.records[-1] if self.records else None

    @outside_compiled_code
    def __call__(self, init: Any, *theta: Any) -> Any:
        """Solve from ``init`` at ``theta``; return x in the structure of ``init``, or (x, :class:`Multipliers`)."""
        x, multipliers = self.solved(init, theta)
        return (x, multipliers) if self.return_multipliers else x

    @outside_compiled_code
    def solved(self, init: Any, theta: tuple[Any, ...]) -> tuple[Any, Multipliers]:
        """x and its multipliers."""
        leaves, names = flatten_with_names(init, "x")
        check_init(leaves, names, self.batch_dims)
        if mesh_of(leaves) is not None:
            return self._solved_sharded(init, theta)
        lanes = leaves[0].shape[: self.batch_dims]
        forms = (
            Form.of("equality", self.equality, init, theta, lanes),
            Form.of("inequality", self.inequality, init, theta, lanes),
        )
        scalar = Lagrangian(self.objective, self.equality, self.inequality, forms)
        caller = Caller(self.solver, forms, names, self.solver_returns_multipliers)
        finder = Finder(caller, self.tolerances, self.at_kink == "active", self.polish)
        sizes = sum(leaf.shape[self.batch_dims :].numel() for leaf in leaves), forms[0].size, forms[1].size
        layer = KktLayer(
            scalar,
            finder,
            self.linear_solver if self.linear_solver is not None else KktSolver(*sizes, keeps=True),
            "argmin",
            False,
            False,
            self.on_failure,
            None,  # the conditions are judged by constraint, not by the norm of the gradient of the scalar
            0,
            self.batch_dims,
            found=finder.found,
            tolerances=self.tolerances,
            num_x=sizes[0],
        )
        z = layer(scalar.start(init, lanes), *theta)
        self.records = layer.records
        self.active_set = layer.active_set or self.active_set  # a call without a derivative looks for none
        return z.x, Multipliers(forms[0].rebuild(z.equality), forms[1].rebuild(z.inequality))

    def _solved_sharded(self, init: Any, theta: tuple[Any, ...]) -> tuple[Any, Multipliers]:
        """The same of whole unknowns; NOTE [sharded objectives]."""
        inner, sharding = replace(self), Sharding(init)
        for name in ("objective", "equality", "inequality"):
            if getattr(self, name) is not None:
                setattr(inner, name, Sharding(init).seen(getattr(self, name)))
        x, multipliers = inner.solved(sharding.inside(init), theta)
        self.records, self.active_set = inner.records, inner.active_set
        return sharding.outside(x), everywhere(multipliers, sharding.mesh)


@dataclass(eq=False)
class KktLayer(ImplicitLayer):
    """The argmin layer of a scalar of :class:`Unknowns`, which reports what its solver found about the constraints."""

    found: list[ActiveConstraints] = field(default_factory=list)
    tolerances: Tolerances = field(default_factory=Tolerances)
    active_set: ActiveConstraints | None = None
    num_x: int | None = None  # entries of x in one problem, where the answer may be rough

    damps: ClassVar[bool] = False

    def _read(self, function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
        if not isinstance(function, Lagrangian):
            return function, None
        parts = [part for part in (function.objective, function.equality, function.inequality) if part is not None]
        # the multipliers are zero at the start, and hide what a constraint computes
        return function, lambda z, *theta: [part(z.x, *theta) for part in parts]

    def _equation(
        self, user_function: Callable[..., Any], x_spec: TreeSpec, signature: Signature, hidden: ClosedOver
    ) -> tuple[FlatFunction, Residual, Constraints | None]:
        function, residual, _ = super()._equation(user_function, x_spec, signature, hidden)
        residual = ConditionsResidual(**vars(residual))
        seen = masked(function, x_spec.num_leaves)
        return seen, residual, Constraints(None, _no_prox, self._examine, self._judge)

    def _examine(self, residual: Residual, x: Leaves, at: Attached | None) -> ActiveSet:
        # a solver of all lanes reports once, any other one once for each lane of vmap
        batched = bool(getattr(self.solver, "batched", False)) or not residual.levels
        self.active_set = self.found[0] if batched else stacked(self.found, x[0].shape[: len(residual.levels)])
        return self.active_set

    def _judge(self, found: ActiveSet, on_failure: OnFailure, limited: bool) -> AnswerCheck | None:
        assert isinstance(found, ActiveConstraints)
        rtol = self.tolerances.stationarity_rtol
        found.judge(on_failure, rtol)
        if rtol is None:
            return None
        if limited and not getattr(self.solver, "num_polished", 0):
            tell_step_limit(on_failure)
        if self.num_x is None or found.residual is None or found.size is None or found.zero is None:
            return None  # a quadratic program: its answer is exact for its active set, or refused
        told = ~((found.stationarity <= rtol) & (found.relative_violation <= rtol))
        done = on_failure == "ignore" or bool(told.any())
        size = torch.maximum(found.size, found.zero / max(rtol, torch.finfo(found.zero.dtype).tiny))
        least = torch.zeros_like(size)  # of the distance
        nearest = None if bool(found.num_kinks.any()) else found.nearest  # kinks have a warning of their own
        solver = self.linear_solver
        return AnswerCheck(found.residual, least, size, rtol, on_failure, solver, nearest, done, self.num_x)


def _no_prox(y: Leaves, theta: Leaves) -> Leaves:
    raise TypeError("a layer with equality= or inequality= has no proximal operator: its solver needs another method.")
