"""Cases of sharded_run with sets and regularisers, whose unknowns stay in parts where the term allows that."""

from copy import copy
from dataclasses import replace
from typing import Any

import torch
from sharded_costs import SHORT, Largest
from sharded_problem import CG, Cases, difference
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import implicitlayer as il

PROXIMAL = il.solvers.ProximalGradient(rtol=1e-13)


def halves(x: Any, theta: Any, *_: Any) -> torch.Tensor:
    """Least at theta / 2."""
    x, theta = (tree.values() if isinstance(tree, dict) else [tree] for tree in (x, theta))
    return sum((((a - b) ** 2 + a**2).sum() for a, b in zip(x, theta, strict=True)), start=torch.zeros(()).double())


def solution(layer: Any, *theta: Any) -> list[Any]:
    """The answer and the entries that the term holds, which lie on processes as the unknowns do."""
    x = layer(torch.utils._pytree.tree_map(lambda leaf: leaf.detach() * 0, theta[0]), *theta)
    held = torch.utils._pytree.tree_leaves(layer.records[0].active_set.active)
    leaves = torch.utils._pytree.tree_leaves(x)
    assert all(
        getattr(a, "placements", None) == getattr(b, "placements", None) for a, b in zip(held, leaves, strict=True)
    )
    return [*leaves, *(mask.double() for mask in held)]


class Below(il.sets.ConvexSet):
    """The sum of all entries is at most 1: a set of one's own, in code that is right for DTensors."""

    in_parts = True

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        return y - torch.relu(y.sum() - 1) / y.numel()


def sets(cases: Cases) -> None:
    """Every set and regulariser, with data of one number, of the last dimension, and of every entry."""
    t, w2 = cases.theta["w1"], cases.theta["w2"]
    one, row = torch.tensor(0.3, dtype=torch.float64), cases.data[2][:2].flatten()[:4].abs()

    def same(name: str, kind: str, term: Any, *data: tuple[torch.Tensor, str], **how: Any) -> None:
        cases.same(name, lambda *theta: solution(il.argmin(halves, PROXIMAL, **{kind: term}, **how), *theta), *data)

    for how in "01":
        same(f"Box {how}", "constraint", lambda t, u, p: il.sets.Box(-p, u), (t, how), (one, "whole"), (row, "0"))
    same("Box, a bound for each entry", "constraint", lambda t: il.sets.Box(-t.abs() / 4, 1), (t, "1"))
    same("NonNegative", "constraint", il.sets.NonNegative(), (t, "1"))
    same("L1", "regularizer", lambda t, s: il.L1(s), (t, "0"), (one, "whole"))
    same("L1, a strength for each column", "regularizer", lambda t, s: il.L1(s), (t, "1"), (row, "whole"))
    same("ElasticNet", "regularizer", lambda t, s, p: il.ElasticNet(s, p), (t, "0"), (one, "whole"), (row, "0"))
    same("Ball", "constraint", lambda t, r, c: il.sets.Ball(r, c), (t, "1"), (one, "whole"), (row, "whole"))
    same("Simplex", "constraint", lambda t, r: il.sets.Simplex(r), (t, "1"), (one, "whole"))
    same("GroupL1", "regularizer", lambda t, r: il.GroupL1(r), (t, "1"), (one, "whole"))
    slices(cases, "")
    rows = torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.float64)
    same("GroupL1, of each row", "regularizer", lambda t, s: il.GroupL1(s, dim=-1), (t, "0"), (rows, "whole"))
    same("a set of one's own", "constraint", Below(), (t.abs(), "0"))
    same("Prox", "regularizer", il.Prox(lambda y, s, _, p: y / (1 + s * p)), (t, "0"), (one, "whole"))

    def two_leaves(term: Any) -> Any:
        def found(a: torch.Tensor, b: torch.Tensor, s: torch.Tensor) -> list[Any]:
            layer = il.argmin(lambda x, tree, s: halves(x, tree), PROXIMAL, constraint=lambda tree, s: term(tree, s))
            return solution(layer, {"a": a, "b": b}, s)

        return found

    given = (t, "1"), (w2, "0"), (one, "whole")
    cases.same(
        "Box, a tree of bounds", two_leaves(lambda tree, s: il.sets.Box({"a": -s, "b": -tree["b"].abs()}, s)), *given
    )
    cases.same("a set for each leaf", two_leaves(lambda _, s: {"a": il.sets.Box(-s, s), "b": il.sets.Ball(s)}), *given)
    ones = torch.ones(1, t.numel()).double()
    mixed = two_leaves(lambda _, s: {"a": il.sets.Affine(ones, s.reshape(1)), "b": il.GroupL1(s, dim=-1)})
    cases.same("a set for each leaf, one whole", mixed, *given)
    cases.same("a set for each leaf, one free", two_leaves(lambda _, s: {"a": None, "b": il.sets.Simplex(s)}), *given)
    bent = two_leaves(lambda tree, s: {"a": il.GroupL1(s * s, dim=-2), "b": il.sets.Ball(s.sin(), tree["b"].tanh())})

    def curved(*theta: torch.Tensor) -> Any:
        size = sum((leaf**2).sum() for leaf in bent(*theta)[:2])
        return torch.autograd.grad(size, theta, create_graph=True)

    cases.same("a set for each leaf, second order", curved, *given)

    layer = il.argmin(
        lambda x, t, u: ((x - t) ** 2 + x**2).sum(-1),
        PROXIMAL,
        constraint=lambda t, u: il.sets.Box(-u, u),
        batch_dims=1,
    )
    cases.same("batch_dims, a set", lambda *theta: solution(layer, *theta), (t, "1"), (rows, "whole"))
    grouped = replace(layer, terms=lambda t, u: il.GroupL1(u), terms_name="regularizer")
    cases.same("batch_dims, GroupL1", lambda *theta: solution(grouped, *theta), (t, "1"), (rows, "whole"))

    cut = cases.put(t, Shard(1)).requires_grad_()
    unaware = il.argmin(halves, lambda f, x, t: t / 2, constraint=il.sets.NonNegative())
    cases.refused("outside of a set", lambda: unaware(cut.detach(), cut))
    unmoved = il.argmin(halves, il.solvers.ProximalGradient(max_steps=0), constraint=il.sets.NonNegative())
    cases.refused("outside of a set, in parts", lambda: unmoved(cut.detach() / 2, cut))
    # the threshold of the lasso is where the gradient of one entry is: x = (t - s / 2)+ / 2
    kinked = il.argmin(halves, PROXIMAL, regularizer=il.L1(2 * t[0, 1].abs().item()), on_failure="raise")
    cases.refused("a kink", lambda: kinked(cut.detach() * 0, cut))
    down = il.argmin(
        lambda x, t: -halves(x, t), lambda f, x, t: t / 2, constraint=il.sets.Ball(50.0), on_failure="raise"
    )
    cases.refused("a maximum within a set", lambda: down(cut.detach(), cut).sum().backward())


