"""The problem that the processes of sharded_run solve in parts, and the answers of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import implicitlayer as il

Tree = dict[str, torch.Tensor]
GD, CG = il.solvers.GradientDescent(0.4, max_steps=200, rtol=1e-12), il.ConjugateGradient(rtol=1e-12)
NEWTON = il.solvers.NewtonCG(rtol=1e-12)  # without a tolerance four times as many steps, the last ones in rounding
SOLVERS = {"GradientDescent": GD, "NewtonCG": NEWTON, "LBFGS": il.solvers.LBFGS(rtol=1e-12)}
LINEAR = {
    "ConjugateGradient": CG,
    "Minres": il.Minres(rtol=1e-12),
    "Gmres": il.Gmres(rtol=1e-12),
    "Dense": il.Dense(rtol=1e-12),
}
# w1 [3, 4], w2 [4, 2]; two processes share three rows unevenly
PLACED = {"Shard(0)": [Shard(0)] * 2, "Shard(1)": [Shard(1)] * 2, "Replicate": [Replicate()] * 2}


def network(x: Tree, inputs: torch.Tensor) -> torch.Tensor:
    return torch.tanh(inputs @ x["w1"]) @ x["w2"]


def objective(x: Tree, theta: Tree, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A fit plus the proximal term, whose Hessian is 2 I: with the fit's small weight GD at 0.4 needs few steps."""
    near = sum(((x[name] - theta[name]) ** 2).sum() for name in x)
    return 0.01 * ((network(x, inputs) - targets) ** 2).sum() + near


def problem() -> tuple[Tree, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    theta = {"w1": normal(3, 4), "w2": normal(4, 2)}
    return theta, [normal(10, 3), normal(10, 2), normal(8, 3), normal(8, 2)]


def query(x: Tree, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return ((network(x, inputs) - targets) ** 2).sum()


def gradient(layer: Any, theta: Tree, data: list[torch.Tensor], function: Callable[..., Any] = query) -> list[Any]:
    x = layer({name: leaf.detach() for name, leaf in theta.items()}, theta, *data[:2])
    return list(torch.autograd.grad(function(x, *data[2:]), list(theta.values())))


def difference(found: list[Any], wanted: list[torch.Tensor]) -> float:
    return max((g.full_tensor().cpu() - w).abs().max().item() for g, w in zip(found, wanted, strict=True))


class Cases:
    """The sharded problem, its answers on one process, and what is found."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder = folder
        self.mesh = init_device_mesh(device, (dist.get_world_size(),))
        self.theta, self.data = problem()
        self.found: dict[str, Any] = {}

    def sharded(self, placed: str, rows: Any) -> tuple[Tree, list[torch.Tensor]]:
        pairs = zip(self.theta.items(), PLACED[placed], strict=True)
        theta = {name: self.put(leaf, how).requires_grad_() for (name, leaf), how in pairs}
        return theta, [self.put(t, rows) for t in self.data]

    def put(self, tensor: torch.Tensor, how: Any) -> DTensor:
        return distribute_tensor(tensor, self.mesh, [how])

    def alone(self, layer: Any, function: Callable[..., Any] = query) -> list[torch.Tensor]:
        theta = {name: leaf.clone().requires_grad_() for name, leaf in self.theta.items()}
        return gradient(layer, theta, self.data, function)

    def agree(self, name: str, layer: Any, placed: str, rows: Any, wanted: list[torch.Tensor]) -> None:
        theta, data = self.sharded(placed, rows)
        found = gradient(layer, theta, data)
        assert all(type(g) is DTensor for g in found)
        self.found[name] = difference(found, wanted)

    def same(self, name: str, function: Callable[..., Any], *data: tuple[torch.Tensor, str]) -> None:
        """What a function of DTensors returns, and its gradient in each of them, which is placed as it is."""
        ways = {"0": Shard(0), "1": Shard(1), "whole": Replicate()}
        alone = [tensor.clone().requires_grad_() for tensor, _ in data]
        parts = [self.put(tensor, ways[how]).requires_grad_() for tensor, how in data]
        found = []
        for given in (parts, alone):
            values = [value for value in torch.utils._pytree.tree_leaves(function(*given)) if value.numel()]
            size = sum((value**2).sum() for value in values if value.requires_grad)
            found.append([*values, *torch.autograd.grad(size, given, materialize_grads=True)])
        assert [g.placements for g in found[0][-len(data) :]] == [part.placements for part in parts]
        self.found[name] = difference(found[0], found[1])

    def refused(self, name: str, run: Callable[[], object]) -> None:
        try:
            run()
            self.found[name] = "no error"
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", ()))  # from Python 3.11 on
            self.found[name] = f"{type(error).__name__}: {error} {notes}"
