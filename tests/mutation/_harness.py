"""Imports the package once more with a line of its source changed, in memory, and runs the conformance suite on it."""

# A fresh package, all modules of it, is imported beside the one that pytest has: nothing on disk changes, torch and
# Hypothesis stay as they are, and the old modules are back in sys.modules afterwards. While the block runs the fresh
# ones are there, because functions may import when they are called.

from __future__ import annotations

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
    """The source that a mutant replaces is not there exactly once: the package has changed, the mutant must too."""


@dataclass(frozen=True)
class Mutant:
    """One seeded fault: ``old`` in the source of ``module`` (such as ``linear/_cg.py``) becomes ``new``.

    ``breaks`` says what becomes wrong, so that nobody takes the mutant for an equivalent one. ``near``: checks whose
    names begin with this are run first, which saves time; all others follow.
    """

    name: str
    module: str
    old: str
    new: str
    breaks: str
    near: str = ""

    @property
    def module_name(self) -> str:
        return ".".join([NAME, *Path(self.module).with_suffix("").parts])

    def source(self) -> str:
        """The mutated source of the module."""
        original = (ROOT / self.module).read_text(encoding="utf-8")
        count = original.count(self.old)
        if count != 1:
            raise StaleMutantError(
                f"mutant {self.name!r}: its old source stands {count} times in {self.module}, not once:\n{self.old}\n"
                "Update the mutant to what the package does now."
            )
        return original.replace(self.old, self.new)


Suite = Callable[[Any, Any], Iterable[tuple[str, Callable[[], None]]]]


@dataclass(frozen=True)
class Catch:
    """Which check found a fault, and the first line of what it said."""

    check: str
    message: str


class _Loader(SourceFileLoader):
    """Loads a module from a given source; file name and lines in tracebacks are those of the original."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> types.CodeType:
        code: types.CodeType = compile(self.source, self.path, "exec", dont_inherit=True)
        return code


class _Finder(MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self.name, self.source = mutant.module_name, mutant.source()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None and spec.origin is not None
        spec.loader = _Loader(fullname, spec.origin, self.source)
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
        warnings.filterwarnings("ignore", message="`torch.jit.script`", category=DeprecationWarning)
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
