"""Where tensors leave the autograd graph: one run of a function, watched call by call."""

# A TorchFunctionMode sees every torch call of the objective, also .item(), .data and float(). For each tensor it keeps
# which of the watched ones reach it through a graph ("live") and which have anything to do with it ("touched"). A call
# that takes live tensors and returns nothing with a graph is a cut. A cut is a suspicion, not a verdict: that a value
# is printed or compared does no harm. Derivatives decide, and the cut only says where to look.

from __future__ import annotations

import inspect
import itertools
import linecache
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from implicitlayer import _torch
from implicitlayer._torch import pytree
from implicitlayer.equation._state import nodes_of

R = TypeVar("R")
Sources = frozenset[int]
NOTHING: Sources = frozenset()

# "exit": a value goes on without its graph; "integers": it goes on as integers, which have no derivative; "numpy": the
# layer cannot follow; "branch": only a truth value leaves, which decides what is computed but carries no number.
CutKind = Literal["exit", "copy", "no_grad", "integers", "numpy", "branch"]

_NUMPY = {"numpy", "__array__", "__dlpack__"}
_EXITS = {"__float__": "float()", "__int__": "int()", "__index__": "int()", "__complex__": "complex()"}
_EXITS |= {name: f".{name}()" for name in ("item", "tolist", "detach", "detach_")}
_COPIES = {"tensor", "as_tensor", "asarray", "new_tensor", "scalar_tensor"}
_TRUTH = {"__bool__", "equal", "allclose", "is_nonzero", "__contains__"}
_SKIPPED = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
_MAX_TEXT = 80  # characters of a source line that are shown
_MAX_OUTPUTS = 200  # intermediate results kept for the search of the call where a derivative becomes zero


@dataclass(frozen=True)
class SourceLine:
    """A line of the user's code: file name, number from 1, and its text ("" if the source is not at hand)."""

    filename: str
    number: int
    text: str

    def __str__(self) -> str:
        place = f"{Path(self.filename).name}:{self.number}"
        return f"{place}: `{self.text}`" if self.text else place


@dataclass(frozen=True)
class Call:
    """A torch call that watched tensors enter: its text or name, where it stands, and which tensors enter it live."""

    name: str
    where: SourceLine | None
    sources: Sources
    kind: CutKind = "exit"

    def __str__(self) -> str:
        return f"`{self.name}`" + (f" ({self.where})" if self.where is not None else "")


