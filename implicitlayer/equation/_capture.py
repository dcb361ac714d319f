"""Closed-over tensors: found by running the function once, then fed back as explicit arguments."""

# A tensor that an objective reads from its closure, a global or a module would get no gradient: the Function behind
# the layer sees only its arguments. One pass under a TorchFunctionMode sees every tensor that enters an operation;
# what is neither an argument nor made inside comes from outside. Those that need a derivative become extra theta, and
# a second mode swaps their values in wherever the function is run.

from __future__ import annotations

import gc
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress, repeat
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer._errors import ClosureError
from implicitlayer.base._surroundings import ReadingMode, plain_surroundings, random_states
from implicitlayer.base._tree import flatten, places_of_data, tensors_in, unflatten
from implicitlayer.equation._normalisation import PLAIN
from implicitlayer.equation._numbers import NUMBERS, NUMPY, inside_a_function, moved, refuse_numbers, refuse_numpy
from implicitlayer.equation._state import (
    BORROWING,
    CLOSED_OVER,
    DETACHING,
    LAYOUT,
    OF_X,
    FirstRun,
    Reads,
    Run,
    Sources,
    changed_since,
    edges_into,
    mark_kept,
    refuse_kept,
    refuse_unfollowed,
)


def needing(tensors: Iterable[torch.Tensor]) -> list[bool]:
    """Of each tensor, whether a derivative with respect to it may be asked for, or a transform has wrapped it."""
    forward = _torch.forward_level() >= 0
    with _torch.without_modes():  # the tensors themselves, not what an enclosing layer has swapped in for them
        return [_torch.is_wrapped(t) or t.requires_grad or (forward and _torch.has_tangent(t)) for t in tensors]


def derivatives_possible() -> bool:
    """Whether anything that is computed now can be differentiated or is being transformed."""
    return torch.is_grad_enabled() or plainly_impossible()


# NOTE [leaves]: a mode swaps what torch's functions read. It does not see what a custom Function hands to autograd, nor
# what a checkpoint reads when it runs its part again. Plain autograd needs no swap for a leaf: the graph ends there,
# and a derivative can be asked for there. Other tensors have a graph that leads on, perhaps into a second one that was
# found, and would be counted twice; hooks of a leaf would run twice. These are swapped.
#
# NOTE [constants]: a backward may run it again, perhaps long after the call. A closure then reads what its names
# mean by that time: in a loop over data sets, the last one. So the tensors from outside that need no derivative are
# remembered with their versions, and a later run that does not read them, or finds them changed, is an error. Those
# that the first run after the finder's does not meet were made by the function itself (torch.from_numpy is not seen).


