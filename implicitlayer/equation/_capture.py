"""Closed-over tensors: found by running the function once, then fed back as explicit arguments."""

# A tensor that an objective reads from its closure, a global or a module would get no gradient: the Function behind
# the layer sees only its arguments. One pass under a TorchFunctionMode sees every tensor that enters an operation;
# what is neither an argument nor made inside comes from outside. Those that need a derivative become extra theta, and
# a second mode swaps their values in wherever the function is run.

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from implicitlayer import _torch
from implicitlayer._errors import ClosureError
from implicitlayer.base._surroundings import ReadingMode, draws_since, plain_surroundings
from implicitlayer.base._tree import flatten, is_data, places_of_data, unflatten
from implicitlayer.equation._normalisation import PLAIN
from implicitlayer.equation._state import (
    BORROWING,
    DETACHING,
    LAYOUT,
    NUMBERS,
    NUMPY,
    FirstRun,
    Run,
    Sources,
    refuse_kept,
    refuse_numbers,
    refuse_numpy,
)


def needs_derivative(tensor: torch.Tensor) -> bool:
    """Whether a derivative with respect to ``tensor`` may be asked for, or a transform has wrapped it."""
    return needing((tensor,))[0]


def needing(tensors: Iterable[torch.Tensor]) -> list[bool]:
    """The same of each of ``tensors``."""
    forward = _torch.forward_mode_active()
    with _torch.without_modes():  # the tensors themselves, not what an enclosing layer has swapped in for them
        return [_torch.is_wrapped(t) or t.requires_grad or (forward and _has_tangent(t)) for t in tensors]


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
        wanted: whether a derivative may be asked for, in one of them or in an argument but the first.
        normalises: whether the function calls a normalisation of torch.
        draws: whether the function draws random numbers from torch's generators.
        checkpoints: whether it saves tensors by hooks of its own, as torch.utils.checkpoint does.
        borrows: whether it makes tensors of arrays that others may write to.
        stood: whether a plain graph was made in which they stand for themselves; see NOTE [leaves].
        constants: all other tensors from outside, with their versions; see NOTE [constants].
        settled: whether a second run has confirmed the constants.
        first: what the first run leaves for the second to check; see NOTE [state].
    """

    wanted: bool = False
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

    def settle(self, met: set[int], read: int) -> None:
        """Keep the constants that a second run has met; ``read``: the theta that it has read."""
        kept = tuple((tensor, version) for tensor, version in self.constants if id(tensor) in met)
        self.borrows |= len(kept) < len(self.constants)
        self.constants, self.settled = kept, True
        first, self.first = self.first, None  # it holds the arguments of the call
        if first is not None:
            first.check(met, read)

    def confirm(self, theta: Sequence[torch.Tensor], reached: Iterable[torch.Tensor]) -> None:
        """The same of a run whose graph reaches these tensors, where nothing is to be watched."""
        if self.first is None:
            return
        ids, read = {id(tensor) for tensor in reached}, 0
        for tensor, bits in zip(theta, self.first.sources.bits[self.first.sources.num_x :], strict=False):
            read |= bits if id(tensor) in ids else 0
        self.settle(set(), read)

    def refuse_changed(self, met: set[int] | None = None) -> None:
        """Raise if a constant has been changed in place, or is none of those that a later run has ``met``."""
        for tensor, version in self.constants:
            changed = tensor._version != version
            if changed or (met is not None and id(tensor) not in met):
                raise ClosureError(
                    f"since the layer was called, a tensor of shape {tuple(tensor.shape)} that the objective closes "
                    "over "
                    + ("was changed in place" if changed else "was replaced by another one, or is read no longer")
                    + ": the gradient would be that of another problem. Pass it to the layer as one more theta (a "
                    "closure in a loop reads the data of the last round by the time of backward)."
                )


def find_closed_over(
    function: Callable[..., Any], args: tuple[Any, ...], check: Callable[[Any], object] | None = None
) -> ClosedOver:
    """Tensors that ``function(*args)`` reads from outside and that need a derivative, in order of first use.

    What the function returns is handed to ``check``, so that nonsense is found before a long solve.

    It is run on aliases of the tensors in ``args``: one that is closed over as well is found.
    """
    everything, spec = flatten(args)
    places = places_of_data(everything)
    leaves = [everything[i] for i in places]
    num_x = bisect_left(places, len(flatten(args[0])[0]))
    plain = not plainly_impossible()
    needed = needing(leaves[num_x:])
    sources = Sources.of(args[1:], num_x, needed)
    attached = [plain and (i < num_x or bit > 0) for i, bit in enumerate(sources.bits)]

    since = Run()

    def run(shift: float = 0.0) -> tuple[_Finder, Any]:
        aliases: dict[int, torch.Tensor] = {}
        mark = Run()
        for leaf, own in zip(leaves, attached, strict=True):
            # a graph cannot save a tensor of inference mode
            source = leaf.clone() if leaf.is_inference() and not torch.is_inference_mode_enabled() else leaf
            alias = mark.marked(source.detach().requires_grad_()) if own else source.view_as(source)
            aliases[id(leaf)] = alias
        given = [aliases[id(leaf)] for leaf in leaves]
        aliased = list(everything)
        for place, alias in zip(places, given, strict=True):
            aliased[place] = alias
        finder = _Finder(given, sources.by_id(given), since, shift)
        if check is not None:
            finder.touched = {*finder.bits, *map(id, given[:num_x])}
        if not plain:
            with torch.no_grad(), finder:
                return finder, function(*unflatten(aliased, spec))
        # the graph goes no further than the aliases; a function that takes derivatives of its own needs one
        try:
            with plain_surroundings(leaves), torch.enable_grad(), finder:
                return finder, function(*unflatten(aliased, spec))
        finally:
            mark.over = True

    drawn = draws_since(leaves)
    first, value = run()
    draws = drawn()
    if check is not None:
        check(value)
    if first.numbers and plain and check is not None:
        refuse_numbers(sources, first.numbers, value, run)
    outside = needing(first.outside) if first.outside else []
    found = ClosedOver([t for t, need in zip(first.outside, outside, strict=True) if need])
    found.wanted = any(needed) or bool(found)
    found.normalises, found.draws = first.normalises, draws
    found.checkpoints, found.borrows = first.checkpoints and plain, first.borrows
    constants = [t for t, need in zip(first.outside, outside, strict=True) if not (need or t.is_inference())]
    if check is not None and found.wanted:
        first.refuse_changing({id(tensor) for tensor in constants})
    found.constants = tuple([(t, t._version) for t in constants])
    if found and any(_torch.is_wrapped(t) or sources.made_since(t) for t in found):
        # A vmap inside the function hands its results out unseen. They are new tensors in a second run, while those
        # from outside are the same (the first run's are alive, so no id is used twice).
        again = {id(tensor) for tensor in run()[0].outside}
        found[:] = [tensor for tensor in found if id(tensor) in again]
    if plain and check is not None:
        del value  # and with it the graph: of what the run has made, the function's own is what lives on
        found.first = FirstRun(sources, first.read, first.made_of_theta(), lambda: run()[0].read)
        if found.first.made:  # something was kept: before the solver meets it, one more run tells whether it is read
            second, _ = run()
            found.first.check(set(second.known), second.read)
    return found


def plainly_impossible() -> bool:
    """Whether a transform or forward mode is at work."""
    return _torch.transforms_active() or _torch.forward_mode_active()


def announce(tensor: Any) -> Any:
    """Let an enclosing finder see ``tensor``: our own Functions take tensors past every TorchFunctionMode."""
    if is_data(tensor) and _torch.num_modes() > 0:
        alias: torch.Tensor = tensor.view_as(tensor)
        return alias
    return tensor


def _has_tangent(tensor: torch.Tensor) -> bool:
    return _torch.forward_mode_active() and forward_ad.unpack_dual(tensor).tangent is not None


def _tensors_in(values: Iterable[Any], found: list[torch.Tensor]) -> list[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            _tensors_in(value, found)
        elif isinstance(value, dict):
            _tensors_in(value.values(), found)
    return found


def tensors_entering(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> list[torch.Tensor]:
    """The tensors among the arguments of an operation; most are given one by one."""
    found: list[torch.Tensor] = []
    for value in args:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            _tensors_in((value,), found)
    return _tensors_in(kwargs.values(), found) if kwargs else found


class _Finder(ReadingMode):
    """Collects tensors that enter an operation without being known; keeps all alive, so that ids stay unique."""

    def __init__(self, known: Sequence[torch.Tensor], bits: dict[int, int], since: Run, shift: float = 0.0) -> None:
        super().__init__()
        self.since = since
        self.attached: dict[int, torch.Tensor] = {}  # those from outside that have a graph and were not looked at
        self.known = {id(tensor): tensor for tensor in known}
        self.bits = bits
        self.touched: set[int] = set()  # what must not go to NumPy, and all that is made of it, detached or not
        self.read = 0
        self.numbers = 0
        self.shift = shift
        self.outside: list[torch.Tensor] = []
        self.versions: list[int] = []  # of these, when they were met
        self.level = _torch.current_level()
        self.normalises = self.checkpoints = self.borrows = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == LAYOUT:
            return func(*args)
        if _torch.saving_hooks(True) is not None:
            self.checkpoints = True
        entering = tensors_entering(args, kwargs)
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
        source, touches = 0, False
        for tensor in entering:
            source |= self.bits.get(id(tensor), 0)
            touches = touches or id(tensor) in self.touched
        self.read |= source
        if touches and func in NUMPY:
            raise refuse_numpy(entering[0])
        if func in NUMBERS:
            self.numbers |= source
            return NUMBERS[func](entering[0].detach(), self.shift if source else 0.0)
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, torch.Tensor) else _tensors_in((result,), []):
            self.known.setdefault(id(tensor), tensor)
            if touches:
                self.touched.add(id(tensor))
            if source and func not in DETACHING:
                self.bits.setdefault(id(tensor), source)
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

    def made_of_theta(self) -> list[tuple[weakref.ref[torch.Tensor], int]]:
        """The tensors that were made of theta and that others hold, and of which; they are held here no longer."""
        made = [(weakref.ref(self.known[key]), bits) for key, bits in self.bits.items()]
        self.known.clear()
        return [pair for pair in made if pair[0]() is not None]

    def meet(self, tensor: torch.Tensor) -> None:
        """A tensor from outside, or one that a transform inside the function has wrapped."""
        if _torch.level_of(tensor) <= self.level:
            if tensor.grad_fn is not None or hasattr(tensor, "run_of_layer"):
                self.attached[id(tensor)] = tensor
            self.outside.append(tensor)
            self.versions.append(-1 if tensor.is_inference() else tensor._version)
            return
        inside = tensor
        while _torch.level_of(tensor) > self.level:
            tensor = _torch.unwrapped(tensor)
        if id(tensor) not in self.known and needs_derivative(tensor):
            raise ClosureError(
                f"the objective hands a closed-over tensor of shape {tuple(tensor.shape)} that requires a gradient to "
                f"a transform of its own (where it arrives with shape {tuple(inside.shape)}). Pass it to the layer as "
                "one more theta."
            )
