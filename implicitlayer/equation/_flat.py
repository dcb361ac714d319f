"""User functions of pytrees as pure functions of flat lists of tensors, and what composite ones tell of themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import is_
from typing import Any

import numpy as np
import torch

from implicitlayer._errors import ClosureError
from implicitlayer.base._surroundings import ReadingMode
from implicitlayer.base._tree import (
    CopiesFunctions,
    TreeSpec,
    flatten,
    is_data,
    lane_reduce,
    like_x,
    places_of_data,
    unflatten,
)
from implicitlayer.base._types import FlatFunction, Leaves
from implicitlayer.equation._capture import ClosedOver
from implicitlayer.equation._normalisation import PLAIN


@dataclass(frozen=True, eq=False)
class Composite(CopiesFunctions):
    """``objective(x, *theta) = loss(model(x, *theta), *theta)``; made by :func:`composite`, :func:`least_squares`."""

    loss: Callable[..., torch.Tensor]
    model: Callable[..., Any]
    squares: bool = False  # whether the loss is half the sum of squares of the outputs, by construction

    def __call__(self, x: Any, *theta: Any) -> torch.Tensor:
        return self.loss(self.model(x, *theta), *theta)

    def as_composite(self) -> Composite:
        """Itself: see NOTE [objectives with parts]."""
        return self


def composite(loss: Callable[..., torch.Tensor], model: Callable[..., Any]) -> Composite:
    """The objective ``loss(model(x, *theta), *theta)``, with its parts known.

    In a layer with ``curvature="gauss_newton"`` the linear solve behind a gradient uses J' (d^2 loss / d outputs^2) J
    with J = d model / dx: positive semidefinite for a convex loss, whatever the model. The gradient is then exact only
    where the neglected term, (d loss / d outputs) times the curvature of the model, vanishes: for linear models, and
    at solutions that fit their data.

    Args:
        loss: ``loss(outputs, *theta) -> 0-d tensor`` (or one value per lane).
        model: ``model(x, *theta) -> outputs``, a pytree of tensors.

    Source: N. N. Schraudolph, Neural Computation 14 (2002); J. Martens, ICML 2010, section 3.

    Example:
        >>> import torch, implicitlayer as il
        >>> objective = il.composite(lambda y, t: ((y - t) ** 2).sum(), lambda x, t: 3 * x)
        >>> layer = il.argmin(objective, lambda f, x, t: t / 3, curvature="gauss_newton")
        >>> t = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> layer(torch.zeros(2, dtype=torch.float64), t).sum().backward()
        >>> [round(v, 12) for v in t.grad.tolist()]
        [0.333333333333, 0.333333333333]
    """
    return Composite(loss, model)


def least_squares(residuals: Callable[..., Any], *, batch_dims: int = 0) -> Composite:
    """The objective ``1/2 sum of squares of residuals(x, *theta)``, with its parts known: see :func:`composite`.

    Args:
        residuals: ``residuals(x, *theta) -> pytree of tensors`` of any shapes.
        batch_dims: leading dimensions of the residuals that enumerate problems: one sum for each. A layer that is
            given the objective itself takes its own ``batch_dims``; inside of another one, such as
            :func:`proximal`, say it here.

    Example:
        >>> import torch, implicitlayer as il
        >>> il.least_squares(lambda x: {"a": x, "b": 2 * x})(torch.tensor([1.0, 2.0])).item()
        12.5
    """
    return Composite(partial(_half_squares, batch_dims), residuals, squares=True)


def _half_squares(lane_dims: int, outputs: Any, *theta: Any) -> torch.Tensor:
    return torch.stack([0.5 * lane_reduce(leaf * leaf, lane_dims) for leaf in flatten(outputs)[0]]).sum(0)


@dataclass(frozen=True, eq=False)
class Signature:
    """The structure of theta: tensor leaves apart from everything that is passed through.

    ``places``: where in ``leaves`` the tensors are.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...]) -> Signature:
        leaves, spec = flatten(args)
        places = places_of_data(leaves)
        for i, leaf in enumerate(leaves) if len(places) < len(leaves) else ():
            if isinstance(leaf, np.ndarray):
                leaves[i] = leaf.copy()  # backward reads it again
            elif isinstance(leaf, Iterator):
                raise TypeError(
                    f"theta holds a {type(leaf).__name__}, which can be read only once, and a layer evaluates its "
                    "function many times. Pass list(...) of it: list(module.parameters())."
                )
        return cls(spec, tuple(leaves), tuple(places))

    @cached_property
    def tensors(self) -> Leaves:
        return [self.leaves[i] for i in self.places]

    def rebuild(self, tensors: Leaves) -> tuple[Any, ...]:
        """The arguments with their tensors replaced in order; surplus tensors (closed-over ones) are not read."""
        filled = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=False):
            filled[place] = tensor
        rebuilt: tuple[Any, ...] = unflatten(filled, self.spec)
        return rebuilt

    @staticmethod
    def tensors_of(args: tuple[Any, ...]) -> Leaves:
        """``Signature.of(args).tensors``; a solver asks at every evaluation."""
        return list(filter(is_data, flatten(args)[0]))

    @cached_property
    def slots(self) -> Signature:
        """The same structure holding no tensor: functions that outlive the call must not keep data alive."""
        filled: list[Any] = list(self.leaves)
        for place in self.places:
            filled[place] = None
        return Signature(self.spec, tuple(filled), self.places)


