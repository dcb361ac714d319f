"""Cases of sharded_run of roots and fixed points, whose residuals and maps go from parts to parts."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from sharded_costs import SHORT, Largest
from sharded_problem import CG, LINEAR, Cases, Tree, difference, gradient
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

import implicitlayer as il

NEWTON = il.solvers.Newton(linear_solver=il.Gmres(rtol=1e-4, restart=15), rtol=1e-13)
ANDERSON = il.solvers.AndersonAcceleration(rtol=1e-13)


def residual(x: Tree, theta: Tree, inputs: torch.Tensor, targets: torch.Tensor) -> Tree:
    """x less a step of gradient descent from theta, taken at x, with two step sizes: it is the gradient of nothing."""
    hidden = torch.tanh(inputs @ x["w1"])
    error = hidden @ x["w2"] - targets
    slope = inputs.mT @ ((error @ x["w2"].mT) * (1 - hidden**2))
    return {"w2": x["w2"] - theta["w2"] + 0.03 * hidden.mT @ error, "w1": x["w1"] - theta["w1"] + 0.01 * slope}


def step(x: Tree, *theta: Any) -> Tree:
    """The map whose fixed points are the roots of :func:`residual`."""
    rest = residual(x, *theta)
    return {name: leaf - rest[name] for name, leaf in x.items()}


LAYERS = {
    "root Newton Gmres": il.root(residual, NEWTON, linear_solver=SHORT),
    "fixed_point AndersonAcceleration Bicgstab": il.fixed_point(step, ANDERSON, linear_solver=il.Bicgstab(rtol=1e-12)),
    "fixed_point AndersonAcceleration Neumann": il.fixed_point(step, ANDERSON, linear_solver=il.Neumann(40)),
    "fixed_point AndersonAcceleration NormalEquations": il.fixed_point(
        step, ANDERSON, linear_solver=il.NormalEquations(il.Minres(rtol=1e-12))
    ),
}
FOUR = ("root Newton Gmres", "fixed_point AndersonAcceleration Bicgstab")


def equations(cases: Cases) -> None:
    """Two weight matrices, the rows of the data shared; then residuals that are not what they say, or not like x."""
    for i, (name, layer) in enumerate(LAYERS.items()):
        cases.agree(name, layer, ("Shard(0)", "Shard(1)")[i % 2], Shard(0), cases.alone(layer))

    # x + tanh(x) / 2 = t + the sum of all rows, of which every process has its own
    t, rows = cases.theta["w1"], cases.data[0][:, None, :1].expand(10, 3, 4)
    mine = rows[5 * dist.get_rank() :][:5].sum(0)

    def root(residual: Callable[..., torch.Tensor], t: torch.Tensor) -> list[torch.Tensor]:
        x = il.root(residual, NEWTON)(t.detach(), t)
        return [x, *torch.autograd.grad((x**2).sum(), t)]

    def announced(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(mine, cases.mesh, [Partial()]) - (x + torch.tanh(x) / 2 - t)

    def unannounced(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return mine - (x + torch.tanh(x) / 2 - t).full_tensor()

    parts, alone = cases.put(t, Shard(1)).requires_grad_(), t.clone().requires_grad_()
    wanted = root(lambda x, t: rows.sum(0) - (x + torch.tanh(x) / 2 - t), alone)
    cases.found["root, Partial"] = difference(root(announced, parts), wanted)
    cases.refused("root, unannounced rows", lambda: root(unannounced, parts))
    theta, _ = cases.sharded("Shard(1)", Replicate())
    init = {name: leaf.detach() for name, leaf in theta.items()}
    cases.refused("root, too few equations", lambda: il.root(lambda x, t: x["w1"] - t["w1"], NEWTON)(init, theta))


def more_equations(cases: Cases) -> None:
    """Plain leaves beside DTensors, second derivatives, a problem without a number, a maximum: as on one process."""
    t, s = cases.theta["w1"], cases.data[0][0]

    def both(name: str, function: Callable[..., list[torch.Tensor]], values: torch.Tensor = t) -> None:
        alone, cut = values.clone().requires_grad_(), cases.put(values, Shard(1)).requires_grad_()
        cases.found[name] = difference(function(cut), function(alone))

    def whole(value: torch.Tensor) -> torch.Tensor:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def mixed(t: torch.Tensor) -> list[torch.Tensor]:
        def coupled(x: Tree, t: torch.Tensor) -> Tree:
            b = x["b"] + 0.01 * x["b"].sum() ** 2 + 0.01 * whole((x["a"] ** 2).sum()) - s
            return {"b": b, "a": x["a"] + 0.3 * torch.tanh(x["a"]) - t}

        x = il.root(coupled, NEWTON)({"a": t.detach() * 0, "b": s * 0}, t)
        return [x["a"], *torch.autograd.grad(whole((x["a"] ** 2).sum()) + (x["b"] ** 3).sum(), t)]

    def second(t: torch.Tensor) -> list[torch.Tensor]:
        turned = il.root(lambda x, t: x + torch.tanh(x) * (1 + 0.1 * (x * t).sum()) - t, NEWTON, linear_solver=SHORT)
        x = turned(t.detach() * 0, t)
        (first,) = torch.autograd.grad((x**2).sum(), t, create_graph=True)
        return [x, first, *torch.autograd.grad((first**2).sum(), t)]

    def masked(t: torch.Tensor) -> list[torch.Tensor]:
        layer = il.fixed_point(lambda x, t: torch.cos(x) / 2 + t, ANDERSON, batch_dims=1, on_failure="mask")
        x = layer(torch.zeros_like(t.detach()), t)
        assert whole(x).isnan().all(1).tolist() == [False, True, False]
        return [x.nan_to_num(), *torch.autograd.grad(x.nan_to_num().sum(), t)]

    broken = t.clone()
    broken[1, 2] = torch.nan
    both("root, a plain leaf", mixed)
    both("root, second order", second)
    both("fixed_point, mask", masked, broken)
    unmoved = il.argmin(lambda x, t: -(x**2).sum() + (x * t).sum(), il.solvers.GradientDescent(0.1, max_steps=0))
    cut = cases.put(t, Shard(1)).requires_grad_()
    cases.refused("a maximum", lambda: unmoved(cut.detach() / 2, cut).sum().backward())


def callback(cases: Cases) -> None:
    """What listens to a solver sees whole plain tensors, the same everywhere."""
    seen: list[Any] = []
    theta, data = cases.sharded("Shard(1)", Replicate())
    listened = il.solvers.AndersonAcceleration(rtol=1e-13, callback=seen.append)
    x = il.fixed_point(step, listened)({name: leaf.detach() for name, leaf in theta.items()}, theta, *data[:2])
    assert all(type(leaf) is torch.Tensor for leaf in seen[-1].x.values())
    cases.found["a callback"] = difference(list(x.values()), list(seen[-1].x.values()))


def equilibrium(cases: Cases) -> None:
    """A deep equilibrium model, whose features lie on several processes and whose weights it closes over."""
    inputs, weights = cases.data[0][:, :2].repeat(1, 3), cases.data[0][:6, :].repeat(1, 2) / 8

    def found(u: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        model = il.DeepEquilibrium(lambda z, u: torch.tanh(z @ w + u), solver=ANDERSON, linear_solver=LINEAR["Gmres"])
        z = model(u)
        return [z, *torch.autograd.grad((z**3).sum(), [u, w])]

    cut = [cases.put(tensor, Shard(1)).requires_grad_() for tensor in (inputs, weights)]
    cases.found["DeepEquilibrium"] = difference(
        found(*cut), found(*(tensor.clone().requires_grad_() for tensor in (inputs, weights)))
    )


def equations_of_four(cases: Cases) -> None:
    """A mesh of two by two, and the largest vector that one of four processes makes."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "weights"))
    theta = {key: distribute_tensor(leaf, square, [Replicate(), Shard(1)]) for key, leaf in cases.theta.items()}
    theta = {key: leaf.requires_grad_() for key, leaf in theta.items()}
    data = [distribute_tensor(t, square, [Shard(0), Replicate()]) for t in cases.data]
    cases.found[f"2 x 2 {FOUR[1]}"] = difference(gradient(LAYERS[FOUR[1]], theta, data), cases.alone(LAYERS[FOUR[1]]))

    draw = torch.Generator().manual_seed(1)
    sizes = {"w1": (16, 64), "w2": (64, 4)}
    plain = {key: torch.randn(*size, generator=draw, dtype=torch.float64) / 16 for key, size in sizes.items()}
    size = sum(leaf.numel() for leaf in plain.values())
    given = [cases.put(torch.randn(4, width, generator=draw, dtype=torch.float64), Replicate()) for width in (16, 4)]
    for name in FOUR:
        theta = {"w1": cases.put(plain["w1"], Shard(1)), "w2": cases.put(plain["w2"], Shard(0))}
        theta = {key: leaf.requires_grad_() for key, leaf in theta.items()}
        with Largest(size // 4) as seen:
            x = LAYERS[name]({key: leaf.detach() for key, leaf in theta.items()}, theta, *given)
            torch.autograd.grad(sum((leaf**2).sum() for leaf in x.values()), list(theta.values()))
        cases.found[f"memory {name}"] = f"1 / {size / seen.entries:g} of the unknowns"
    systems: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "linear_solve of a function": lambda t: il.linear_solve(lambda u, t: u * (1 + t**2), t.detach(), CG, t),
        "hvp": lambda t: il.hvp(quartic, t, t.detach()),
        "hessian_operator": lambda t: il.linear_solve(il.hessian_operator(quartic, t), t.detach(), CG),
    }
    for name, function in systems.items():
        t = cases.put(plain["w1"], Shard(1)).requires_grad_()
        with Largest() as seen:
            torch.autograd.grad((function(t) ** 2).sum(), t)
        cases.found[f"memory {name}"] = f"1 / {t.numel() / seen.entries:g} of the unknowns"


def quartic(x: torch.Tensor) -> torch.Tensor:
    return (x**4).sum() + (x**2).sum()
