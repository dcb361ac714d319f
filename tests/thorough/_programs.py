"""Quadratic programs as users have them: degenerate vertices, rows of every scale, rows that nearly agree."""

# NOTE [planted programs]: n unknowns, rows l <= J x <= u of which some are equations, small integers times powers of
# two throughout. The solution x and its multipliers w come first: w > 0 at an upper side, w < 0 at a lower one, 0 in a
# row that is inside or at a kink. Then p = -(Q x + J'w), with no rounding at all (where 53 bits do not hold it, the
# program is left out), and x is the solution because the conditions of optimality hold exactly and Q is positive
# definite. Where the rows that hold are independent and none of them is at a kink, x is differentiable: with
#     K = [Q J_a'; J_a 0],   K (u, t) = (v, 0):   d(v'x) = -u'dp + t'd(side),
# solved in fractions. Everywhere else the layer has to say so.

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

import implicitlayer as il
from tests.thorough._family import DrawnFamily
from tests.thorough._quadratics import SEEDS
from tests.thorough._reference import F64, Tensor
from tests.thorough._trial import SLACK, Trial, default_rtol

TRAITS = (
    "plain",
    "degenerate vertex",
    "rows scaled by 1e-6 to 1e6",
    "repeated rows",
    "pinned unknowns",
    "nearly parallel rows",
    "curvatures of 1e-5 to 1e5",
    "two-sided rows",
    "bounds of some unknowns",
    "almost linear",
)
FORMS = ("one", "two lanes", "sparse")
TIGHT = 1e-11  # what conditions that are proved hold to, of their terms
CLEAR = 1e-6  # forces, distances and sines above this share of their terms are beyond doubt

Number = Fraction
Row = list[Number]


@dataclass
class Side:
    """One row ``lower <= row x <= upper``; None is no side."""

    row: Row
    lower: Number | None
    upper: Number | None
    multiplier: Number = field(default_factory=Number)

    def holds(self, x: Row) -> bool:
        """Whether x is at a side of it."""
        return dot(self.row, x) in (self.lower, self.upper)


@dataclass
class Program:
    """Q, x, p, and the rows by how they are given: equations, rows, bounds of single unknowns."""

    Q: list[Row]
    x: Row
    p: Row
    groups: tuple[list[Side], list[Side], list[Side]]

    @property
    def sides(self) -> list[Side]:
        return [side for group in self.groups for side in group]


def dot(a: Sequence[Number], b: Sequence[Number]) -> Number:
    return sum((s * t for s, t in zip(a, b, strict=True)), Number(0))


