"""Every transform and its compositions to depth 3, on every kind of layer, against closed forms; writes the docs page.

IMPLICITLAYER_WRITE_DOCS=1 python -m pytest tests/implicit/test_transform_table.py    # after a change of the table
"""

import itertools
import os
from pathlib import Path

import pytest
import torch

import implicitlayer as il

PAGE = Path(__file__).parents[2] / "docs" / "transforms.md"
N, F64 = 3, torch.float64
_generator = torch.Generator().manual_seed(0)
Q = torch.linalg.qr(torch.randn(N, N, dtype=F64, generator=_generator)).Q
M = torch.eye(N, dtype=F64) + 0.4 * torch.randn(N, N, dtype=F64, generator=_generator)  # not symmetric
W = torch.randn(N, dtype=F64, generator=_generator)
V = torch.randn(N, dtype=F64, generator=_generator)
LANES = torch.tensor([0.8, 1.0, 1.3], dtype=F64)
T = torch.tensor([0.7, 1.1, 1.6], dtype=F64)
STRENGTH = 1.5


# Problems with a closed form that torch differentiates by itself. Rows of t are lanes.
def log_form(t):
    """Q x = log t: the minimiser of sum exp(Qx) - <t, Qx>, and the root of M (exp(Qx) - t)."""
    return torch.log(t) @ Q


def proximal_form(t):
    """y = Q phi, s = Q t: strength (y - s) = 1/y, the positive root of a quadratic."""
    s = t @ Q.T
    return 0.5 * (s + torch.sqrt(s * s + 4 / STRENGTH)) @ Q


def solver_of(form, batched):
    """The closed form as a black box: through NumPy, one lane at a time, or for all lanes at once."""

    def solve(_, x, t):
        if not batched:
            assert x.shape == (N,), "a black box sees one lane"
            return form(torch.from_numpy(t.numpy().copy())).numpy()
        return form(t)

    solve.batched = batched
    return solve


def exponentials(x, t):
    return torch.exp(x @ Q.T) - t


# tight enough for third derivatives to 1e-6; all systems here have condition below 100
CG = il.ConjugateGradient(rtol=1e-13)
GMRES = il.Gmres(rtol=1e-13)
COLUMNS = {
    "argmin": (
        log_form,
        lambda s: il.argmin(lambda x, t: torch.exp(Q @ x).sum() - t @ (Q @ x), s, linear_solver=CG),
    ),
    "root": (log_form, lambda s: il.root(lambda x, t: exponentials(x, t) @ M.T, s, linear_solver=GMRES)),
    "fixed_point": (
        log_form,
        lambda s: il.fixed_point(lambda x, t: x - 0.3 * exponentials(x, t) @ M.T, s, linear_solver=GMRES),
    ),
    "proximal": (
        proximal_form,
        lambda s: il.argmin(il.proximal(lambda p: -torch.log(Q @ p).sum(), STRENGTH), s, linear_solver=CG),
    ),
}


# Transforms as maps from functions R^n -> R^n to functions R^n -> R^n, so that they compose.
def vjp(f):
    return lambda t: torch.func.vjp(f, t)[1](W)[0]


def jvp(f):
    return lambda t: torch.func.jvp(f, (t,), (V,))[1]


def vmap(f):
    return lambda t: torch.func.vmap(f)(LANES[:, None] * t).sum(0)


def backward(f):
    def gradient(t):
        t = t if t.requires_grad else t.detach().requires_grad_()
        return torch.autograd.grad(f(t), t, W, create_graph=True)[0]

    return gradient


FUNC = {"vjp": vjp, "jvp": jvp, "vmap": vmap}
ROWS = [names for depth in (1, 2, 3) for names in itertools.product(FUNC, repeat=depth)]
ROWS += [("backward",) * depth for depth in (1, 2, 3)]
ROWS += [("backward", *names) for depth in (1, 2) for names in itertools.product(FUNC, repeat=depth)]


def composed(names, function):
    for name in reversed(names):
        function = {**FUNC, "backward": backward}[name](function)
    return function


def cell(names, column, batched):
    """'yes' or 'refused'; anything else fails the test."""
    form, make = COLUMNS[column]
    layer = make(solver_of(form, batched))
    x0 = torch.ones(N, dtype=F64) if column != "proximal" else Q.sum(0)
    function = composed(names, lambda t: layer(x0, t))
    if names.count("jvp") > 1:
        with pytest.raises(il.UnsupportedTransformError, match="forward mode over forward mode"):
            function(T)
        return "refused"
    order = sum(name != "vmap" for name in names)
    expected = composed(names, form)(T)
    torch.testing.assert_close(function(T), expected, rtol=1e-8 if order <= 1 else 1e-6, atol=1e-12)
    return "yes"


def line(names):
    cells = [cell(names, column, batched) for column in COLUMNS for batched in (False, True)]
    return f"| {' of '.join(names)} | " + " | ".join(cells) + " |"


@pytest.mark.parametrize("names", ROWS, ids=".".join)
def test_every_cell_agrees_with_the_closed_form_or_is_refused_and_documented(names):
    found = line(names)
    if not os.environ.get("IMPLICITLAYER_WRITE_DOCS"):
        assert found in PAGE.read_text().splitlines()


def test_the_page_has_exactly_these_rows():
    if os.environ.get("IMPLICITLAYER_WRITE_DOCS"):
        header = " | ".join(f"{c}, {s}" for c in COLUMNS for s in ("eager", "batched"))
        rule = "|".join(["---"] * (1 + 2 * len(COLUMNS)))
        table = "\n".join([f"| transform | {header} |", f"|{rule}|", *map(line, ROWS)])
        PAGE.write_text(INTRODUCTION + table + "\n")
    rows = [row for row in PAGE.read_text().splitlines() if row.startswith("| ")]
    assert len(rows) == len(ROWS) + 1


INTRODUCTION = """# Transforms

Every `torch.func` transform of a layer, their compositions to depth 3, and double and triple `backward`. This page is
written by `tests/implicit/test_transform_table.py`, which computes every cell on each run and compares it with a closed
form differentiated by torch itself, in float64: first order to 1e-8, higher orders to 1e-6. "vmap of vjp" is
`vmap(vjp(layer))`. *eager*: a black-box solver that sees one problem at a time through NumPy; *batched*: a solver that
is called once for all lanes (`batched = True`).

**refused** is an `il.UnsupportedTransformError`: forward mode over forward mode. torch gives the inner level of any
custom `autograd.Function` a zero tangent there, without a word, so the layer raises. Use `torch.func.hessian` (forward
over reverse) or `jacfwd(jacrev(...))`.

`torch.func.functionalize`, `torch.export` and `torch.jit.trace` do not take a layer: torch has no rule there for a
custom `autograd.Function`, and says so in words of its own. Inside `torch.compile`: [compiled layers](compiled.md).

"""
