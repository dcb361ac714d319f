"""The page of which solver passes which conformance check; tests/linear and tests/solvers run the checks themselves.

IMPLICITLAYER_WRITE_DOCS=1 python -m pytest tests/testing/test_conformance_table.py    # after a change of the table
"""

import functools
import inspect
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from solver_claims import INNER, LINEAR

from implicitlayer import testing

PAGE = Path(__file__).parents[2] / "docs" / "solvers_conformance.md"
WRITE = bool(os.environ.get("IMPLICITLAYER_WRITE_DOCS"))
# Of each kind one solver that claims all there is, simplest check first: its checks are the columns.
ALL_CHECKS = {"linear": dict(testing.solver_checks(LINEAR[0])), "inner": dict(testing.solver_checks(INNER[0]))}
CLAIMS = [*(("linear", claim) for claim in LINEAR), *(("inner", claim) for claim in INNER)]


def line(kind: str, claim: Any) -> str:
    """The row of a solver. What is written into the page was run; what is compared with it is run elsewhere."""
    checks = dict(testing.solver_checks(claim))
    assert set(checks) <= set(ALL_CHECKS[kind])
    if WRITE:
        for check in checks.values():
            check()
    promise = f"{claim.systems}, {claim.rtol:.0e}" if kind == "linear" else f"{claim.accuracy:.0e}"
    if kind == "inner" or claim.systems != "contraction":  # whose condition is at most 3
        promise += f", 1e{claim.log10_cond:g}"
    cells = ["pass" if name in checks else "–" for name in ALL_CHECKS[kind]]
    return "| " + " | ".join([claim.name, promise, *cells]) + " |"


def sentence(check: Callable[..., None]) -> str:
    assert isinstance(check, functools.partial)
    return " ".join((inspect.getdoc(check.func) or "").replace("``", "`").split())


def section(kind: str, promise: str) -> list[str]:
    checks = ALL_CHECKS[kind]
    numbers = [str(i) for i in range(1, len(checks) + 1)]
    items = (f"{i}. `{name}`: {sentence(check)}" for i, (name, check) in enumerate(checks.items(), start=1))
    legend = [textwrap.fill(i, 120, subsequent_indent=" " * (i.index(" ") + 1), break_on_hyphens=False) for i in items]
    rows = [line(k, claim) for k, claim in CLAIMS if k == kind]
    head = "| " + " | ".join(["solver", promise, *numbers]) + " |"
    rule = "|" + "|".join(["---"] * (2 + len(checks))) + "|"
    return [f"## {kind.capitalize()} solvers", "", *legend, "", head, rule, *rows, ""]


def page() -> str:
    linear = section("linear", "systems, relative residual, condition")
    return "\n".join([INTRODUCTION, *linear, *section("inner", "accuracy, condition")])


def test_the_page_says_what_is_claimed_and_nothing_else() -> None:
    if WRITE:
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page()


def test_no_two_solvers_have_one_name() -> None:
    assert len({claim.name for _, claim in CLAIMS}) == len(CLAIMS)


INTRODUCTION = """# Which solver passes which check

The solvers of the package against the conformance checks of `il.testing`, which [any solver of your own](testing.md)
can be put to. This page is written by `tests/testing/test_conformance_table.py`; the test suite runs every cell.
**pass**: the solver claims it, and does it. **–**: it does not claim it: a right answer is not promised there, or there
is nothing to check (lanes of a solver that takes one problem at a time, say). The second column is the promise: for
which systems, how exact, up to which condition number. Solvers of roots and fixed points are tested as minimisers: on
`grad f = 0`, and on `x = x - grad f`.
"""
