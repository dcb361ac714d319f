"""What test_sharded runs in two or four processes: ``torchrun --nproc-per-node 2 sharded_run.py FOLDER``.

Each process leaves ``FOLDER/<rank>.json``: for every case the largest difference to one process, or the error.
"""

import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import meta_problem
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.nn
from sharded_costs import memory, traffic
from sharded_equations import callback, equations, equations_of_four, equilibrium, more_equations
from sharded_models import models, models_of_four, more_models
from sharded_others import other_problems
from sharded_problem import CG, GD, LINEAR, NEWTON, PLACED, SOLVERS, Cases, Tree, difference, gradient, objective, query
from sharded_sets import accelerated, not_a_number, refused_sets, sets, sets_of_four, whole
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import implicitlayer as il
from implicitlayer import _torch


def solvers(cases: Cases) -> None:
    for inner, solver in SOLVERS.items():
        for linear, linear_solver in LINEAR.items():
            layer = il.argmin(objective, solver, linear_solver=linear_solver)
            wanted = cases.alone(layer)
            cases.agree(f"{inner} {linear}", layer, "Shard(1)", Replicate(), wanted)


def rows(cases: Cases) -> None:
    """Data whose rows are shared: the value of the objective is a sum over processes."""
    for linear in ("ConjugateGradient", "Gmres", "Dense"):
        linear_solver = LINEAR[linear]
        layer = il.argmin(objective, NEWTON, linear_solver=linear_solver)
        wanted = cases.alone(layer)
        for placed in PLACED if linear == "ConjugateGradient" else ["Shard(0)"]:
            cases.agree(f"rows {linear} {placed}", layer, placed, Shard(0), wanted)


def unannounced(cases: Cases) -> None:
    theta, data = cases.sharded("Replicate", Replicate())
    mine = slice(5 * dist.get_rank(), 5 * dist.get_rank() + 5)
    inputs, targets = (t[mine] for t in cases.data[:2])

    def local(x: Tree, theta: Tree, *_: Any) -> torch.Tensor:
        return objective({k: v.to_local() for k, v in x.items()}, {k: v.to_local() for k, v in theta.items()}, *_)

    def local_rows(x: Tree, theta: Tree) -> torch.Tensor:
        return local(x, theta, inputs, targets)

    init = {name: leaf.detach() for name, leaf in theta.items()}
    cases.refused("unannounced rows", lambda: il.argmin(local_rows, GD)(init, theta))
    total = torch.distributed.nn.functional.all_reduce

    def local_rows_summed(x: Tree, theta: Tree) -> torch.Tensor:
        return total(local_rows(x, theta))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases.refused("summed by hand", lambda: il.argmin(local_rows_summed, GD)(init, theta))
    # the whole data on every process: plain values that are the same are right
    cases.found["plain value"] = math.nan
    if not _torch.SHARDS_HAVE_SECOND_DERIVATIVES:
        return
    layer = il.argmin(lambda x, theta: local(x, theta, *cases.data[:2]), GD, linear_solver=CG)
    wanted = cases.alone(il.argmin(objective, GD, linear_solver=CG))
    loss = query(layer(init, theta), *data[2:])
    cases.found["plain value"] = difference(list(torch.autograd.grad(loss, list(theta.values()))), wanted)


