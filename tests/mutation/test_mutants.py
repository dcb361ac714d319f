"""The public checks find every fault that is seeded into the package, one at a time; and nothing without one.

``make test-thorough`` runs it (``pytest -m thorough tests/mutation -v`` alone), and ends with a table: which check
found which fault. Whether every fault can still be seeded is looked at by ``make test``.
"""

import ast
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutation._harness import Mutant, StaleMutantError, first_catch, fresh_package
from mutation._mutants import MUTANTS
from mutation._suite import suite

from implicitlayer.layer import _forward

CONTROL_PARTS = 8
FAULT = Mutant(
    "NaN in the answer becomes zero",
    "layer/_forward.py",
    "_check_leaf",
    "value.detach().clone()",
    "value.detach().clone().nan_to_num()",
    "a solver that failed passes for one that stopped at zero",
)


@pytest.mark.thorough
@pytest.mark.parametrize("part", range(CONTROL_PARTS))
def test_the_package_as_it_is_passes_the_suite(part: int) -> None:
    """The control, through the same harness: every CONTROL_PARTS-th check."""
    catch = first_catch(None, lambda il, testing: itertools.islice(suite(il, testing), part, None, CONTROL_PARTS))
    assert catch is None, f"{catch.check}: {catch.message}"


@pytest.mark.thorough
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_seeded_fault_is_caught(mutant: Mutant, record_property: Callable[[str, object], None]) -> None:
    catch = first_catch(mutant, suite)
    assert catch is not None, f"no check noticed that {mutant.module} is wrong: {mutant.name} ({mutant.breaks})"
    record_property("caught by", catch.check)
    print(f"{mutant.name} -> {catch.check}: {catch.message}")


def test_the_faults_are_many_and_different() -> None:
    assert len(MUTANTS) >= 30
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.module, ast.dump(mutant.tree())) for mutant in MUTANTS}) == len(MUTANTS)


# The harness itself.


def nothing(il: Any, testing: Any) -> list[tuple[str, Callable[[], None]]]:
    return []


@pytest.mark.parametrize(
    ("function", "old", "message"),
    [
        ("no_function", "x", r"'stale': equation/_rules\.py has 0 functions no_function"),
        ("implicit_vjp", "not_there", r"'stale': its expression stands 0 times in implicit_vjp of equation/_rules\.py"),
        ("implicit_vjp", "theta", r"stands \d+ times .* not once"),
    ],
)
def test_a_mutant_that_is_no_longer_one_is_an_error(function: str, old: str, message: str) -> None:
    with pytest.raises(StaleMutantError, match=message):
        first_catch(Mutant("stale", "equation/_rules.py", function, old, "1", "nothing"), nothing)


def test_a_fault_that_no_check_looks_for_is_not_caught() -> None:
    assert first_catch(FAULT, nothing) is None


def test_only_the_package_inside_the_block_has_the_fault() -> None:
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "implicitlayer"}
    finders = list(sys.meta_path)
    with fresh_package(FAULT) as (il, _):
        assert il is sys.modules["implicitlayer"] and il is not before.get("implicitlayer")
        inside = sys.modules["implicitlayer.layer._forward"]._check_leaf(math.nan, "x", torch.zeros(()))
    after = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "implicitlayer"}
    assert after == before and sys.meta_path == finders
    assert inside == 0 and _forward._check_leaf(math.nan, "x", torch.zeros(())).isnan()


def test_a_crash_is_no_catch() -> None:
    def crash() -> None:
        raise ZeroDivisionError("not what a check says")

    with pytest.raises(ZeroDivisionError):
        first_catch(None, lambda il, testing: [("crash", crash)])


def test_the_checks_near_the_fault_come_first() -> None:
    order: list[str] = []
    names = ("far", "near one", "far too", "near two")
    near = Mutant(**{**FAULT.__dict__, "near": "near"})
    first_catch(near, lambda il, testing: [(name, lambda n=name: order.append(n)) for name in names])
    assert order == ["near one", "near two", "far", "far too"]
