"""Imports the package once more with one expression of a function changed, in memory, and runs the suite on it."""

# A fresh package, all modules of it, is imported beside the one that pytest has: nothing on disk changes, torch and
# Hypothesis stay as they are, and the old modules are back in sys.modules afterwards. While the block runs the fresh
# ones are there, because functions may import when they are called.

from __future__ import annotations

import ast
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import NoneType
from typing import Any

import torch

NAME = "implicitlayer"
ROOT = Path(__file__).resolve().parents[2] / NAME


class StaleMutantError(Exception):
    """The function or expression of a mutant is not there once: the package has changed, the mutant must too."""


@dataclass(frozen=True)
class Mutant:
    """One seeded fault: in a function of ``module`` (such as ``linear/_cg.py``) the expression ``old`` becomes ``new``.

    ``function`` is its qualified name, ``Class.method.inner``. Expressions are compared as syntax trees, so layout,
    line breaks and the statements around them do not matter. ``breaks`` says what becomes wrong, so that nobody takes
    the mutant for an equivalent one. ``near``: checks whose names begin with this are run first, which saves time; all
    others follow.
    """

    name: str
    module: str
    function: str
    old: str
    new: str
    breaks: str
    near: str = ""

    @property
    def module_name(self) -> str:
        return ".".join([NAME, *Path(self.module).with_suffix("").parts])

    def tree(self) -> ast.Module:
        """The mutated syntax tree of the module; places in tracebacks are those of the original."""
        tree = ast.parse((ROOT / self.module).read_text(encoding="utf-8"))
        function: ast.AST = tree
        for name in self.function.split("."):
            found = [n for n in _scope(function) if n.name == name]
            if len(found) != 1:
                raise StaleMutantError(
                    f"mutant {self.name!r}: {self.module} has {len(found)} functions {self.function}."
                )
            function = found[0]
        swap = _Swap(self.old, self.new)
        swap.visit(function)
        if swap.count != 1:
            raise StaleMutantError(
                f"mutant {self.name!r}: its expression stands {swap.count} times in {self.function} of {self.module}, "
                f"not once:\n{self.old}\nUpdate the mutant to what the package does now."
            )
        return ast.fix_missing_locations(tree)


def _scope(node: ast.AST) -> Iterator[Any]:
    """Functions and classes right inside ``node``, also below its branches and loops."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield child
        elif not isinstance(child, ast.Lambda):
            yield from _scope(child)


class _Swap(ast.NodeTransformer):
    """Puts one expression in the place of another, and counts."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new, self.count = ast.dump(ast.parse(old, mode="eval").body), new, 0

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.expr) and ast.dump(node) == self.old:
            self.count += 1
            new = ast.parse(self.new, mode="eval").body
            for part in ast.walk(new):
                ast.copy_location(part, node)
            return new
        return self.generic_visit(node)


Suite = Callable[[Any, Any], Iterable[tuple[str, Callable[[], None]]]]


@dataclass(frozen=True)
class Catch:
    """Which check found a fault, and the first line of what it said."""

    check: str
    message: str


class _Loader(SourceFileLoader):
    """Loads a module from a given syntax tree."""

    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self.tree = tree

    def get_code(self, fullname: str) -> types.CodeType:
        code: types.CodeType = compile(self.tree, self.path, "exec", dont_inherit=True)
        return code


class _Finder(MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self.name, self.tree = mutant.module_name, mutant.tree()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None and spec.origin is not None
        spec.loader = _Loader(fullname, spec.origin, self.tree)
        return spec


@contextmanager
def fresh_package(mutant: Mutant | None) -> Iterator[tuple[Any, Any]]:
    """``implicitlayer`` and ``implicitlayer.testing``, imported anew; with the mutant, if there is one."""
    finders = [] if mutant is None else [_Finder(mutant)]
    kept = _take_out()
    sys.meta_path[:0] = finders
    try:
        yield importlib.import_module(NAME), importlib.import_module(f"{NAME}.testing")
    finally:
        for finder in finders:
            sys.meta_path.remove(finder)
        _take_out()
        sys.modules.update(kept)


def _take_out() -> dict[str, types.ModuleType]:
    names = [name for name in sys.modules if name == NAME or name.startswith(NAME + ".")]
    return {name: sys.modules.pop(name) for name in names}


def first_catch(mutant: Mutant | None, suite: Suite) -> Catch | None:
    """Run ``suite(il, testing)``, warnings as errors, up to the first check that finds something; None if none does.

    Caught is what a check asserts, and what the package says by a named error or warning of its own. Any other
    exception goes through: a mutant that crashes proves nothing about the checks.
    """
    with fresh_package(mutant) as (il, testing), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`torch.jit.script`")
        named = (AssertionError, il.ImplicitLayerError, il.ImplicitLayerWarning)
        near = "" if mutant is None else mutant.near
        for name, check in sorted(suite(il, testing), key=lambda pair: not pair[0].startswith(near)):
            torch.manual_seed(0)
            try:
                check()
            except named as error:
                cause = error.__cause__
                if isinstance(error, testing.GradientCheckError) and not isinstance(cause, (NoneType, *named)):
                    raise AssertionError(f"the mutant crashed, in {name!r}: {cause!r}") from error
                return Catch(name, f"{type(error).__name__}: {_first_line(str(error))}")
    return None


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0] if lines else ""