def refuse_not_differentiated(leaves: Sequence[Any]) -> None:
    """Raise TypeError for a tensor that requires a gradient and cannot get one."""
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor) or not leaf.requires_grad:
            continue
        if leaf.layout is not torch.strided:
            raise TypeError(
                f"a sparse theta of shape {tuple(leaf.shape)} ({leaf.layout}) requires a gradient; only dense tensors "
                "are differentiated. Pass its values (a dense vector) as a theta and build the sparse tensor inside "
                "the objective, or pass .to_dense(). Without requires_grad it may stay sparse."
            )
        if leaf.is_complex():
            raise TypeError(
                f"a complex theta of shape {tuple(leaf.shape)} requires a gradient; only real ones are "
                "differentiated. Pass torch.view_as_real of it and rebuild it inside the objective with "
                "torch.view_as_complex."
            )


@dataclass(frozen=True, eq=False)
class Parts:
    """What an objective tells about itself besides its value; see NOTE [objectives with parts].

    Attributes:
        metric: ``(x leaves, theta leaves) -> leaves`` broadcastable to x: a positive diagonal close to the Hessian.
        model, loss, squares: where the objective is ``loss(model(x, theta), theta)``; as of :class:`Composite`.
        coupling: the terms of the objective through which the first ``num_coupled`` theta leaves act; no other term
            reads them.
    """

    metric: FlatFunction | None = None
    metric_matrix: FlatFunction | None = None
    model: FlatFunction | None = None
    loss: FlatFunction | None = None
    squares: bool = False
    coupling: FlatFunction | None = None
    num_coupled: int = 0


NO_PARTS = Parts()
_PARTS = ("curvature_metric", "curvature_matrix", "as_composite", "coupling")  # methods; see flat_parts


def flat_function(
    function: Callable[..., Any], x_spec: TreeSpec, signature: Signature, hidden: Leaves, scalar: bool
) -> FlatFunction:
    """``function`` on flat lists, closed-over tensors read from the end of the theta list.

    Its result is a scalar (per lane), or leaves like x.
    """
    slots = signature.slots

    def flat(x: Leaves, theta: Leaves) -> Any:
        args = (unflatten(x, x_spec), *slots.rebuild(theta))
        values = theta[len(theta) - len(hidden) :]
        value = call_with(function, hidden, values, args, reads_all=True)
        return value if scalar else like_x(value, x, x_spec)

    return flat


def flat_parts(
    function: Callable[..., Any], x_spec: TreeSpec, signature: Signature, hidden: Leaves, lane_dims: int = 0
) -> Parts:
    """What an objective tells about itself besides its value, on flat lists.

    NOTE [objectives with parts]: an objective may have the methods ``curvature_metric(x, *theta)``, a positive
    diagonal close to its Hessian, in the structure of x, or None; ``curvature_matrix(x, *theta)``, the same as a full
    matrix [n, n], or None; ``as_composite()``, a :class:`Composite` or None; and
    ``coupling(lane_dims)``, a function ``(x, first theta) -> value per lane``: the terms that read the first theta.
    """
    if not any(map(partial(hasattr, function), _PARTS)):
        return NO_PARTS
    slots = signature.slots
    metric_of: Any = getattr(function, "curvature_metric", None)
    matrix_of: Any = getattr(function, "curvature_matrix", None)
    composite: Any = function.as_composite() if hasattr(function, "as_composite") else None
    coupling_of: Any = function.coupling(lane_dims) if hasattr(function, "coupling") else None
    outputs_spec: list[TreeSpec] = []  # known once the model has run, which it does before the loss

    def call(method: Callable[..., Any], theta: Leaves, *args: Any) -> Any:
        return call_with(method, hidden, theta[len(theta) - len(hidden) :], args)

    def metric(x: Leaves, theta: Leaves) -> Leaves:
        diagonal = call(metric_of, theta, unflatten(x, x_spec), *slots.rebuild(theta))
        leaves = [] if diagonal is None else flatten(diagonal)[0]
        if leaves and all(leaf is leaves[0] for leaf in leaves):  # one number for all leaves stays one tensor
            return [leaves[0].detach()] * len(leaves)
        return [leaf.detach() for leaf in leaves]

    def metric_matrix(x: Leaves, theta: Leaves) -> Leaves:
        matrix = call(matrix_of, theta, unflatten(x, x_spec), *slots.rebuild(theta))
        return [] if matrix is None else [matrix.detach()]

    def model(x: Leaves, theta: Leaves) -> Leaves:
        leaves, spec = flatten(call(composite.model, theta, unflatten(x, x_spec), *slots.rebuild(theta)))
        outputs_spec[:] = [spec]
        return leaves

    def loss(outputs: Leaves, theta: Leaves) -> torch.Tensor:
        tree = unflatten(outputs, outputs_spec[0])
        value: torch.Tensor = call(composite.loss, theta, tree, *slots.rebuild(theta))
        return value

    def coupling(x: Leaves, theta: Leaves) -> torch.Tensor:
        value: torch.Tensor = call(coupling_of, theta, unflatten(x, x_spec), slots.rebuild(theta)[0])
        return value

    end = 0 if coupling_of is None else len(flatten(unflatten(slots.leaves, slots.spec)[0])[0])  # of the first argument
    return Parts(
        metric if metric_of is not None else None,
        metric_matrix if matrix_of is not None else None,
        *((model, loss, composite.squares) if composite is not None else (None, None, False)),
        *((coupling, sum(place < end for place in slots.places)) if coupling_of is not None else (None, 0)),
    )