def planted(n: int, rows: int, traits: set[str], seed: int) -> Program:
    """A program with these traits, with its solution; every draw depends on the seed alone."""
    draw = random.Random(seed)
    power = lambda most: Number(2) ** draw.randint(-most, most)  # noqa: E731
    entries = lambda: [Number(draw.randint(-3, 3)) for _ in range(n)]  # noqa: E731
    root = [[Number(draw.randint(-2, 2)) for _ in range(n)] for _ in range(n)]
    Q = [[dot(a, b) + (i == j) for j, b in enumerate(root)] for i, a in enumerate(root)]
    if "curvatures of 1e-5 to 1e5" in traits:
        units = [power(8) for _ in range(n)]
        Q = [[units[i] * units[j] * value for j, value in enumerate(row)] for i, row in enumerate(Q)]
    if "almost linear" in traits:
        flat = Number(2) ** -draw.randint(10, 28)
        Q = [[flat * value for value in row] for row in Q]
    x = entries()
    equations = [Side(entries(), Number(0), Number(0), Number(draw.randint(-3, 3))) for _ in range(draw.randint(0, 1))]
    general, bounds, room = [], [], n - len(equations)
    for _ in range(rows):
        active = room > 0 and draw.random() < 0.5
        room -= active
        general.append(
            Side(entries(), None, Number(0 if active else draw.randint(1, 9)), Number(active and draw.randint(1, 4)))
        )
    if "degenerate vertex" in traits:
        general += [Side(entries(), None, Number(0), Number(draw.randint(0, 2))) for _ in range(n)]
    if "nearly parallel rows" in traits:
        for side in [*general]:
            near = [a + Number(2) ** -draw.choice((8, 16, 20)) * b for a, b in zip(side.row, entries(), strict=True)]
            general.append(Side(near, None, Number(draw.choice((0, 1))), Number(0)))
            if general[-1].upper == 0 and draw.random() < 0.7:
                general[-1].multiplier = Number(draw.randint(1, 4))
    if "repeated rows" in traits:
        for side in [*equations, *general][:2]:
            factor = Number(draw.choice((1, 2, 3)))
            copy = Side([factor * a for a in side.row], side.lower, side.upper and factor * side.upper, Number(0))
            (equations if side.lower is not None else general).append(copy)
    if "pinned unknowns" in traits:
        for i in draw.sample(range(n), min(n, 2)):
            unit = [Number(i == j) for j in range(n)]
            group = draw.choice((equations, bounds))
            group.append(Side(unit, Number(0), Number(0), Number(draw.randint(-3, 3))))
    if "bounds of some unknowns" in traits:
        taken = {side.row.index(1) for side in bounds}
        for i in range(n):
            if i not in taken and draw.random() < 0.6:
                unit, active = [Number(i == j) for j in range(n)], room > 0 and draw.random() < 0.4
                room -= active
                below, above = -Number(draw.randint(1, 9)), Number(0 if active else draw.randint(1, 9))
                bounds.append(Side(unit, draw.choice((None, below)), above, Number(active and draw.randint(1, 4))))
    if "two-sided rows" in traits:
        for side in general:
            side.lower = -Number(draw.randint(1, 9))
            if draw.random() < 0.5:
                side.lower, side.upper, side.multiplier = -side.upper, -side.lower, -side.multiplier
    for side in (*equations, *general, *bounds):
        at, scale = dot(side.row, x), Number(1)
        if "rows scaled by 1e-6 to 1e6" in traits and side not in bounds:
            scale = power(20)
        side.row = [scale * a for a in side.row]
        side.lower, side.upper = (None if s is None else scale * (at + s) for s in (side.lower, side.upper))
        side.multiplier /= scale
    sides = [*equations, *general, *bounds]
    pull = [sum((s.multiplier * s.row[j] for s in sides), Number(0)) for j in range(n)]
    p = [-dot(row, x) - w for row, w in zip(Q, pull, strict=True)]
    return Program(Q, x, p, (equations, general, bounds))


def solved(matrix: list[Row], rhs: Row) -> Row | None:
    """The solution of a square system, None where it is singular; in fractions."""
    work = [[*row, value] for row, value in zip(matrix, rhs, strict=True)]
    for k in range(len(work)):
        pivot = next((i for i in range(k, len(work)) if work[i][k]), None)
        if pivot is None:
            return None
        work[k], work[pivot] = work[pivot], work[k]
        for i in range(len(work)):
            if i != k and work[i][k]:
                factor = work[i][k] / work[k][k]
                work[i] = [a - factor * b for a, b in zip(work[i], work[k], strict=True)]
    return [row[-1] / row[k] for k, row in enumerate(work)]


def tensor(values: Any) -> Tensor:
    """Of fractions, which are numbers of float64."""
    return torch.tensor([[float(v) for v in row] if isinstance(row, list) else float(row) for row in values], dtype=F64)


def is_exact(program: Program) -> bool:
    """Whether all data are numbers of float64."""
    sides = [s for side in program.sides for s in (*side.row, side.lower, side.upper, side.multiplier) if s is not None]
    return all(Number(float(v)) == v for v in (*program.p, *sides, *(q for row in program.Q for q in row)))


