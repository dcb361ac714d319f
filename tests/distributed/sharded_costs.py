"""What the sharded solves of sharded_run cost: messages between processes, and the memory of each."""

import warnings
from typing import Any

import torch
from sharded_problem import LINEAR, SOLVERS, Cases, objective, query
from torch.distributed.tensor import Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

import implicitlayer as il
from implicitlayer.base._parts import Parts

SHORT = il.Gmres(rtol=1e-12, restart=15)  # its small matrices have fewer entries than a part of the unknowns


class Watching(TorchDispatchMode):
    """Sees the operations on what lies on this process, inside of DTensors and vectors in parts too."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is Parts or hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # it comes here again with what it consists of
        result = op(*args, **(kwargs or {}))
        self.see(op, args, result)
        return result

    def see(self, op: Any, args: Any, result: Any) -> None:
        raise NotImplementedError


class Traffic(Watching):
    """Collectives, and the bytes that a process gives to them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def see(self, op: Any, args: Any, result: Any) -> None:
        functional = op.namespace == "_c10d_functional" and not op.__name__.startswith(("wait", "_wrap"))
        if functional or op.namespace == "c10d":
            given = args[0] if functional else args[1][0]
            self.count, self.bytes = self.count + 1, self.bytes + given.numel() * given.element_size()


class Largest(Watching):
    """The most entries of a tensor that was made.

    ``vector``: a last dimension of that length is one vector of several, as those of GMRES are, which count one by one.
    """

    def __init__(self, vector: int = 0) -> None:
        super().__init__()
        self.vector, self.entries = vector, 0

    def see(self, op: Any, args: Any, result: Any) -> None:
        given, found = (
            {
                t.untyped_storage()._cdata: t
                for t in torch.utils._pytree.tree_leaves(tree)
                if isinstance(t, torch.Tensor)
            }
            for tree in (args, result)
        )
        for memory_of, made in found.items():
            if memory_of not in given and made.untyped_storage().device.type != "meta":  # a view was counted before
                entries = made.untyped_storage().nbytes() // made.element_size()
                self.entries = max(self.entries, self.vector if made.shape[-1:] == (self.vector,) else entries)


def memory(cases: Cases) -> None:
    """The largest tensor of a solve and of its derivative, where columns of w1 and rows of w2 lie on one process."""
    draw = torch.Generator().manual_seed(1)
    descent = il.solvers.GradientDescent(0.2, max_steps=200, rtol=1e-12)  # a wide network is steeper
    plain = {
        "w1": torch.randn(16, 64, generator=draw, dtype=torch.float64) / 4,
        "w2": torch.randn(64, 4, generator=draw, dtype=torch.float64) / 8,
    }
    size = sum(leaf.numel() for leaf in plain.values())
    data = [torch.randn(4, width, generator=draw, dtype=torch.float64) for width in (16, 4)]
    for inner, linear in (("GradientDescent", "ConjugateGradient"), ("NewtonCG", "Minres"), ("LBFGS", "Gmres")):
        theta = {"w1": cases.put(plain["w1"], Shard(1)), "w2": cases.put(plain["w2"], Shard(0))}
        theta = {name: leaf.requires_grad_() for name, leaf in theta.items()}
        given = [cases.put(t, Replicate()) for t in data]
        solver = descent if inner == "GradientDescent" else SOLVERS[inner]
        linear_solver = SHORT if linear == "Gmres" else LINEAR[linear]
        layer = il.argmin(objective, solver, linear_solver=linear_solver)
        with Largest(size // 4 if linear == "Gmres" else 0) as seen:
            x = layer({name: leaf.detach() for name, leaf in theta.items()}, theta, *given)
            torch.autograd.grad(sum((leaf**2).sum() for leaf in x.values()), list(theta.values()))
        cases.found[f"memory {inner} {linear}"] = f"1 / {size / seen.entries:g} of the unknowns"
    tasks = [cases.put(t.expand(3, *t.shape), Replicate()) for t in data]

    def task_loss(p: dict[str, torch.Tensor], batch: list[torch.Tensor]) -> torch.Tensor:
        return ((torch.tanh(batch[0] @ p["w1"]) @ p["w2"] - batch[1]) ** 2).sum((1, 2))

    method = il.meta.iMAML(task_loss, il.solvers.GradientDescent(0.1, max_steps=5), strength=2.0)
    with Largest() as seen:
        torch.autograd.grad(method(theta, tasks, tasks).sum(), list(theta.values()))
    cases.found["memory iMAML"] = f"1 / {3 * size / seen.entries:g} of the unknowns"


def traffic(cases: Cases) -> None:
    """What one more step of conjugate gradients says to other processes."""
    for placed in ("Replicate", "Shard(0)", "Shard(1)"):
        for rows in (Replicate(), Shard(0)):
            theta, data = cases.sharded(placed, rows)
            told = []
            for steps in (3, 4):
                linear = il.ConjugateGradient(max_steps=steps)
                layer = il.argmin(objective, il.solvers.GradientDescent(0.4, max_steps=3), linear_solver=linear)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # three steps of either solver are no solution
                    x = layer({name: leaf.detach() for name, leaf in theta.items()}, theta, *data[:2])
                    loss = query(x, *data[2:])
                    with Traffic() as seen:
                        torch.autograd.grad(loss, list(theta.values()))
                told.append((seen.count, seen.bytes))
            count, size = (after - before for before, after in zip(*told, strict=True))
            shared = "shared" if rows.is_shard() else "whole"
            cases.found[f"step {placed}, {shared} data"] = f"{count} collectives, {size} bytes"
