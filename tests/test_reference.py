"""The reference pages of docs/reference/ and the public names are the same list."""

import importlib
import re
from pathlib import Path

from tests.test_structure import public_packages

ROOT = Path(__file__).resolve().parents[1]
# of the packages that test_structure finds, those whose own names users are told to import; il.* gathers the rest
ROOMS = ["implicitlayer", *(f"implicitlayer.{room}" for room in ("solvers", "sets", "meta", "fewshot", "testing"))]
DIRECTIVE = re.compile(r"^::: (\S+)$", flags=re.MULTILINE)


def shown() -> list[str]:
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    return [name for page in pages for name in DIRECTIVE.findall(page.read_text(encoding="utf-8"))]


def public() -> set[str]:
    names = {f"{room}.{name}" for room in ROOMS for name in importlib.import_module(room).__all__}
    return names - set(ROOMS)  # il.meta and the other rooms are pages


def test_every_public_name_is_on_one_reference_page_and_no_other_name_is() -> None:
    names = shown()
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"on two reference pages: {twice}"
    assert set(names) == public(), (
        f"without an entry in docs/reference/: {sorted(public() - set(names))}; "
        f"there, but not public: {sorted(set(names) - public())}"
    )


def test_every_room_of_the_facade_has_a_reference_page() -> None:
    import implicitlayer as il

    rooms = {f"implicitlayer.{name}" for name in il.__all__ if f"implicitlayer.{name}" in public_packages()}
    assert rooms == set(ROOMS) - {"implicitlayer"}


def test_every_name_of_another_package_is_one_of_the_facade_too() -> None:
    """`implicitlayer.linear` and its like are folders of the source: what they name is reached as `il.*`."""
    facade = set(importlib.import_module("implicitlayer").__all__)
    for package in set(public_packages()) - set(ROOMS):
        names = set(importlib.import_module(package).__all__)
        assert names <= facade, f"{package}: {sorted(names - facade)}"