def arguments(program: Program, two_sided: bool) -> dict[str, Tensor]:
    """As il.qp is called."""
    equations, general, bounds = program.groups
    inf = float("inf")
    n = len(program.p)
    side = lambda group, name, none: torch.tensor(  # noqa: E731
        [none if getattr(s, name) is None else float(getattr(s, name)) for s in group], dtype=F64
    )
    found = {"Q": tensor(program.Q), "p": tensor(program.p)}
    if equations:
        found |= {"A": tensor([s.row for s in equations]), "b": side(equations, "upper", inf)}
    if general:
        found |= {"G": tensor([s.row for s in general]), "h": side(general, "upper", inf)}
        if two_sided:
            found["lower"] = side(general, "lower", -inf)
    if bounds:
        low, high = torch.full((n,), -inf, dtype=F64), torch.full((n,), inf, dtype=F64)
        places = torch.tensor([s.row.index(1) for s in bounds])
        low[places], high[places] = side(bounds, "lower", -inf), side(bounds, "upper", inf)
        found |= {"lb": low, "ub": high}
    return found


@dataclass
class Truth:
    """What is known of a program: u and t for a cotangent (None at a kink), and what rounding may do to x and u.

    ``clear``: no force, distance, sine or condition leaves room for doubt.
    """

    u: Tensor | None
    t: Tensor
    allowed_x: float
    allowed_u: float
    clear: bool


def truth(program: Program, v: Row) -> Truth:
    """See NOTE [planted programs]; the bounds are derived below."""
    n, sides, x = len(v), program.sides, program.x
    border = [i for i, side in enumerate(sides) if side.holds(x)]
    strict = [i for i in border if sides[i].multiplier or sides[i].lower == sides[i].upper]
    rows = [sides[i].row for i in border]
    zero = Number(0)
    K = [[*q, *(row[j] for row in rows)] for j, q in enumerate(program.Q)] + [
        [*row, *[zero] * len(rows)] for row in rows
    ]
    solution = solved(K, [*v, *[zero] * len(rows)]) if len(rows) <= n else None
    smooth = solution is not None and strict == border
    t = torch.zeros(len(sides), dtype=F64)
    if solution is not None:
        for place, value in zip(border, solution[n:], strict=True):
            t[place] = float(value)
    # x: with the conditions off by TIGHT of their terms K (dx, dw) = (left, off), left <= TIGHT (|grad| + |Q x|) and
    # off <= TIGHT max(|x|, |p| / |Q|) times the length of a row. u: D K D (D^-1 u) = D v to twice the tolerance of
    # solves, D the inverse root of |Q| in x and its inverse over the length of a row in w, in which no unit matters.
    Q, at, p = tensor(program.Q), tensor(x), tensor(program.p)
    curved = float(Q.abs().max())
    size = max(float(at.norm()), float(p.abs().max()) / curved)
    terms = float((Q @ at + p).norm() + (Q @ at).norm())
    moved, smallest, condition, sine = 0.0, 0.0, 1.0, 1.0
    for held in (strict, border):  # which of the two a solver holds is open at a kink
        J = torch.cat([torch.zeros(0, n, dtype=F64), tensor([sides[i].row for i in held])]) if held else Q[:0]
        unit = J / J.norm(dim=1, keepdim=True)
        scaled = torch.cat(
            [torch.cat([Q / curved, unit.T], 1), torch.cat([unit, torch.zeros(len(J), len(J), dtype=F64)], 1)]
        )
        inverse, values = torch.linalg.pinv(scaled, rtol=1e-14), torch.linalg.svdvals(scaled)
        parts = [
            float(torch.linalg.matrix_norm(part, 2)) if part.numel() else 0.0
            for part in (inverse[:n, :n], inverse[:n, n:])
        ]
        moved = max(moved, parts[0] * terms / curved + parts[1] * size * len(held) ** 0.5)
        smallest, condition = float(values[-1]), float(values[0] / max(values[-1], 1e-300))
        sine = float(torch.linalg.svdvals(unit)[-1]) if 0 < len(unit) <= n else float(not len(unit))
    w = torch.tensor([float(side.multiplier) for side in sides], dtype=F64)
    forces = [
        float(abs(w[i])) * float(tensor(sides[i].row).norm()) / max(terms, 1e-300)
        for i in border
        if sides[i].lower != sides[i].upper
    ]
    gaps = [
        abs(float(dot(side.row, x) - s)) / max(float(tensor(side.row).norm()), 1e-300) / max(size, 1e-300)
        for i, side in enumerate(sides) if i not in border for s in (side.lower, side.upper) if s is not None
    ]  # fmt: skip
    clear = min([*forces, *gaps, sine**2, 1 / condition]) > CLEAR
    allowed_u = SLACK * 2 * default_rtol(F64) * float(tensor(v).norm()) / curved**0.5 / max(smallest, 1e-300)
    u = tensor(solution[:n]) if smooth and solution is not None else None
    return Truth(u, t, SLACK * TIGHT * moved, allowed_u, clear)