class Reading:
    """What one evaluation, in as many runs as it takes, reads of the tensors that a function closes over."""

    def __init__(self, closed: ClosedOver) -> None:
        self.closed = closed
        self.met: set[int] = set()
        self.unmet: dict[int, tuple[int, ...]] | None = None

    def add(self, mode: _Substitute) -> Reading:
        """What one more run has read."""
        self.met |= mode.met
        last = self.unmet
        self.unmet = mode.unmet if last is None else {key: mode.unmet[key] for key in last if key in mode.unmet}
        return self

    def finish(self) -> None:
        """Raise ClosureError if a tensor that must be read was not, or was changed; see NOTE [constants]."""
        if self.unmet is None:  # there is nothing to watch
            return
        if self.closed.settled:
            self.closed.refuse_changed(self.met)
        else:
            self.closed.settle(self.met)
        if self.unmet:
            raise ClosureError(
                f"the objective no longer reads a closed-over tensor of shape {next(iter(self.unmet.values()))} that "
                "it read when the layer was called: module weights that were swapped for the call only (as "
                "torch.func.functional_call does), a cache, a branch, or a run that cannot be followed (another "
                "thread, or code of torch.compile: then give the function or module that is not compiled, and compile "
                "around the layer). Pass the tensor to the layer as one more theta, or use il.ArgminLayer, which keeps "
                "the weights of the call."
            )


def call_with(
    function: Callable[..., Any],
    originals: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    args: Sequence[Any],
    *,
    reads_all: bool = False,
    reading: Reading | None = None,
) -> Any:
    """``function(*args)`` with every read of ``originals[i]`` answered by ``values[i]``.

    With ``reads_all``, an original that is never read is an error: the function reads something else in its place, and
    its value and gradient would be wrong without a word. ``reading`` makes this one run of several that together read
    all. With neither, and nothing to swap in, the function runs as it is: a solver calls it often.
    """
    closed = originals if isinstance(originals, ClosedOver) else ClosedOver(originals)
    first = closed.first
    watched = (bool(closed.constants) or (first is not None and bool(first.made))) and (
        reads_all or reading is not None
    )
    swaps = not all(own is value for own, value in zip(originals, values, strict=True))
    if not swaps and not watched and (closed.checkpoints or not closed.normalises):
        return function(*args)
    if swaps and closed.checkpoints:
        raise _read_again(originals)
    operations = {} if closed.checkpoints else PLAIN  # a checkpoint would run again without this mode
    with _Substitute(originals, values, operations) as mode:
        result = function(*args)
    if reading is not None:
        reading.add(mode)
    elif reads_all:
        Reading(closed).add(mode).finish()
    return result


def _read_again(originals: Sequence[torch.Tensor]) -> ClosureError:
    return ClosureError(
        "the objective uses torch.utils.checkpoint (or hooks on saved tensors) and closes over tensors that require a "
        f"gradient (the first of shape {tuple(originals[0].shape)}): a checkpoint reads them again when nothing can "
        "follow it. That is right for leaves without hooks, as module weights are, in a first derivative outside "
        "torch.func. Else pass them to the layer as thetas, or call checkpoint around the layer, not inside."
    )


class _Substitute(ReadingMode):
    """Swaps the values of closed-over tensors in, and plain operations for torch's normalisations."""

    def __init__(
        self,
        originals: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        operations: dict[Any, Any],
    ) -> None:
        super().__init__()
        self.originals, self.operations = originals, operations
        self.met: set[int] = set()  # ids of all that entered an operation; what is asked for here outlives the run
        self.values = {id(old): new for old, new in zip(originals, values, strict=True) if new is not old}

    @property
    def unmet(self) -> dict[int, tuple[int, ...]]:
        """Shapes of the originals that were not read, by id."""
        return {id(old): tuple(old.shape) for old in self.originals if id(old) not in self.met}

    def swap(self, value: Any) -> Any:
        """What stands for an argument of an operation, whose tensors are met."""
        if isinstance(value, torch.Tensor):
            self.met.add(id(value))
            return self.values.get(id(value), value)
        if isinstance(value, (list, tuple)):
            items = list(map(self.swap, value))
            if not self.values or all(map(is_, items, value)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            return {key: self.swap(item) for key, item in value.items()}
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = list(map(self.swap, args))
        if not kwargs:
            return self.operations.get(func, func)(*args)
        return self.operations.get(func, func)(*args, **self.swap(kwargs))
