"""The callable behind ``il.argmin``, ``il.root`` and ``il.fixed_point``: check, flatten, find closed-over tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch

from implicitlayer import _torch
from implicitlayer._errors import ObjectiveError
from implicitlayer.base._divided import Divided
from implicitlayer.base._records import CallRecords, Record
from implicitlayer.base._sharding import WHOLE, Sharding, mesh_of
from implicitlayer.base._surroundings import announce, name_limit, out_of_inference, outside_compiled_code
from implicitlayer.base._tree import CopiesFunctions, TreeSpec, flatten, flatten_with_names, like_x, tree_map, unflatten
from implicitlayer.base._types import FlatFunction, Leaves, OnFailure, check_one_of
from implicitlayer.equation._capture import (
    ClosedOver,
    derivatives_possible,
    find_closed_over,
    needing,
    plainly_impossible,
    run_undifferentiated,
)
from implicitlayer.equation._certificate import Assumptions
from implicitlayer.equation._flat import (
    Composite,
    Signature,
    flat_function,
    flat_parts,
    least_squares,
    refuse_not_differentiated,
)
from implicitlayer.equation._jacobian import Curvature
from implicitlayer.equation._repair import POLICIES, NegativeCurvature
from implicitlayer.equation._residual import Residual, check_value
from implicitlayer.equation._solve import Settings, Varying, refuse_forward_over_forward
from implicitlayer.layer._forward import Calling, Constraints
from implicitlayer.layer._function import ImplicitArgmin, LayerSpec
from implicitlayer.layer._roles import check_settings, tell_arguments

Kind = Literal["argmin", "root", "fixed_point"]
_without_graph = torch.Tensor.detach  # of init, which may be an earlier answer: backward would enter its graph


@dataclass(eq=False)
class ImplicitLayer(CopiesFunctions):
    """A differentiable layer ``(init, *theta) -> x``; made by :func:`argmin`.

    Attributes:
        records: diagnostics of the latest call: one forward record, then one record per linear solve of its
            derivatives. Empty before the first call.
    """

    function: Callable[..., Any]
    solver: Callable[..., Any]
    linear_solver: Callable[..., Any]
    kind: Kind
    solver_has_aux: bool
    objective_has_aux: bool
    on_failure: OnFailure
    stationarity_rtol: float | None
    polish: int
    batch_dims: int
    curvature: Curvature = "hessian"
    damping: float = 0.0
    negative_curvature: NegativeCurvature = "raise"
    assumptions: Assumptions | None = None

    own_function: ClassVar[bool] = False  # the function is the library's: it closes over nothing, and is not searched
    varying: Varying = field(default=None, init=False, repr=False)  # of :class:`Settings`
    damps: ClassVar[bool] = True  # whether it takes damping= and curvature=, where it is a minimum's
    reads_more: ClassVar[bool] = False  # what is run to find closed-over tensors returns more than the value

    def __post_init__(self) -> None:
        self.records: list[Record] = []
        self._watched = self.own_function  # whether what it keeps was looked at
        self.knows_lanes = False  # whether lanes that read one another were looked for
        check_settings(self, ("function", "solver", "linear_solver"), (), ("polish", "batch_dims", "damping"))
        if self.batch_dims and isinstance(self.function, Composite) and self.function.squares:
            self.function = least_squares(self.function.model, batch_dims=self.batch_dims)
        check_one_of("on_failure", self.on_failure, get_args(OnFailure))
        if self.stationarity_rtol is not None and not self.stationarity_rtol >= 0:
            raise ValueError(
                f"stationarity_rtol={self.stationarity_rtol} must be non-negative, or None to switch the check off."
            )
        if self.curvature not in ("hessian", "gauss_newton"):
            raise ValueError(f"curvature={self.curvature!r} must be 'hessian' or 'gauss_newton'.")
        check_one_of("negative_curvature", self.negative_curvature, POLICIES)
        if not isinstance(self.assumptions, Assumptions | None):
            raise TypeError(f"assumptions must be il.Assumptions(...), got {type(self.assumptions).__name__}.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "records": []}  # records belong to calls, not to the layer

    @property
    def last_record(self) -> Record | None:
        """The latest of :attr:`records`, after a backward that of its solve; None before the first call."""
        return self.records[-1] if self.records else None

    @outside_compiled_code
    def __call__(self, init: Any, *theta: Any) -> Any:
        """Solve from ``init`` at ``theta`` and return x, in the structure of ``init``.

        Args:
            init: pytree of real floating tensors, the starting point; gets no gradient. With ``batch_dims=k`` every
                leaf has the same k leading lane dimensions.
            theta: pytrees. Floating tensors are differentiated, all other leaves are passed through.
        """
        if _torch.transforms_active():
            refuse_forward_over_forward()
        x, x_names = flatten_with_names(init, "x")
        check_init(x, x_names, self.batch_dims)
        if (not set(map(type, x)) <= WHOLE or _torch.transforms_active()) and mesh_of(x) is not None:
            return self._call_sharded(init, theta)
        x_spec = flatten(init)[1]
        theta = tree_map(announce, theta) if _torch.num_modes() else theta
        signature = Signature.of(theta)
        user_function = without_aux(self.function) if self.objective_has_aux else self.function
        watched = (differentiable := derivatives_possible()) and not self.own_function
        hidden = (self._closed_over if watched else self._watch)(user_function, x, x_spec, signature, (init, *theta))
        needs = hidden.needs_derivative if watched else differentiable and any(needing(signature.tensors))
        function, residual, constraints = self._equation(user_function, x_spec, signature, hidden)
        of_root = self.kind == "fixed_point" and getattr(self.solver, "finds", None) == "root"
        calling = Calling(
            solver=self.solver,
            solver_has_aux=self.solver_has_aux,
            x_spec=x_spec,
            x_names=x_names,
            rebuild_theta=signature.rebuild,
            flatten_theta=lambda args, extra: [*Signature.tensors_of(args), *extra],
            num_theta=len(signature.tensors),
            flat_function=_minus_identity(function) if of_root else function,
            user_function=None if hidden or constraints is not None or of_root else user_function,
            gives_value=self.kind == "argmin",
            constraints=constraints,
        )
        self.records = records = CallRecords()
        system = self.curvature, float(self.damping), self.negative_curvature, self.assumptions
        damps = self.damps and self.kind == "argmin"
        spec = LayerSpec(
            residual=residual,
            calling=calling,
            num_x=len(x),
            settings=Settings(self.linear_solver, self.on_failure, *system, records.listener(), damps, self.varying),
            closed=hidden if watched else None,
            needs_derivative=needs,
            stationarity_rtol=self.stationarity_rtol if needs else None,
            polish=self.polish,
            looks_at_lanes=not self.knows_lanes,
        )
        given = [*map(_without_graph, x), *signature.tensors, *map(announce, hidden)]  # a layer around may swap them
        try:
            *leaves, found = ImplicitArgmin.apply(spec, *out_of_inference(given))
        except RuntimeError as error:
            name_limit(error)
            raise
        self.knows_lanes = self.knows_lanes or (needs and x[0].shape[: self.batch_dims].numel() > 1)
        if hidden.first is not None:
            hidden.confirm_under_transform()
        solution, aux = unflatten(leaves, x_spec), found.aux
        return (solution, aux[0] if len(aux) == 1 else list(aux)) if self.solver_has_aux else solution

    def _watch(self, function: Callable[..., Any], *call: Any) -> ClosedOver:
        """Where nothing is to be found: what the function keeps of theta is marked, for a call with derivatives."""
        if not (derivatives_possible() or self._watched):
            self._watched = True
            with suppress(Exception):  # a function that cannot be run here is the solver's to call
                run_undifferentiated(self._read(function)[0], call[-1])
        return ClosedOver()

    def _closed_over(
        self, function: Callable[..., Any], x: Leaves, x_spec: TreeSpec, signature: Signature, args: tuple[Any, ...]
    ) -> ClosedOver:
        """What the function reads from outside; it is run for this, and errors in it or in its value are told first."""

        def check(value: Any) -> None:
            value = value[0] if self.reads_more else value
            if self.kind == "argmin":
                check_value(value, x[0].shape[: self.batch_dims], self.batch_dims > 0)
            else:
                like_x(value, x, x_spec)

        function, shown = self._read(function)
        try:
            hidden = find_closed_over(function, args, check, shown)
        except Exception as error:
            name_limit(error, transformed=plainly_impossible())
            tell_arguments(error, self.function, args[0], args[1:])
            raise
        refuse_not_differentiated([*signature.leaves, *hidden])
        return hidden

    def _call_sharded(self, init: Any, theta: tuple[Any, ...]) -> Any:
        """The same layer of unknowns that solvers can work with; see NOTE [sharded objectives]."""
        stays = self.works_in_parts(init, theta)
        stays = stays and not (self.solver_has_aux or getattr(self.solver, "callback", None))  # it sees whole tensors
        stays = stays and all(getattr(by, "in_parts", False) for by in (self.solver, self.linear_solver))
        sharding = Divided.or_whole(init, self.batch_dims, self.kind == "argmin") if stays else Sharding(init)
        value_of = without_aux(self.function) if self.objective_has_aux else self.function  # nobody reads aux
        inner = replace(self, function=value_of, objective_has_aux=False).inside(sharding, init)
        inner.knows_lanes = self.knows_lanes
        result = inner(sharding.inside(init), *theta)
        self.records, self.knows_lanes = inner.records, inner.knows_lanes
        return (sharding.outside(result[0]), result[1]) if self.solver_has_aux else sharding.outside(result)

    def works_in_parts(self, init: Any, theta: tuple[Any, ...]) -> bool:
        """Whether the layer itself, beside its solvers, looks at no single entries of its unknowns."""
        return type(self)._equation is ImplicitLayer._equation

    def inside(self, sharding: Sharding, init: Any) -> ImplicitLayer:
        """The same layer of unknowns as they are inside ``sharding``."""
        of_outputs = Divided.or_whole if getattr(self.solver, "in_parts", False) else Sharding
        return replace(self, function=sharding.seen(self.function, of_outputs))

    def _read(self, function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
        """What is run to find closed-over tensors, and what shows its numbers; see :func:`find_closed_over`."""
        return function, None

    def _equation(
        self, user_function: Callable[..., Any], x_spec: TreeSpec, signature: Signature, hidden: ClosedOver
    ) -> tuple[FlatFunction, Residual, Constraints | None]:
        """What the solver sees, the equation that is differentiated, and what constraints add."""
        function = flat_function(user_function, x_spec, signature, hidden, self.kind == "argmin")
        residual = Residual(
            function=_minus_identity(function) if self.kind == "fixed_point" else function,
            is_gradient=self.kind == "argmin",
            lane_dims_of_function=self.batch_dims,
            num_fixed=len(hidden) if hidden.checkpoints else 0,
            parts=flat_parts(self.function, x_spec, signature, hidden, self.batch_dims),
        )
        return function, residual, None


def _minus_identity(function: FlatFunction) -> FlatFunction:
    """The residual x - map(x) of a fixed point."""
    return lambda x, theta: [a - b for a, b in zip(x, function(x, theta), strict=True)]


def without_aux(function: Callable[..., Any]) -> Callable[..., Any]:
    def value_only(x: Any, *theta: Any) -> Any:
        result = function(x, *theta)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ObjectiveError(
                f"with objective_has_aux=True the objective must return (value, aux), got {type(result).__name__}."
            )
        return result[0]

    return value_only


def check_init(leaves: Sequence[Any], names: Sequence[str], batch_dims: int) -> None:
    if not leaves:
        raise ValueError("init has no leaves: pass a tensor or a pytree of tensors.")
    for leaf, name in zip(leaves, names, strict=True):
        if not isinstance(leaf, torch.Tensor):
            what = type(leaf).__name__ if leaf is not None else "None"
            remedy = "Use torch.as_tensor." if leaf is not None else "Leave it out, or close over it."
            if not (leaf is None or isinstance(leaf, int | float) or hasattr(leaf, "__array__")):
                remedy = "Pass a dict, list, tuple or namedtuple of tensors: other classes are not looked into."
            raise TypeError(f"init leaf {name} is {what}; the unknowns must be tensors. {remedy}")
        if leaf.is_complex():
            raise TypeError(
                f"init leaf {name} is complex ({leaf.dtype}); the unknowns must be real. Stack real and imaginary "
                "parts with torch.view_as_real and rebuild the complex tensor inside the objective."
            )
        if not leaf.is_floating_point():
            raise TypeError(f"init leaf {name} has dtype {leaf.dtype}; the unknowns must be floating. Use .double().")
        if leaf.ndim < batch_dims:
            raise ValueError(
                f"batch_dims={batch_dims} counts the leading dimensions of every leaf of init that enumerate problems, "
                f"but {name} has shape {tuple(leaf.shape)}: batch_dims={leaf.ndim} is the most for it, and "
                "batch_dims=0 is for a single problem."
            )
        if leaf.shape[:batch_dims] != leaves[0].shape[:batch_dims]:
            raise ValueError(
                f"with batch_dims={batch_dims} every leaf of init needs the same {batch_dims} leading dimensions: "
                f"{name} has shape {tuple(leaf.shape)}, {names[0]} {tuple(leaves[0].shape)}."
            )