def other_layers(cases: Cases) -> None:
    """Equations, several problems at once, closed-over tensors, tied tensors, second order, transforms."""
    w1, b = cases.theta["w1"], cases.data[0][:4, 0]
    matrix = w1.mT @ w1 + torch.eye(4)
    sharded = cases.put(matrix, Shard(0)).requires_grad_(), cases.put(b, Shard(0)).requires_grad_()
    x = il.root(lambda x, a, b: a @ x + x**3 - b, il.solvers.Newton())(sharded[1].detach() * 0, *sharded)
    alone = matrix.clone().requires_grad_(), b.clone().requires_grad_()
    y = il.root(lambda x, a, b: a @ x + x**3 - b, il.solvers.Newton())(b * 0, *alone)
    found, wanted = torch.autograd.grad((x**2).sum(), sharded), torch.autograd.grad((y**2).sum(), alone)
    cases.found["root"] = difference(list(found), list(wanted))

    def step(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.tanh(x) + b

    solve = il.fixed_point(step, il.solvers.AndersonAcceleration(rtol=1e-13))
    x, y = solve(sharded[1].detach(), sharded[1]), solve(b, alone[1])
    pair = torch.autograd.grad((x**3).sum(), sharded[1]), torch.autograd.grad((y**3).sum(), alone[1])
    cases.found["fixed_point"] = difference(list(pair[0]), list(pair[1]))

    # x = t / 2 in every entry: (x - t)^2 + x^2
    t = cases.put(w1, Shard(1)).requires_grad_()

    def halves(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return ((x - t) ** 2 + x**2).sum(-1)

    x = il.argmin(halves, GD, batch_dims=1)(t.detach() * 0, t)
    cases.found["batch_dims"] = difference([x], [w1 / 2])
    # one of three problems has no number, and the others are as they were
    layer = il.argmin(halves, il.solvers.NewtonCG(), batch_dims=1, on_failure="mask")
    broken = w1.clone()
    broken[1] = torch.nan
    s = cases.put(broken, Shard(1)).requires_grad_()
    x = layer(t.detach() * 0, s)
    (g,) = torch.autograd.grad(x.sum(), s)
    kept = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)[:, None]
    assert plain(x)[1].isnan().all()
    cases.found["batch_dims, mask"] = difference([x.nan_to_num(), g], [(w1 / 2) * 2 * kept, kept.expand(3, 4)])
    layer = il.argmin(lambda x: halves(x, t).sum(), GD)
    (g,) = torch.autograd.grad(layer(t.detach() * 0).sum(), t)
    cases.found["closed over"] = difference([g], [torch.full((3, 4), 0.5, dtype=torch.float64)])
    # x = t / (1 + s), d sum(x) / ds = -sum(t) / (1 + s)^2 with a plain s; t is cut, so torch has summands of it
    strength = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    shrunk = il.argmin(lambda x, s, t: ((x - t) ** 2).sum() + (s * x**2).sum(), il.solvers.NewtonCG())
    (g,) = torch.autograd.grad(shrunk(t.detach() * 0, strength, t).sum(), strength)
    assert type(g) is torch.Tensor
    cases.found["plain theta"] = abs(g.item() + w1.sum().item() / 9)
    tied = il.argmin(lambda x, a, b: ((x - a) ** 2 + (x - b) ** 2).sum(), GD)
    (g,) = torch.autograd.grad(tied(t.detach() * 0, t, t).sum(), t)
    cases.found["tied"] = difference([g], [torch.ones(3, 4, dtype=torch.float64)])
    x = il.argmin(lambda x, t: halves(x, t).sum(), lambda f, x, t: t / 2)(t.detach() * 0, t)  # it returns a DTensor
    cases.found["own solver"] = difference([x], [w1 / 2])
    # min 1/2 x^2 + x^3 / 3 - t x: x + x^2 = t, dx/dt = 1 / (1 + 2 x), d2x/dt2 = -2 / (1 + 2 x)^3
    s = cases.put(torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64), Shard(0)).requires_grad_()
    cubic = il.argmin(lambda x, t: (x**2 / 2 + x**3 / 3 - t * x).sum(), il.solvers.NewtonCG(rtol=1e-14))
    (first,) = torch.autograd.grad(cubic(s.detach() * 0 + 1, s).sum(), s, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), s)
    x = (torch.sqrt(1 + 4 * s.full_tensor().detach()) - 1) / 2
    cases.found["second order"] = difference([first, second], [1 / (1 + 2 * x), -2 / (1 + 2 * x) ** 3])

    init = t.detach() * 0
    cases.refused("vmap", lambda: torch.vmap(lambda t: il.argmin(halves, GD)(t.detach()[0] * 0, t))(init))
    tangent = torch.ones((), dtype=torch.float64)

    def pushed(s: torch.Tensor) -> torch.Tensor:
        solution: torch.Tensor = shrunk(init, s, t.detach())
        return solution

    cases.refused("jvp", lambda: torch.func.jvp(pushed, (strength.detach(),), (tangent,)))
    cases.refused("vmap of a plain theta", lambda: torch.vmap(pushed)(strength.detach().expand(2)))
    # curvature that turns negative: the message picks the numbers of the lane
    bad = il.argmin(lambda x, t: (-(x**2) + x * t).sum(), lambda f, x, t: t / 2, linear_solver=CG)
    cases.refused("negative curvature", lambda: bad(init, t).sum().backward())