def work_program(trial: Trial, *, n: int, rows: int, first: int, second: int, form: int, seed: int) -> None:
    """x, and the gradients of v'x in p and in every side: right, or said to be at a kink, where they have none."""
    traits = {TRAITS[first], TRAITS[second]} - {"plain"}
    trial.kind = FORMS[form]
    draw = random.Random(seed + 1)
    program = planted(n, rows, traits, seed)
    if not is_exact(program) or any(not any(side.row) for side in program.sides):
        trial.kind = "left out"
        return
    v = [Number(draw.randint(-3, 3)) for _ in range(n)]
    known = truth(program, v)
    given = arguments(program, "two-sided rows" in traits)
    if form == 1:  # next to a program with other linear terms
        other = given["p"] + torch.randint(-3, 4, (n,), generator=torch.Generator().manual_seed(seed)).to(F64)
        given["p"] = torch.stack([given["p"], other])
    trial.must = "right" if known.clear and known.u is not None else "either"
    inputs = {name: t.requires_grad_() for name, t in given.items() if name not in ("Q", "A", "G")}
    matrices = {name: t.to_sparse() if form == 2 else t for name, t in given.items() if name in ("Q", "A", "G")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = il.qp(**inputs, **matrices)
    told = any(issubclass(w.category, il.KinkWarning) for w in caught)
    for w in caught:
        if not issubclass(w.category, il.KinkWarning) or (known.u is not None and form != 1):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    x = x[0] if form == 1 else x
    away = float((x.detach() - tensor(program.x)).norm())
    trial.errors.append(away / max(float(tensor(program.x).norm()), 1.0))
    trial.claim(away <= known.allowed_x, f"x is {away:.1e} away, allowed {known.allowed_x:.1e}")
    if known.u is None:
        trial.claim(told, "a kink, or rows that depend on each other, and no word")
        return
    gradients = dict(
        zip(inputs, torch.autograd.grad(x @ tensor(v), list(inputs.values()), materialize_grads=True), strict=True)
    )
    n_e, n_g = (len(group) for group in program.groups[:2])
    zeros = lambda count: torch.zeros(count, dtype=F64)  # noqa: E731
    g = gradients["p"]
    u = -(g[0] if form == 1 else g)
    both = [
        gradients.get(a, zeros(k)) + gradients.get(b, zeros(k)) for a, b, k in (("h", "lower", n_g), ("lb", "ub", n))
    ]
    places = [side.row.index(1) for side in program.groups[2]]
    t = torch.cat([gradients.get("b", zeros(n_e)), both[0], both[1][places] if places else zeros(0)])
    lengths = torch.tensor([float(tensor(side.row).norm()) for side in program.sides], dtype=F64)
    curved = float(given["Q"].abs().max())
    # in the units of D, in which allowed_u bounds every part
    off = torch.cat([(u - known.u) * curved**0.5, (t - known.t) * lengths / curved**0.5])
    size = torch.cat([known.u * curved**0.5, known.t * lengths / curved**0.5])
    error, whole = float(off.norm()), float(size.norm())
    trial.errors.append(error / whole if whole else error)
    trial.claim(
        error <= known.allowed_u, f"the gradient is {error:.1e} off (of {whole:.1e}), allowed {known.allowed_u:.1e}"
    )


FAMILIES = [
    DrawnFamily("programs", "quadratic programs with degenerate, dependent, parallel and badly scaled rows", 2400,
                {"n": (1, 9), "rows": (0, 9), "first": (0, len(TRAITS) - 1), "second": (0, len(TRAITS) - 1),
                 "form": (0, len(FORMS) - 1), "seed": SEEDS}, work_program),
]  # fmt: skip
