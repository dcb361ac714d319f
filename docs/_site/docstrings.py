"""How docstrings become Markdown: ``Example:`` is a doctest, ``:func:`argmin``` a link to the page of that name, and
``rtol, atol: ...`` in ``Args:`` one entry for each of both, with its own type and default.
"""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|attr|mod):`~?([\w.]+)`")
ARGS = re.compile(r"^( *)Args:\n(?:\1 .*\n|\n)+", flags=re.MULTILINE)
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+)(:.*\n(?:\1 +.*\n)*)", flags=re.MULTILINE)
PACKAGES = ("", "solvers.", "sets.", "meta.", "fewshot.", "testing.")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for every module, class, function and attribute."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = ARGS.sub(lambda section: SEVERAL.sub(self._one_each, section[0]), text + "\n")
            text = ROLE.sub(lambda match: self._linked(match[1], obj.package), text)
            obj.docstring.value = text

    @staticmethod
    def _one_each(several: re.Match[str]) -> str:
        return "".join(f"{several[1]}{name}{several[3]}" for name in several[2].split(", "))

    def _linked(self, name: str, package: griffe.Object) -> str:
        short = name.removeprefix("implicitlayer.").removeprefix("il.")
        own = next((p for p in PACKAGES if self._public(p + short, package)), None)
        return f"`{short}`" if own is None else f"[`{short}`][implicitlayer.{own}{short}]"

    @staticmethod
    def _public(name: str, package: griffe.Object) -> bool:
        *folder, last = name.split(".")
        module = package
        for part in folder:
            if part not in module.members or not module[part].is_module:
                return False
            module = module[part]
        return bool(module.exports) and last in module.exports and not module.members[last].is_module
