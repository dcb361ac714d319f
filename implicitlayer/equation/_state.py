"""What a run of a function leaves: where the graph of its value ends, and what it has kept."""

# NOTE [state]: the first run of an objective (the finder's) and every later one must read the same tensors. A function
# that keeps what it has made of theta, in a cache, reads no theta later: its gradient would be zero in silence. So the
# second run must not read a tensor that the first one made of a theta that needs a gradient. And the run at the
# solution must read every such theta where the first one read it: its graph has no fewer edges into it. If it has, one
# more run at the arguments of the first tells a cache from a branch that depends on x. What is detached by hand is a
# constant by intention. Under a transform no graph shows what is read: there the function is run once more after the
# solve, at the arguments of the first, and no theta may enter fewer operations than before.
#
# An error does not empty the cache: called once more, the function reads what it has kept and no theta from the start.
# What it has kept has a graph that ends at the stand-ins for x and theta of that earlier run, so these carry a mark; or
# it was made by a solver, of tensors without a graph: then the error marks it. What was kept of a theta that needed no
# gradient then (an evaluation before the training) is marked too: an error once the same theta of it needs one.

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer._errors import ClosureError, ImplicitLayerWarning, ObjectiveError, warn
from implicitlayer.base._surroundings import PLAINLY
from implicitlayer.base._tree import flatten_with_names, is_data, tensors_in
from implicitlayer.equation._normalisation import NORMALISATIONS, wrong_third_derivative

CLOSED_OVER, OF_X = 1, 2  # the bits of what is not theta's
_LEAF = torch.zeros((), requires_grad=True)


def _number_of(tensor: torch.Tensor) -> int:
    node: Any = tensor.grad_fn
    return -1 if node is None else int(node._sequence_nr())


LAYOUT: Any = torch.Tensor.layout.__get__  # type: ignore[attr-defined]  # reads no entry
BORROWING: set[Any] = {torch.as_tensor, torch.asarray, torch.frombuffer}
DETACHING: set[Any] = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]


_numbers = itertools.count()


