"""What the base classes that users extend have in common: their subclasses are found, and put to the checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Extension:
    """A class whose subclasses ``il.testing.extension_checks`` finds by themselves."""

    @classmethod
    def examples(cls, *given: Any) -> Sequence[Any]:
        """The instances that are checked: by default one, made without arguments.

        Args:
            given: what the base class says that every instance is made of, if anything.
        """
        return [cls(*given)]