def slices(cases: Cases, prefix: str) -> None:
    """Columns that lie on one process, and columns that are cut; five rows on four processes leave one without."""
    t, one = torch.cat([cases.theta["w1"], cases.theta["w1"][:2].cos()]), torch.tensor(0.3, dtype=torch.float64)
    row = cases.data[2][:2].flatten()[:4].abs()

    def same(name: str, kind: str, term: Any, *data: tuple[torch.Tensor, str]) -> None:
        layer = il.argmin(halves, PROXIMAL, **{kind: term})
        cases.same(prefix + name, lambda *theta: solution(layer, *theta), *data)

    for how, what in (("1", "of each column"), ("0", "of each column, cut")):
        same(f"Simplex, {what}", "constraint", lambda t, r: il.sets.Simplex(r, dim=-2), (t, how), (one, "whole"))
        same(f"GroupL1, {what}", "regularizer", lambda t, s: il.GroupL1(s, dim=-2), (t, how), (row, "whole"))


def accelerated(cases: Cases) -> None:
    """Nesterov's method, and linear solves that begin at the answers of the last ones."""
    from sharded_problem import objective

    for name, solver in {
        "AcceleratedGradient": il.solvers.AcceleratedGradient(rtol=1e-13),
        "GradientDescent, searched steps": il.solvers.GradientDescent(0.4, rtol=1e-13, line_search="armijo"),
    }.items():
        layer = il.argmin(objective, solver, linear_solver=CG)
        cases.agree(name, layer, "Shard(1)", Shard(0), cases.alone(layer))
    for inner in (CG, il.Gmres(rtol=1e-13)):
        layer = il.argmin(objective, il.solvers.NewtonCG(rtol=1e-13), linear_solver=il.WarmStart(inner))
        wanted = cases.alone(il.argmin(objective, il.solvers.NewtonCG(rtol=1e-13), linear_solver=inner))
        for call in ("first", "second"):
            cases.agree(f"WarmStart {type(inner).__name__}, {call} call", layer, "Shard(1)", Shard(0), wanted)