class Run:
    """The mark of the tensors that stand for x and theta in one run of a function of a layer.

    ``of``: the code that was run and the bits of the thetas that need a derivative, or of what a tensor was made of.
    """

    __slots__ = ("number", "of", "over")

    def __init__(self, of: tuple[Any, int] | None = None) -> None:
        self.number = next(_numbers)
        self.of = of
        self.over = False

    def holds_back(self, later: Run) -> bool:
        """Whether a derivative of a ``later`` run stops at what this one has left."""
        if not self.over or self.number >= later.number:
            return False
        return self.of is None or (
            later.of is not None and self.of[0] == later.of[0] and bool(self.of[1] & later.of[1])
        )

    def marked(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors, which stand for x or theta in this run."""
        for tensor in tensors:
            tensor.run_of_layer = self  # type: ignore[attr-defined]
        return tensors


def mark_kept(tensors: list[torch.Tensor], of: tuple[Any, int] | None = None) -> None:
    """Mark what a function has kept, so that it is known by it when the function is called again."""
    run = Run(of)
    run.over = True
    run.marked(tensors)


_MOST_NODES = 10_000  # a graph from outside is looked at so far: that of a cache is small


def refuse_kept(tensor: torch.Tensor, since: Run) -> None:
    """Raise for a tensor from outside whose graph ends in a run that was over before ``since``; see NOTE [state].

    ``since``: the first run of this search. Of what its own runs leave :class:`FirstRun` knows more, and a layer inside
    the function makes runs of its own.
    """
    # what was made outside may use any Function: its graph is looked at, and not judged
    ends = [getattr(node, "variable", None) for node in nodes_of([tensor], _MOST_NODES)]
    for leaf in [tensor, *ends]:
        run = getattr(leaf, "run_of_layer", None)
        if run is not None and run.holds_back(since):
            raise ClosureError(
                f"the objective reads a tensor of shape {tuple(tensor.shape)} that it made of x or theta in an earlier "
                "call and has kept (a cache): no gradient flows through it. Compute it anew in every run, or compute "
                "it before the layer and pass it as one more theta."
            )


@dataclass(frozen=True, eq=False)
class Sources:
    """The tensors among the arguments: one bit for x, one for each theta.

    ``needed``: the bits of what a derivative may be asked for, and of what is closed over. ``start``: the number of the
    first node of a graph that is made after this object.
    """

    bits: Sequence[int]
    needed: int
    theta: tuple[Any, ...]
    start: int
    num_x: int

    @classmethod
    def of(cls, theta: tuple[Any, ...], num_x: int, needed: Sequence[bool]) -> Sources:
        """Those of ``(x, *theta)``, where x has ``num_x`` tensors; ``needed``: which of theta need a derivative."""
        of_theta = list(map((4).__lshift__, range(len(needed))))
        bits = [OF_X] * num_x + of_theta
        wanted = OF_X | CLOSED_OVER | sum(itertools.compress(of_theta, needed))
        with _torch.without_modes():  # no business of an enclosing finder's
            start = _number_of(_LEAF.view(()))  # of the first node that is made from now on
        return cls(bits, wanted, theta, start, num_x)

    def made_since(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor may have been made since; nodes are numbered by thread, so it need not be so."""
        return tensor.grad_fn is not None and _number_of(tensor) >= self.start

    def by_id(self, leaves: Sequence[torch.Tensor]) -> dict[int, int]:
        """The bits of tensors in the places of the arguments, by their id; one may be in two places.

        Places are counted from the end, where theta is: a proximal operator gets a step beside its point.
        """
        found: dict[int, int] = {}
        for leaf, bit in zip(reversed(leaves), reversed(self.bits), strict=False):
            found[id(leaf)] = found.get(id(leaf), 0) | bit
        return found

    def name(self, bits: int) -> str:
        """The first theta of those in ``bits``."""
        if bits <= CLOSED_OVER + OF_X:
            return "x" if bits & OF_X else "a tensor that it closes over"
        bits &= ~(CLOSED_OVER + OF_X)
        pairs = zip(*flatten_with_names(self.theta, "theta"), strict=True)
        return [name for leaf, name in pairs if is_data(leaf)][(bits & -bits).bit_length() - 3]


@dataclass(frozen=True, eq=False)
class Reads:
    """What a run reads.

    Attributes:
        bits: those of theta.
        edges: how often it reads each tensor of theta, and each closed-over one that needs a derivative: edges of its
            graph, or under a transform the operations that it enters.
        outside: the tensors from outside.
    """

    bits: int
    edges: Sequence[int]
    outside: Sequence[torch.Tensor]


@dataclass(frozen=True, eq=False)
class FirstRun:
    """What the first run leaves for later ones to check; see NOTE [state].

    Attributes:
        sources: the arguments.
        reads: what was read.
        made: tensors that were made of theta and are the function's, as they are still alive, with the bits of their
            sources.
        again: what one more run at the same arguments reads.
        plain: whether no transform is at work.
    """

    sources: Sources
    reads: Reads
    made: Sequence[tuple[weakref.ref[torch.Tensor], int]]
    again: Callable[[], Reads]
    plain: bool

    def refuse_kept(self, met: set[int]) -> None:
        """Raise if a later run reads what the first one had made."""
        for ref, bits in self.made:
            tensor = ref()
            if tensor is not None and id(tensor) in met:
                mark_kept([tensor])
                raise ClosureError(
                    f"the objective reads a tensor of shape {tuple(tensor.shape)} that it made of "
                    f"{self.sources.name(bits)} in an earlier run and has kept (a cache): no gradient flows through "
                    "it. Compute it anew in every run, or compute it before the layer and pass it as one more theta."
                )

    def refuse_unread(self, edges: Sequence[int], random: bool) -> None:
        """Raise if a later run, whose graph has these edges into theta, reads less of it than the first."""
        missing = self._missing(self.reads.bits, edges, random)
        if missing:
            again = self.again()
            missing &= self._missing(self.reads.bits & ~again.bits, again.edges, random)
        if missing:
            known = set(map(id, self.reads.outside))
            mark_kept([tensor for tensor in again.outside if id(tensor) not in known])
            raise ClosureError(
                f"the objective read {self.sources.name(missing)} when it was first run, and does not any longer, or "
                "not everywhere: it has kept something that it made of it (a cache), and the gradient would miss that "
                "without a word. Compute it anew in every run, or compute it before the layer and pass it as one more "
                "theta. (Or a script or another thread reads it, which cannot be followed: compute in Python, in one.)"
            )

    def tell_nothing_read(self) -> None:
        """Warn, where the run at the solution reads no theta, if the first one read none that needs a derivative."""
        if not self.sources.needed >> 2 or self.reads.bits & ~OF_X:
            return
        warn(
            "the objective reads no theta that requires a gradient, so the gradient is zero. If it has kept what an "
            "earlier call made of theta (a cache), compute that anew in every run; if it reads the tensor in another "
            "way, write that in torch operations; if the solution does not depend on theta, leave theta out.",
            ImplicitLayerWarning,
            "no theta is read",
        )

    def _missing(self, read: int, edges: Sequence[int], random: bool) -> int:
        """The bits of what was ``read`` at first and has no edge now, or fewer."""
        missing, bits = 0, itertools.chain(self.sources.bits[self.sources.num_x :], itertools.repeat(CLOSED_OVER))
        for now, before, bit in zip(edges, self.reads.edges, bits, strict=False):
            if (not now and read & bit) or (now < before and not random):
                missing |= bit
        return missing


def refuse_hidden_tensors(
    function: Callable[[list[torch.Tensor], list[torch.Tensor]], list[torch.Tensor]],
    x: list[torch.Tensor],
    theta: list[torch.Tensor],
) -> None:
    """Raise if ``function(x, theta)`` depends on a tensor that requires a gradient and is not an argument.

    Catches what the finder cannot see: a tensor read on a branch that was not taken at ``init``, or by a scripted
    module or an extension. Inside a torch.func level the arguments' own graph is on that level, so whatever graph the
    value has outside of it comes from elsewhere.
    """
    with torch.enable_grad():
        vjp: Callable[..., Any] = torch.func.vjp  # torch annotates its results as two or three values
        values, _ = vjp(lambda x_: function(x_, theta), x)
    for value in values:
        if value.requires_grad:
            raise unseen(next(iter(leaves_of([value])), None))


def refuse_unfollowed(value: Any, known: Collection[int], again: Callable[[], Any]) -> None:
    """Raise if the graph of ``value``, where nothing is known to need a derivative, leads to what needs one."""
    unknown = set(edges_into(tensors_in((value,), []))).difference(known)
    # a leaf that the function makes is another one in every run
    if unknown and not unknown.isdisjoint(edges_into(tensors_in((again(),), []))):
        raise unseen(None)


def other_leaves(
    leaves: Sequence[torch.Tensor], known: Sequence[torch.Tensor], again: Callable[[], Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """Those of the ``leaves`` of a run of a function that are neither ``known`` nor made by the function itself.

    A leaf that the function makes, to take a derivative, is another one when it is run ``again``.
    """
    ids = {id(tensor) for tensor in known}
    others = [leaf for leaf in leaves if id(leaf) not in ids]
    if not others:
        return others
    same = {id(leaf) for leaf in leaves_of(again())}
    return [leaf for leaf in others if id(leaf) in same]


def unseen(leaf: torch.Tensor | None) -> ClosureError:
    """The error for a leaf that the finder has not seen."""
    shape = "" if leaf is None else f" of shape {tuple(leaf.shape)}"
    return ClosureError(
        f"the objective reads a closed-over tensor{shape} that requires a gradient, in a way that could not be "
        "followed (a branch not taken at init, a scripted or traced function, an extension, another thread). Pass it "
        "to the layer as one more theta."
    )


def _refuse_once_differentiable(function: Any) -> None:
    """Raise for a Function marked once_differentiable: torch takes its second derivative as zero."""
    if function.backward.__code__.co_filename == _ONCE.__code__.co_filename:
        raise ObjectiveError(
            f"the objective uses the autograd.Function {function.__name__}, which is once_differentiable: torch would "
            f"take its second derivative as zero in silence, and the gradient would be wrong. {PLAINLY}"
        )


_ONCE = torch.autograd.function.once_differentiable


def nodes_of(values: Sequence[torch.Tensor], most: int | None = None) -> list[Any]:
    """Every node of the graph of ``values``, once, but no more than about ``most``."""
    found: list[Any] = [value.grad_fn for value in values if value.grad_fn is not None]
    seen = set(found)
    for node in found:  # which grows
        if most is not None and len(found) > most:
            break
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


_GRAD_FN = attrgetter("grad_fn")
_END: Any = type(_LEAF.view(()).grad_fn.next_functions[0][0])  # type: ignore[union-attr]


def edges_into(values: Sequence[torch.Tensor], start: int = 0, stop: Sequence[torch.Tensor] = ()) -> dict[Any, int]:
    """How many edges of the graph of ``values`` end in each leaf, by its id, and in each node made before ``start``.

    Nodes of ``stop`` are left out.
    """
    found: list[Any] = list(filter(None, map(_GRAD_FN, values)))
    seen, edges = {*found, *map(_GRAD_FN, stop)}, dict[Any, int]()
    for node in found:  # which grows
        for child, _ in node.next_functions:
            if type(child) is _END:
                edges[id(child.variable)] = edges.get(id(child.variable), 0) + 1
            elif child is not None and child._sequence_nr() < start:
                edges[child] = edges.get(child, 0) + 1
            elif child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return edges


def leaves_of(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The leaf tensors that the graph of ``values`` reaches."""
    return ends_of(values)[0]


def ends_of(values: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], str, list[Any]]:
    """Of the graph of ``values``: its leaves, a flaw of its third derivative, and the nodes of custom Functions."""
    leaves = [value for value in values if value.grad_fn is None and value.requires_grad]
    flaw, custom = "", []
    for node in nodes_of(values):
        kind = type(node)
        function = getattr(kind, "_forward_cls", None)
        if function is not None:
            _refuse_once_differentiable(function)
            if not function.__module__.startswith(("torch.", "implicitlayer.")):
                custom.append(node)
        elif kind is _END:
            leaves.append(node.variable)
        elif kind.__name__.rstrip("0123456789") in NORMALISATIONS:
            flaw = flaw or wrong_third_derivative(node)
    return leaves, flaw, custom


def refuse_backward_without_graph(custom: list[Any], value: torch.Tensor, points: Sequence[torch.Tensor]) -> None:
    """Raise for a custom Function whose backward is no torch code: torch takes its second derivative as zero.

    What enters it has a graph, and what leaves it, which is not zero, has none.
    """
    met: list[Any] = []

    def look(node: Any, leaving: Sequence[Any], entering: Sequence[Any]) -> None:
        gradients = [g for g in leaving if g is not None]
        if any(g is not None and g.requires_grad for g in entering) and any(map(torch.any, gradients)):
            met.extend([] if any(g.requires_grad for g in gradients) else [type(node)._forward_cls.__name__])

    hooks = [node.register_hook(partial(look, node)) for node in custom]
    try:
        with torch.enable_grad():
            torch.autograd.grad(value.sum(), points, create_graph=True, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    if met:
        raise ObjectiveError(
            f"the objective uses the autograd.Function {met[0]}, whose backward leaves no graph (NumPy, no_grad(), "
            "detach()): its second derivative would be taken as zero in silence, and the gradient would be wrong. "
            f"Write the backward in torch operations of what it is given, or as a Function of its own. {PLAINLY}"
        )


def changed_since(what: str) -> ClosureError:
    """The error of an objective that is another one in backward than it was when the layer was called."""
    return ClosureError(
        f"since the layer was called, {what}: the gradient would be that of another problem. Pass it to the layer as "
        "one more theta (a closure in a loop reads the data of the last round by the time of backward)."
    )