def meta_learners(cases: Cases) -> None:
    """Parameters in parts, and the tasks on every process, or three of them shared by two."""
    theta, *tasks = meta_problem.problem()
    steps = il.solvers.GradientDescent(0.1, max_steps=3)
    methods = {
        "MAML": il.meta.MAML(meta_problem.task_loss, step_size=0.1, num_steps=3, momentum=0.5),
        "TruncatedMAML": il.meta.TruncatedMAML(meta_problem.task_loss, step_size=0.1, num_steps=3, strength=0.7),
        "FirstOrderMAML": il.meta.FirstOrderMAML(meta_problem.task_loss, steps),
        "Reptile": il.meta.Reptile(meta_problem.task_loss, steps, strength=0.7),
        "iMAML LBFGS Gmres": il.meta.iMAML(
            meta_problem.task_loss, il.solvers.LBFGS(), strength=0.7, linear_solver=il.Gmres(rtol=1e-12)
        ),
        # what two steps of conjugate gradients find depends on the metric, which is these strengths
        "iMAML, a strength for each tensor": il.meta.iMAML(
            meta_problem.task_loss,
            steps,
            strength={"u": 0.5, "w": 3.0},
            linear_solver=il.ConjugateGradient(max_steps=2),
        ),
        "iMAML gauss_newton": il.meta.iMAML(
            il.composite(lambda o, batch: (o - batch[1]).square().mean(-1), meta_problem.model),
            steps,
            strength=0.7,
            curvature="gauss_newton",
        ),
    }
    for name, method in methods.items():
        losses = method(theta, *tasks)
        wanted = [losses, *torch.autograd.grad(losses.sum(), list(theta.values()))]
        worst = 0.0
        for how in (Replicate(), Shard(0)):
            cut = {"u": cases.put(theta["u"], Shard(0)), "w": cases.put(theta["w"], Shard(1))}
            cut = {key: leaf.detach().requires_grad_() for key, leaf in cut.items()}
            losses = method(cut, *torch.utils._pytree.tree_map(lambda t, how=how: cases.put(t, how), tasks))
            losses.sum().backward()
            found = [losses, *(leaf.grad for leaf in cut.values())]
            worst = max(worst, difference(found, wanted))
        cases.found[name] = worst