class ClosedOver(list[torch.Tensor]):
    """Closed-over tensors that need a derivative.

    Attributes:
        needs_derivative: whether a derivative may be asked for, in one of them or in an argument but the first.
        normalises: whether the function calls a normalisation of torch.
        draws: whether the function draws random numbers from torch's generators.
        checkpoints: whether it saves tensors by hooks of its own, as torch.utils.checkpoint does.
        borrows: whether it makes tensors of arrays that others may write to.
        stood: whether a plain graph was made in which they stand for themselves; see NOTE [leaves].
        constants: all other tensors from outside, with their versions; see NOTE [constants].
        settled: whether a second run has confirmed the constants.
        first: what the first run leaves for the second to check; see NOTE [state].
    """

    needs_derivative: bool = False
    normalises: bool = False
    draws: bool = False
    checkpoints: bool = False
    borrows: bool = False
    stood: bool = False
    constants: tuple[tuple[torch.Tensor, int], ...] = ()
    settled: bool = False
    first: FirstRun | None = None

    def standing(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors, where each of ``values`` is one and stands for itself, else none; see NOTE [leaves]."""
        pairs = zip(self, values, strict=True)
        stand = all(own is value and own.is_leaf and not own._backward_hooks for own, value in pairs)
        return list(self) if stand else []

    def settle(self, met: set[int]) -> None:
        """Keep the constants that a second run has met."""
        kept = tuple((tensor, version) for tensor, version in self.constants if id(tensor) in met)
        self.borrows |= len(kept) < len(self.constants)
        self.constants, self.settled = kept, True
        if self.first is not None:
            self.first.refuse_kept(met)

    def confirm(self, theta: Sequence[torch.Tensor], edges: dict[Any, int]) -> None:
        """Check what the run at the solution reads of theta, by the edges of its graph; see NOTE [state]."""
        if self.first is not None and self.first.plain:
            first, self.first = self.first, None  # it holds the arguments of the call
            found = list(map(edges.get, map(id, theta), repeat(0)))
            first.refuse_unread(found, self.draws)
            if not (self or any(found)):
                first.tell_nothing_read()

    def confirm_under_transform(self) -> None:
        """Check what one more run at the arguments of the first reads; see NOTE [state]."""
        first, self.first = self.first, None
        if first is not None and self.needs_derivative:
            first.refuse_unread(first.again().edges, self.draws)

    def refuse_changed(self, met: set[int] | None = None) -> None:
        """Raise if a constant has been changed in place, or is none of those that a later run has ``met``."""
        for tensor, version in self.constants:
            changed = tensor._version != version
            if changed or (met is not None and id(tensor) not in met):
                what = "was changed in place" if changed else "was replaced by another one, or is read no longer"
                raise changed_since(f"a tensor of shape {tuple(tensor.shape)} that the objective closes over {what}")


def find_closed_over(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    check: Callable[[Any], object] | None = None,
    shown: Callable[..., Any] | None = None,
) -> ClosedOver:
    """Tensors that ``function(*args)`` reads from outside and that need a derivative, in order of first use.

    What the function returns is handed to ``check``, so that nonsense is found before a long solve. ``shown(*args)``:
    values in which every number shows that is taken out of theta, where those of the function itself may hide it.

    It is run on aliases of the tensors in ``args``: one that is closed over as well is found.
    """
    search = _Search(function, args, check is not None)
    states = random_states(search.leaves)
    first, value = search.run()
    with _torch.without_modes():  # no business of an enclosing finder's
        draws = not all(map(torch.equal, states, random_states(search.leaves)))
    if check is not None:
        check(value)
        # an objective's without any graph has an error of its own
        constant = search.plain and isinstance(value, torch.Tensor) and not (value.ndim or value.requires_grad)
        if first.numbers and not constant:
            of = search if shown is None else _Search(shown, args, True)
            refuse_numbers(of.sources, first.numbers, of.run)
    found, constants = ClosedOver(), []
    for tensor, need in zip(first.outside, needing(first.outside) if first.outside else (), strict=True):
        if need:
            found.append(tensor)
        elif not tensor.is_inference():
            constants.append((tensor, tensor._version))
    found.needs_derivative = any(search.needed) or bool(found)
    found.normalises, found.draws = first.normalises, draws
    found.checkpoints, found.borrows = first.checkpoints and search.plain, first.borrows
    if check is not None and found.needs_derivative and constants:
        first.refuse_changing({id(tensor) for tensor, _ in constants})
    found.constants = tuple(constants)
    if first.handed or (found and any(_torch.is_wrapped(t) or search.sources.made_since(t) for t in found)):
        # A transform inside the function hands its results out unseen, or to another one. They are new tensors in a
        # second run, while those from outside are the same (the first run's are alive, so no id is used twice).
        second = search.run()[0]
        again = {id(tensor) for tensor in (*second.outside, *(tensor for tensor, _ in second.handed))}
        found[:] = [tensor for tensor in found if id(tensor) in again]
        for tensor, shape in first.handed:
            if id(tensor) in again:
                raise ClosureError(
                    f"the objective hands a closed-over tensor of shape {tuple(tensor.shape)} that requires a gradient "
                    f"to a transform of its own (where it arrives with shape {shape}). Pass it to the layer as one "
                    "more theta."
                )
    if check is not None:
        if search.plain and not found.needs_derivative:
            refuse_unfollowed(value, first.known, lambda: search.run()[1])
        reads = search.reads(first, value, found)
        del value  # and with it the graph: of what the run has made, the function's own is what lives on
        found.first = _left(search, first, reads, list(found), draws)
    return found


def _left(search: _Search, first: _Finder, reads: Reads, hidden: list[torch.Tensor], draws: bool) -> FirstRun:
    """What the first run leaves for later ones to check."""
    made = first.made_of_theta(search.code)
    left = FirstRun(search.sources, reads, made, lambda: search.reads(*search.run(), hidden), search.plain)
    if left.made:  # something was kept: before the solver meets it, one more run tells whether it is read
        second, value = search.run()
        left.refuse_kept(set(second.known))
        left.refuse_unread(search.reads(second, value, hidden).edges, draws)
    return left


def run_undifferentiated(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """``function(*args)`` where nothing is differentiated: what it keeps of theta is marked; see NOTE [state]."""
    search = _Search(function, args, False, derivatives=False)
    finder, value = search.run()
    finder.made_of_theta(search.code)
    return value


class _Search:
    """A function and its arguments, to be run on aliases of their tensors, with a mode that sees what it reads.

    Attributes:
        plain: whether no transform and no forward mode is at work.
        needed: which tensors of theta need a derivative.
    """

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], checked: bool, *, derivatives: bool = True
    ) -> None:
        self.function, self.checked = function, checked
        self.everything, self.spec = flatten(args)
        self.places = places_of_data(self.everything)
        self.leaves = [self.everything[i] for i in self.places]
        self.num_x = bisect_left(self.places, len(flatten(args[0])[0]))
        self.plain = not plainly_impossible()
        theta = self.leaves[self.num_x :]
        self.needed = needing(theta) if derivatives else [False] * len(theta)
        self.sources = Sources.of(args[1:], self.num_x, self.needed)
        self.code = getattr(function, "__code__", type(function))
        self.since = Run((self.code, self.sources.needed & ~OF_X))

    def run(self, shift: float = 0.0, move: float = 0.0) -> tuple[_Finder, Any]:
        """What one run reads, and its value.

        ``shift``: the relative change of numbers taken out of theta; ``move``: its distance in units of 1 + |x|.
        """
        mark, given = Run(), list(self.everything)
        known: list[torch.Tensor] = []
        attached = []
        for i, leaf in enumerate(self.leaves):
            # a graph cannot save a tensor of inference mode
            source = leaf.clone() if leaf.is_inference() and not torch.is_inference_mode_enabled() else leaf
            if move and i < self.num_x:
                source = moved(source, move)
            if self.plain and self.sources.bits[i] & self.sources.needed:
                known.append(source.detach().requires_grad_())
                attached.append(known[-1])
            else:
                known.append(source.view_as(source))
            given[self.places[i]] = known[-1]
        mark.marked(attached)
        finder = _Finder(known, self.sources.by_id(known), self.sources.needed, self.since, shift)
        finder.plain, finder.given = self.plain, list(map(id, known[self.num_x :]))
        if self.checked:
            finder.touched = set(compress(finder.bits, map(finder.needed.__and__, finder.bits.values())))
        if not self.plain:
            with torch.no_grad(), finder:
                return finder, self.function(*unflatten(given, self.spec))
        # the graph goes no further than the aliases; a function that takes derivatives of its own needs one
        try:
            with plain_surroundings(self.leaves), torch.enable_grad(), finder:
                return finder, self.function(*unflatten(given, self.spec))
        finally:
            mark.over = True

    def reads(self, finder: _Finder, value: Any, hidden: Sequence[torch.Tensor]) -> Reads:
        """What a run that gave ``value`` has read of theta, and of ``hidden``, which it closes over."""
        edges: dict[Any, int] = finder.entered
        ends: Iterable[Any] = map(id, hidden)
        if self.plain:
            values = (value,) if isinstance(value, torch.Tensor) else tensors_in((value,), [])
            edges = edges_into(values, self.sources.start)
            ends = [id(tensor) if tensor.is_leaf else tensor.grad_fn for tensor in hidden]
        return Reads(finder.read, list(map(edges.get, chain(finder.given, ends), repeat(0))), finder.outside)


def plainly_impossible() -> bool:
    """Whether a transform or forward mode is at work."""
    return _torch.transforms_active() or _torch.forward_level() >= 0


class _Finder(ReadingMode):
    """Collects tensors that enter an operation without being known; keeps all alive, so that ids stay unique."""

    def __init__(
        self, known: Sequence[torch.Tensor], bits: dict[int, int], needed: int, since: Run, shift: float = 0.0
    ) -> None:
        super().__init__()
        self.since = since
        self.attached: dict[int, torch.Tensor] = {}  # those from outside that have a graph and were not looked at
        self.known = dict(zip(map(id, known), known, strict=True))
        self.bits, self.needed = bits, needed
        self.plain = True
        self.given: Sequence[int] = ()  # ids of the stand-ins for theta
        self.entered: dict[int, int] = {}  # under a transform: how many operations each tensor from outside enters
        self.touched: set[int] = set()  # what must not go to NumPy, and all that is made of it, detached or not
        self.read = 0
        self.numbers = 0
        self.shift = shift
        self.handed: list[tuple[torch.Tensor, tuple[int, ...]]] = []  # to a transform inside, and the shape in there
        self.outside: list[torch.Tensor] = []
        self.versions: list[int] = []  # of these, when they were met
        self.level = _torch.current_level() or 0
        self.normalises = self.checkpoints = self.borrows = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == LAYOUT:
            return func(*args)
        if _torch.saving_hooks(True) is not None:
            self.checkpoints = True
        entering = tensors_in((*args, *kwargs.values()) if kwargs else args, [])
        if func in BORROWING and not isinstance(args[0] if args else None, float | int | torch.Tensor):
            self.borrows = True
        if func in PLAIN:
            self.normalises = True
            PLAIN[func](*args, **(kwargs or {}))  # for its checks
        if func is torch.Tensor.add_ and id(args[0]) not in self.known and not args[0].is_floating_point():
            return args[0]  # a counter (BatchNorm has one): this run does not count, and transforms forbid the write
        for tensor in entering:
            if id(tensor) not in self.known:
                self.known[id(tensor)] = tensor
                self.meet(tensor)
            if id(tensor) in self.attached and func not in DETACHING:  # what is detached by hand may be kept
                refuse_kept(self.attached.pop(id(tensor)), self.since)
        of, touches = 0, False
        for tensor in entering:
            of |= self.bits.get(id(tensor), 0)
            touches = touches or id(tensor) in self.touched
            if not self.plain:
                self.entered[id(tensor)] = self.entered.get(id(tensor), 0) + 1
        source = of & self.needed
        self.read |= source
        if touches and func in NUMPY and not inside_a_function(_Search.run):
            raise refuse_numpy(entering[0])
        if func in NUMBERS:
            if not touches and entering and entering[0].requires_grad:
                source = CLOSED_OVER
            watched = source if source and not inside_a_function(_Search.run) else 0
            self.numbers |= watched
            shift = 0.0 if not watched else -self.shift if watched == OF_X else self.shift
            return NUMBERS[func](entering[0].detach(), shift)
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, torch.Tensor) else tensors_in((result,), []):
            self.known.setdefault(id(tensor), tensor)
            if touches:
                self.touched.add(id(tensor))
            if of and func not in DETACHING:
                self.bits.setdefault(id(tensor), of)
        return result

    def refuse_changing(self, constants: set[int]) -> None:
        """Raise if the function itself has changed one of ``constants`` in place."""
        for tensor, version in zip(self.outside, self.versions, strict=True):
            if id(tensor) in constants and tensor._version != version:
                raise ClosureError(
                    f"the objective itself changes a tensor of shape {tuple(tensor.shape)} that it closes over, in "
                    "place: it is another function at every evaluation, and has no derivative. Modules in train mode "
                    "do that (spectral norm, buffers that count or average): call .eval() on the module, or keep such "
                    "a tensor out of the objective."
                )

    def made_of_theta(self, code: Any) -> list[tuple[weakref.ref[torch.Tensor], int]]:
        """The tensors that were made of theta and that others hold, and of which; they are held here no longer.

        Those of a theta that needs no derivative are only marked, as kept by ``code``; see NOTE [state].
        """
        own = set(map(id, self.outside))
        pairs = self.bits.items()
        made = [(weakref.ref(self.known[key]), bits) for key, bits in pairs if bits != OF_X and key not in own]
        self.known.clear()
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and any(ref() is not None for ref, _ in made):
            gc.collect()  # what a cycle holds is alive on some processes only, and all must go on in the same way
        alive = [(tensor, ref, bits) for ref, bits in made if (tensor := ref()) is not None]
        if not alive:
            return []
        for tensor, _, bits in alive:
            if not bits & self.needed & ~OF_X:
                mark_kept([tensor], (code, bits & ~OF_X))
        return [(ref, bits) for _, ref, bits in alive if bits & self.needed & ~OF_X]

    def meet(self, tensor: torch.Tensor) -> None:
        """A tensor from outside, or one that a transform inside the function has wrapped."""
        if _torch.level_of(tensor) <= self.level:
            if tensor.grad_fn is not None or hasattr(tensor, "run_of_layer"):
                self.attached[id(tensor)] = tensor
            self.outside.append(tensor)
            if not self.plain and needing((tensor,))[0]:  # what is made of it here has no graph to it
                self.bits[id(tensor)] = CLOSED_OVER
            self.versions.append(-1 if tensor.is_inference() else tensor._version)
            return
        inside = tensor
        while _torch.level_of(tensor) > self.level:
            tensor = _torch.unwrapped(tensor)
        if id(tensor) not in self.known and needing((tensor,))[0]:
            self.known[id(tensor)] = tensor
            self.handed.append((tensor, tuple(inside.shape)))