class Tracer(TorchFunctionMode):
    """Watches ``roots`` through one run; see the head of this file.

    Args:
        roots: the tensors that the function gets.
        leaves: for each root the leaf of autograd that it is a copy of.

    Attributes:
        first_reads: for every root that is read, the call that reads it first.
        cuts: calls where live roots leave their graph, in order.
        numpy: the first call through which NumPy reads a root, live or not, per root.
        outputs: results that live roots reach, with the call that made them, in order.
    """

    def __init__(self, roots: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.roots = {id(root): frozenset({i}) for i, root in enumerate(roots)}
        self.leaves = {id(leaf): frozenset({i}) for i, leaf in enumerate(leaves)}
        self.live: dict[int, Sources] = {id(r): self.roots[id(r)] for r in roots if r.requires_grad}
        self.touched: dict[int, Sources] = dict(self.roots)
        self.kept: list[torch.Tensor] = list(roots)  # all stay alive, so that no id is used twice
        self.first_reads: dict[int, Call] = {}
        self.cuts: list[Call] = []
        self.numpy: dict[int, Call] = {}
        self.outputs: list[tuple[torch.Tensor, Call]] = []

    def run(self, function: Callable[[], R]) -> R:
        """``function()``, watched. The search for the user's line stops at this frame."""
        with self:
            return function()

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        entering = _tensors((args, kwargs))
        live = NOTHING.union(*map(self._live, entering))
        touched = NOTHING.union(*[self.touched.get(id(t), NOTHING) for t in entering]) | live
        name = getattr(func, "__name__", str(func))
        where, written, in_function = _user_line() if touched else (None, "", False)
        call = Call(written or _written(func, name), where, live)
        for tensor in entering:
            for i in self.roots.get(id(tensor), NOTHING):
                self.first_reads.setdefault(i, call)
        if in_function or not touched:
            result = func(*args, **kwargs)
            self.kept.extend(_tensors(result))
            return result
        if name in _NUMPY:
            for i in touched:
                self.numpy.setdefault(i, call)
            # the roots require a gradient here even where the caller's tensors do not: NumPy must not refuse them
            args = pytree.tree_map(lambda a: a.detach() if isinstance(a, torch.Tensor) else a, args)
        result = func(*args, **kwargs)
        leaving = _tensors(result)
        if name == "__setitem__" or name == "copy_":
            leaving.append(args[0])
        self._pass_on(leaving, live, touched, call)
        kind = self._cut(func, name, leaving) if live else None
        if kind is not None:
            self.cuts.append(Call(call.name, call.where, live, kind))
        return result

    def _live(self, tensor: torch.Tensor) -> Sources:
        """The roots that ``tensor`` depends on by its graph; walked where the call that made it was not seen."""
        known = self.live.get(id(tensor))
        if known is not None or id(tensor) in self.touched or not tensor.requires_grad:
            return known or NOTHING
        found = NOTHING
        for node in nodes_of([tensor]):
            found |= self.leaves.get(id(getattr(node, "variable", None)), NOTHING)
        self.kept.append(tensor)
        self.live[id(tensor)] = found
        return found

    def _pass_on(self, leaving: list[torch.Tensor], live: Sources, touched: Sources, call: Call) -> None:
        for tensor in leaving:
            self.kept.append(tensor)
            self.touched[id(tensor)] = self.touched.get(id(tensor), NOTHING) | touched
            if live and (tensor.requires_grad or _torch.is_wrapped(tensor)):
                self.live[id(tensor)] = self.live.get(id(tensor), NOTHING) | live
                if len(self.outputs) < _MAX_OUTPUTS and not _torch.is_wrapped(tensor):
                    self.outputs.append((tensor, call))

    def _cut(self, func: Any, name: str, leaving: list[torch.Tensor]) -> CutKind | None:
        if name in _NUMPY:
            return "numpy"
        if name in _TRUTH:
            return "branch"
        if name in _EXITS:
            return "exit"
        if not leaving or any(t.requires_grad or _torch.is_wrapped(t) for t in leaving):
            return None
        if name.endswith("_like") or (name.startswith("new_") and name != "new_tensor") or name == "__array_wrap__":
            return None  # they take shape and dtype only
        if name in _COPIES:
            return "copy"
        if all(t.dtype == torch.bool for t in leaving):
            return "branch"
        if not any(t.is_floating_point() or t.is_complex() for t in leaving):
            return "integers"
        by_data = func == torch.Tensor.data.__get__  # type: ignore[attr-defined]
        return "exit" if by_data or torch.is_grad_enabled() else "no_grad"


def _written(func: Any, name: str) -> str:
    """The call as a reader knows it: `.item()`, `float()`, `torch.tensor()`."""
    if name == "__get__":
        return f".{getattr(getattr(func, '__self__', None), '__name__', '?')}"
    if name in _EXITS:
        return _EXITS[name]
    if name in _NUMPY:
        return ".numpy()" if name == "numpy" else "numpy"
    if name == "__bool__":
        return "bool()"
    return f"torch.{name}()" if name in _COPIES else f"{name}()"


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _user_line() -> tuple[SourceLine | None, str, bool]:
    """The innermost line outside torch and this package, within the watched run, and the call on it as written.

    The call is "" where Python (3.10) or a missing source does not tell. The last value: whether the call is part of a
    torch.autograd.Function, which runs without grad mode and has its own derivative.
    """
    frame: types.FrameType | None = sys._getframe(1)
    found: tuple[SourceLine | None, str] = (None, "")
    of_functions = _codes_of_functions()
    while frame is not None and frame.f_code is not Tracer.run.__code__:
        filename, number = frame.f_code.co_filename, frame.f_lineno
        if found[0] is None and not filename.startswith(_SKIPPED):
            line = linecache.getline(filename, number)
            text = line.strip()
            short = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
            found = SourceLine(filename, number, short), _expression(frame, line)
        if frame.f_code in of_functions:
            return *found, True
        frame = frame.f_back
    return *found, False


def _codes_of_functions() -> set[types.CodeType]:
    """What ``torch.autograd.Function.apply`` runs. Where apply is written in C (torch 2.14), it has no frame itself."""
    classes: list[Any] = [torch.autograd.Function]
    methods = []
    for cls in classes:  # which grows
        classes += cls.__subclasses__()
        methods += [inspect.unwrap(cls.forward), inspect.unwrap(cls.setup_context)]
    return {method.__code__ for method in methods if hasattr(method, "__code__")}


def _expression(frame: types.FrameType, line: str) -> str:
    """The part of ``line`` that ``frame`` is executing, such as `lam.item()`."""
    positions = getattr(frame.f_code, "co_positions", None)
    if positions is None:
        return ""
    first, last, start, end = next(itertools.islice(positions(), frame.f_lasti // 2, None))
    if first != last or start is None or end is None or end - start > _MAX_TEXT:
        return ""
    return line.encode()[start:end].decode()  # columns count bytes