def learners(cases: Cases) -> None:
    """il.meta.iMAML with sharded parameters, and a layer in a module under DDP."""

    def task_loss(x: Tree, target: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((x["w"] - target) ** 2).sum(1)

    method = il.meta.iMAML(task_loss, il.solvers.GradientDescent(0.5, max_steps=60), strength=1.0, linear_solver=CG)
    target = torch.tensor([[4.0, 1.0], [8.0, 3.0]], dtype=torch.float64)
    w = cases.put(torch.zeros(2, dtype=torch.float64), Shard(0)).requires_grad_()
    a = cases.put(target, Replicate())
    method({"w": w}, a, a * 0 + 1).sum().backward()
    # phi = (a + theta) / 2, and the gradient in theta is the sum over tasks of (phi - 1) / 2
    cases.found["iMAML"] = difference([w.grad], [((target / 2 - 1) / 2).sum(0)])

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.Linear(3, 2, dtype=torch.float64)
            self.ridge = Ridge()
            self.layer = il.ArgminLayer(self.ridge, GD, linear_solver=CG)

        def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            z = self.encoder(inputs)
            w = self.layer(torch.zeros(2, 2, dtype=torch.float64), z, targets)
            return ((z @ w - targets) ** 2).sum()

    torch.manual_seed(0)
    model = Model()
    inputs, targets = cases.data[:2]
    halves = [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    (sum(model(*half) for half in halves) / 2).backward()  # DDP takes the mean over processes
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parallel = torch.nn.parallel.DistributedDataParallel(model)  # its hooks live as long as it does
    parallel(*halves[dist.get_rank()]).backward()
    pairs = zip(model.parameters(), wanted, strict=True)
    cases.found["DDP"] = max((p.grad - w).abs().max().item() for p, w in pairs)


class Ridge(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_strength = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, w: torch.Tensor, z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 0.05 * ((z @ w - targets) ** 2).sum() + self.log_strength.exp() * (w**2).sum()


def mlp() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    return torch.nn.Sequential(*layers).double()


def plain(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def fit_of(model: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """``objective`` for the weights of a module, whose activations are plain outside of it."""

    def fit(w: Tree, theta: Tree, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        near = sum(((w[name] - theta[name]) ** 2).sum() for name in w)
        return 0.01 * ((torch.func.functional_call(model, w, (inputs,)) - targets) ** 2).sum() + plain(near)

    return fit


def weights(model: torch.nn.Module, data: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradient of the size of the solution in the weights that it begins at."""
    w = {name: leaf.detach() for name, leaf in model.named_parameters()}
    theta = {name: leaf.clone().requires_grad_() for name, leaf in w.items()}
    x = il.argmin(fit_of(model), il.solvers.NewtonCG(), linear_solver=CG)(w, theta, *data[:2])
    size = plain(sum((leaf**2).sum() for leaf in x.values()))
    return list(torch.autograd.grad(size, list(theta.values())))


def modules(cases: Cases) -> None:
    """Modules cut by torch's own plans."""
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    found = weights(parallelize_module(mlp(), cases.mesh, plan), cases.data)
    assert any(placement.is_shard() for g in found for placement in g.placements)
    cases.found["tensor parallel"] = difference(found, weights(mlp(), cases.data))

    def encoded(encoder: torch.nn.Module) -> torch.Tensor:
        z = encoder(cases.data[0])
        ridge = il.argmin(lambda w, z, y: 0.05 * ((z @ w - y) ** 2).sum() + (w**2).sum(), il.solvers.NewtonCG())
        return ((z @ ridge(torch.zeros(2, 2).double(), z, cases.data[1]) - cases.data[1]) ** 2).sum()

    alone, sharded = mlp(), mlp()
    encoded(alone).backward()
    encoded(fully_shard(sharded, mesh=cases.mesh)).backward()
    pairs = [list(model.parameters()) for model in (sharded, alone)]
    cases.found["FSDP2 around"] = difference(*([p.grad for p in some] for some in pairs))
    cases.refused("FSDP2 inside", lambda: weights(fully_shard(mlp(), mesh=cases.mesh), cases.data))


def saved(cases: Cases) -> None:
    """A checkpoint that four processes write, and any number can read."""
    theta, _ = cases.sharded("Shard(1)", Replicate())
    dcp.save({name: leaf.detach() for name, leaf in theta.items()}, checkpoint_id=cases.folder / "checkpoint")


def loaded(cases: Cases) -> None:
    theta = {name: cases.put(torch.zeros_like(leaf), Shard(0)) for name, leaf in cases.theta.items()}
    dcp.load(theta, checkpoint_id=cases.folder / "checkpoint")
    cases.found["checkpoint"] = difference(list(theta.values()), list(cases.theta.values()))


def four(cases: Cases) -> None:
    """More than two processes, in one row or in a square: rows of data one way, weights the other way."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "weights"))
    for inner, linear in (("NewtonCG", "ConjugateGradient"), ("LBFGS", "ConjugateGradient"), ("NewtonCG", "Gmres")):
        layer = il.argmin(objective, SOLVERS[inner], linear_solver=LINEAR[linear])
        wanted = cases.alone(layer)
        for placed in ("Shard(0)", "Shard(1)"):
            cases.agree(f"four {inner} {linear} {placed}", layer, placed, Shard(0), wanted)
        theta = {
            name: distribute_tensor(leaf, square, [Replicate(), Shard(1)]).requires_grad_()
            for name, leaf in cases.theta.items()
        }
        data = [distribute_tensor(t, square, [Shard(0), Replicate()]) for t in cases.data]
        cases.found[f"2 x 2 {inner} {linear}"] = difference(gradient(layer, theta, data), wanted)


def example(cases: Cases) -> None:
    """The programs of docs/distributed.md, which end in assertions."""
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    first, second = (block.split("```")[0] for block in page.split("## Training")[0].split("```py\n")[1:])
    names: dict[str, Any] = {}
    exec(compile(first, "docs/distributed.md", "exec"), names)
    cases.found["example"] = abs(names["found"] - names["expected"])
    cases.found["modules"] = math.nan
    if _torch.SHARDS_HAVE_SECOND_DERIVATIVES:
        exec(compile(second, "docs/distributed.md", "exec"), names)
        pairs = zip(names["cut"], names["whole"], strict=True)
        cases.found["modules"] = max(abs(float(a) - float(b)) for a, b in pairs)
    _torch.SHARDS_HAVE_SECOND_DERIVATIVES, right = False, _torch.SHARDS_HAVE_SECOND_DERIVATIVES
    theta, _ = cases.sharded("Shard(0)", Replicate())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cases.refused("an old torch", lambda: il.hvp(lambda x: (x["w1"] ** 2).sum(), theta, theta))
    _torch.SHARDS_HAVE_SECOND_DERIVATIVES = right


def layer_decay(cases: Cases) -> None:
    """The program of examples/distributed with a narrow network; it asserts what it prints."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "distributed"))
    import layer_decay

    cases.found["layer decay"] = layer_decay.run(width=16, outer_steps=1)["difference"]


PARTS = {
    2: (
        solvers,
        rows,
        unannounced,
        other_layers,
        equations,
        callback,
        more_equations,
        equilibrium,
        other_problems,
        sets,
        refused_sets,
        not_a_number,
        accelerated,
        whole,
        meta_learners,
        learners,
        modules,
        models,
        more_models,
        traffic,
        loaded,
        example,
    ),
    4: (saved, four, memory, equations_of_four, sets_of_four, models_of_four, layer_decay),
}


def main(folder: Path, size: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch")
    if not _torch.SHARDS_HAVE_SECOND_DERIVATIVES:
        warnings.filterwarnings("ignore", message="torch .* has no second derivatives of DTensor.to_local")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    cases = Cases(folder)
    for part in PARTS[size]:
        part(cases)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(cases.found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["WORLD_SIZE"]))
