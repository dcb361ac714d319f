"""Quadratic programs of ``peers_faults.py``: libraries, and faults whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

import implicitlayer as il

F64 = torch.float64
SOUND = "nothing wrong"
Tensor = torch.Tensor
Layer = Callable[..., Tensor]
# what a fault gives: numbers, and what is right (None where no number is)
Answer = tuple[list[float], list[float] | None]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def il_qp(n: int, e: int, m: int, lanes: int) -> Layer:
    return il.qp


def cvxpylayers(n: int, e: int, m: int, lanes: int) -> Layer:
    import cvxpy
    from cvxpylayers.torch import CvxpyLayer

    x, root, p = cvxpy.Variable(n), cvxpy.Parameter((n, n)), cvxpy.Parameter(n)
    G, h = cvxpy.Parameter((m, n)), cvxpy.Parameter(m)
    value = cvxpy.Minimize(0.5 * cvxpy.sum_squares(root @ x) + p @ x)
    layer = CvxpyLayer(cvxpy.Problem(value, [G @ x <= h]), [root, p, G, h], [x])

    def solve(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor:
        # it wants a root of Q, which an indefinite matrix has not
        values, vectors = torch.linalg.eigh(Q)
        if bool((values < 0).any()):
            raise NotImplementedError("an indefinite Q cannot be written down: CVXPY's rules admit sums of squares")
        return layer(values.sqrt()[..., None] * vectors.mT, p, G, h)[0]

    return solve


def moreau(n: int, e: int, m: int, lanes: int) -> Layer:
    import moreau
    from moreau.torch import Solver

    index = [(n * torch.arange(k + 1), torch.arange(n).repeat(k)) for k in (n, e + m)]
    cones = moreau.Cones(num_zero_cones=e, num_nonneg_cones=m)
    how = moreau.Settings(device="cpu", batch_size=lanes, enable_grad=True)
    solver = Solver(n, e + m, *index[0], *index[1], cones, how)

    def solve(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor:
        single = p.ndim == 1
        Q, p, A, b, G, h = (t[None] if single else t for t in (Q, p, A, b, G, h))
        rows = torch.cat([A, G], -2).expand(len(p), e + m, n).reshape(len(p), -1)
        sides = torch.cat([b, h], -1).expand(len(p), e + m)
        x: Tensor = solver.solve(Q.expand(len(p), n, n).reshape(len(p), -1), rows, p, sides).x
        return x[0] if single else x

    return solve


def proxqp(n: int, e: int, m: int, lanes: int) -> Layer:
    from proxsuite.torch.qplayer import QPFunction

    function = QPFunction()

    def solve(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor:
        single = p.ndim == 1
        Q, p, A, b, G, h = (t[None] if single else t for t in (Q, p, A, b, G, h))
        x: Tensor = function(Q, p, A, b, G, torch.full_like(h, -1e20), h)[0]
        return x[0] if single else x

    return solve


def qpth(n: int, e: int, m: int, lanes: int) -> Layer:
    from qpth.qp import QPFunction

    def solve(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor:
        single = p.ndim == 1
        Q, p, A, b, G, h = (t[None] if single else t for t in (Q, p, A, b, G, h))
        x: Tensor = QPFunction()(Q, p, G, h, A, b)
        return x[0] if single else x

    return solve


PROGRAMS: dict[str, tuple[str, Callable[[int, int, int, int], Layer]]] = {
    "il.qp": ("implicitlayer", il_qp),
    "CVXPYlayers": ("cvxpylayers", cvxpylayers),
    "Moreau": ("moreau", moreau),
    "ProxQP": ("proxsuite", proxqp),
    "qpth": ("qpth", qpth),
}


def program(
    make: Callable[..., Layer], Q: Any, p: Any, G: Any, h: Any, right: list[float] | None, *, by: str = "p"
) -> Answer:
    """x and the gradient of its sum in p or in h."""
    data = {"Q": tensor(Q), "p": tensor(p), "G": tensor(G), "h": tensor(h)}
    n, m = data["p"].shape[-1], data["h"].shape[-1]
    lanes = len(data["p"]) if data["p"].ndim > 1 else 1
    leading = data["p"].shape[:-1]
    data["A"], data["b"] = torch.zeros(*leading, 0, n, dtype=F64), torch.zeros(*leading, 0, dtype=F64)
    leaf = data[by].requires_grad_()
    x = make(n, 0, m, lanes)(*(data[name] for name in ("Q", "p", "A", "b", "G", "h")))
    (gradient,) = torch.autograd.grad(x.sum(), leaf)
    return [*x.detach().reshape(-1).tolist(), *gradient.reshape(-1).tolist()], right


EYE = [[1.0, 0.0], [0.0, 1.0]]
ZERO = [[0.0, 0.0], [0.0, 0.0]]
# x[0] >= 1 and x[0] <= 0
OPPOSED = {"G": [[-1.0, 0.0], [1.0, 0.0]], "h": [-1.0, 0.0]}
BOX = {"G": [*EYE, [-1.0, 0.0], [0.0, -1.0]], "h": [1.0, 1.0, 1.0, 1.0]}


def transformed(make: Callable[..., Layer], how: str) -> Answer:
    """min |x|^2 / 2 + p'x with x <= 1/2: x = min(-p, 1/2), so dx/dp is -1 where -p < 1/2 and 0 elsewhere."""
    p, G, h = tensor([0.3, -0.9]), tensor(EYE), tensor([0.5, 0.5])
    none, empty = torch.zeros(0, 2, dtype=F64), torch.zeros(0, dtype=F64)
    layer = make(2, 0, 2, 1)
    solve = lambda p: layer(tensor(EYE), p, none, empty, G, h)  # noqa: E731
    if how == "vmap":
        return torch.vmap(solve)(torch.stack([p, -p])).reshape(-1).tolist(), [-0.3, 0.5, 0.3, -0.9]
    if how == "jvp":
        x, moved = torch.func.jvp(solve, (p,), (torch.ones_like(p),))
        return [*x.tolist(), *moved.tolist()], [-0.3, 0.5, -1.0, 0.0]
    leaf = p.requires_grad_()
    # of sum x^3: 3 x^2 dx, and again 6 x dx^2
    (first,) = torch.autograd.grad((solve(leaf) ** 3).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    return [*first.tolist(), *second.tolist()], [-0.27, 0.0, -1.8, 0.0]


WEAK = 1e-7  # the curvature of a coordinate whose border pushes with 0.8 of it
PROGRAM_FAULTS: dict[str, Callable[[Callable[..., Layer]], Answer]] = {
    SOUND: lambda make: program(make, EYE, [-0.9, 0.3], **BOX, right=[0.9, -0.3, -1.0, -1.0]),
    "no feasible point": lambda make: program(make, EYE, [0.0, 0.0], **OPPOSED, right=None),
    "unbounded": lambda make: program(make, ZERO, [-1.0, 0.0], [[0.0, 1.0], [0.0, -1.0]], [1.0, 1.0], None),
    "Q indefinite": lambda make: program(make, [[1.0, 0.0], [0.0, -1.0]], [0.1, 0.1], **BOX, right=None),
    "NaN in p": lambda make: program(make, EYE, [math.nan, 0.0], **BOX, right=None),
    "one lane of two has no feasible point": lambda make: program(
        make,
        [EYE, EYE],
        [[0.0, 0.0], [0.0, 0.0]],
        [OPPOSED["G"], OPPOSED["G"]],
        [OPPOSED["h"], [1.0, 1.0]],
        None,
    ),
    # x = (0.5, 0.2): both borders are active, the second with a force of 8e-8; x moves with h and not with p
    "border under a curvature of 1e-7": lambda make: program(
        make, [[1.0, 0.0], [0.0, WEAK]], [-1.0, -WEAK], EYE, [0.5, 0.2], [0.5, 0.2, 1.0, 1.0], by="h"
    ),
    # x = 0 with a multiplier of zero: dx/dp is -1 on one side and 0 on the other
    "kink": lambda make: program(make, EYE, [0.0, 0.3], [[-1.0, 0.0]], [0.0], None),
    "vmap": lambda make: transformed(make, "vmap"),
    "forward mode": lambda make: transformed(make, "jvp"),
    "second derivative": lambda make: transformed(make, "double"),
}