def whole(cases: Cases) -> None:
    """Solvers that see the unknowns as whole plain tensors."""
    t = cases.data[0][0]

    def smooth(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return ((x - t) ** 2).sum() + (x**4).sum()

    def residual(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x + x**3 - t

    layers = {
        "TorchOptimizer": il.argmin(
            smooth, il.solvers.TorchOptimizer(torch.optim.LBFGS, max_steps=9, tolerance_grad=1e-14, tolerance_change=0)
        ),
        "SciPyMinimize": il.argmin(smooth, il.solvers.SciPyMinimize("BFGS"), polish=3),
        "LBFGS, bounds": il.argmin(smooth, il.solvers.LBFGS(rtol=1e-14), constraint=il.sets.Box(-0.3, 0.3)),
        "Broyden": il.root(residual, il.solvers.Broyden(rtol=1e-14)),
    }
    for name, layer in layers.items():
        cases.same(name, lambda t, layer=layer: layer(t.detach() * 0.5, t), (t, "0"))


def not_a_number(cases: Cases) -> None:
    """NaN in the part of the last process is NaN in the whole of its slice, and in no other one."""
    y = torch.arange(20, dtype=torch.float64).reshape(5, 4)
    y[-1, -1] = torch.nan
    terms = {"Simplex": il.sets.Simplex(dim=-2), "GroupL1": il.GroupL1(1.0, dim=-2)}
    for name, term in terms.items():
        near, wanted = term.prox(cases.put(y, Shard(0))), term.prox(y)
        assert bool(wanted[:, -1].isnan().all()) and not bool(wanted[:, :-1].isnan().any())
        cases.found[f"{name}, NaN in a column"] = difference([near.nan_to_num(1e9)], [wanted.nan_to_num(1e9)])


def refused_sets(cases: Cases) -> None:
    """Data that are wrong in the part of the last process are refused on all."""
    lower = torch.arange(8.0, dtype=torch.float64).reshape(4, 2)
    lower[-1, -1] = torch.nan
    cases.refused("a set with NaN on one process", lambda: il.sets.Box(cases.put(lower, Shard(0)), 9.0))
    upper = torch.where(lower.isnan(), -1.0, 9.0)
    cases.refused(
        "an empty box on one process",
        lambda: il.sets.Box(cases.put(lower.nan_to_num(0.5), Shard(0)), cases.put(upper, Shard(0))),
    )


def sets_of_four(cases: Cases) -> None:
    """Slices that are cut, and the largest vector that one of four processes makes."""
    slices(cases, "four ")
    square = copy(cases)
    square.mesh = init_device_mesh("cpu", (2, 2))
    ways = {Shard(0): [Shard(0), Shard(1)], Shard(1): [Shard(0), Shard(0)], Replicate(): [Replicate(), Replicate()]}
    square.put = lambda tensor, how: distribute_tensor(tensor, square.mesh, ways[how])
    slices(square, "2 x 2 ")
    draw = torch.Generator().manual_seed(1)
    t, row = torch.randn(64, 16, generator=draw, dtype=torch.float64), torch.rand(16, generator=draw).double()
    terms: dict[str, dict[str, Any]] = {
        "Box": {"constraint": lambda t, u: il.sets.Box(-t.abs() / 4, u)},
        "L1": {"regularizer": lambda t, u: il.L1(u)},
        "Ball": {"constraint": lambda t, u: il.sets.Ball(1.0, u)},
        "Simplex": {"constraint": lambda t, u: il.sets.Simplex(u.sum())},
        "Simplex, of each row": {"constraint": lambda t, u: il.sets.Simplex(u.sum(), dim=-1)},
        "Simplex, of each column, cut": {"constraint": lambda t, u: il.sets.Simplex(u.sum(), dim=-2)},
        "GroupL1, of each column, cut": {"regularizer": lambda t, u: il.GroupL1(u, dim=-2)},
        "a set for each leaf": {"constraint": lambda t, u: {"a": il.sets.Ball(1.0), "b": il.sets.Box(-u, u)}},
    }
    for name, term in terms.items():
        parts = [cases.put(part, Shard(0)).requires_grad_() for part in (t.split(32) if "leaf" in name else [t])]
        theta = dict(zip("ab", parts, strict=True)) if len(parts) > 1 else parts[0]
        u = cases.put(row, Replicate()).requires_grad_()
        layer = il.argmin(halves, PROXIMAL, linear_solver=SHORT, **term)
        with Largest(t.numel() // 4) as seen:
            x = layer(torch.utils._pytree.tree_map(lambda leaf: leaf.detach() * 0, theta), theta, u)
            leaves = torch.utils._pytree.tree_leaves(x)
            torch.autograd.grad(sum((leaf**2).sum() for leaf in leaves), [*parts, u], materialize_grads=True)
        assert all(isinstance(leaf, DTensor) for leaf in leaves)
        cases.found[f"memory {name}"] = f"1 / {t.numel() / seen.entries:g} of the unknowns"
