"""Cases of sharded_run with objectives that tell their model: Gauss-Newton products and Levenberg-Marquardt."""

import torch
from sharded_costs import Largest
from sharded_problem import CG, LINEAR, PLACED, Cases, Tree, difference, gradient, network
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

import implicitlayer as il

FIT = 0.02  # weight of the fit: its curvature is of the size of that of the proximal term


def outputs(x: Tree, theta: Tree, inputs: torch.Tensor, targets: torch.Tensor) -> Tree:
    """In summands where rows of w2 lie on several processes."""
    return {"fit": network(x, inputs), **{name: x[name] - theta[name] for name in x}}


def loss(found: Tree, theta: Tree, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Convex in the outputs, with a curvature that depends on them."""
    error = found["fit"] - targets
    return FIT * torch.log(torch.cosh(error)).sum() + sum((found[name] ** 2).sum() for name in theta)


def residuals(x: Tree, theta: Tree, inputs: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    return [FIT * (network(x, inputs) - targets), *(x[name] - theta[name] for name in x)]


OBJECTIVE, SQUARES = il.composite(loss, outputs), il.least_squares(residuals)
GAUSS_NEWTON = il.solvers.NewtonCG(rtol=1e-12, curvature="gauss_newton")
MARQUARDT = il.solvers.LevenbergMarquardt(rtol=1e-12)
LAYERS = {
    "gauss_newton ConjugateGradient": il.argmin(OBJECTIVE, GAUSS_NEWTON, linear_solver=CG, curvature="gauss_newton"),
    "gauss_newton Dense": il.argmin(OBJECTIVE, GAUSS_NEWTON, linear_solver=LINEAR["Dense"], curvature="gauss_newton"),
    "LevenbergMarquardt": il.argmin(SQUARES, MARQUARDT, linear_solver=CG),
    "LevenbergMarquardt gauss_newton": il.argmin(SQUARES, MARQUARDT, linear_solver=CG, curvature="gauss_newton"),
}


def models(cases: Cases) -> None:
    """Every placement of the unknowns, the rows of the data shared and on every process."""
    for name, layer in LAYERS.items():
        wanted = cases.alone(layer)
        for placed in PLACED if "Dense" not in name else ["Shard(1)"]:
            cases.agree(f"{name} {placed}", layer, placed, Shard(0), wanted)
        cases.agree(f"{name} Shard(0), whole data", layer, "Shard(0)", Replicate(), wanted)


def more_models(cases: Cases) -> None:
    """Operators, tensors closed over, plain outputs, second derivatives, several problems, meta-learning."""
    t, rows = cases.theta["w1"], cases.data[0]

    def fitted(x: torch.Tensor, inputs: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
        return [FIT * torch.tanh(inputs @ x), x - t]

    squares = il.least_squares(fitted)

    def product(x: torch.Tensor, v: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        operator = il.hessian_operator(squares, x, inputs, x.detach(), curvature="gauss_newton")
        product: torch.Tensor = operator(v)
        return product

    def solved(x: torch.Tensor, v: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        operator = il.hessian_operator(squares, x, inputs, x.detach(), curvature="gauss_newton")
        return il.linear_solve(operator, v, CG)

    for how in "01":
        given = (t, how), (2 * t.flip(0), how), (rows, "0")
        cases.same(f"gauss_newton product {how}", product, *given)
        cases.same(f"gauss_newton linear_solve {how}", solved, *given)

    def second(t: torch.Tensor, inputs: torch.Tensor) -> list[torch.Tensor]:
        closed = il.least_squares(lambda x: fitted(x, inputs, t))
        x = il.argmin(closed, GAUSS_NEWTON, linear_solver=CG, curvature="gauss_newton")(t.detach())
        (first,) = torch.autograd.grad((x**3).sum(), t, create_graph=True)
        return [x, first]

    cases.same("gauss_newton, closed over, second order", second, (t, "1"), (rows, "0"))

    def many(t: torch.Tensor) -> torch.Tensor:
        objective = il.composite(
            lambda o, t: 0.5 * (o[0] ** 2 + o[1] ** 2).sum(-1), lambda x, t: [x + 0.1 * x**2 - t, 0.3 * x]
        )
        layer = il.argmin(objective, MARQUARDT, batch_dims=1, linear_solver=CG, curvature="gauss_newton")
        found: torch.Tensor = layer(t.detach() * 0, t)
        return found

    cases.same("LevenbergMarquardt, batch_dims", many, (t, "1"))
    down = il.composite(lambda o, t: (o - t).square().sum(), lambda x, t: x**3 - 2 * x)
    repaired = il.argmin(
        down, lambda f, x, t: t * 0 + 0.1, linear_solver=CG, negative_curvature="gauss_newton", on_failure="ignore"
    )
    cases.same("negative_curvature gauss_newton", lambda t: repaired(t.detach() * 0, t), (t.abs() + 9, "1"))


def models_of_four(cases: Cases) -> None:
    """A row and a square of processes, and the largest tensor that one of them makes."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "weights"))
    for name in ("gauss_newton ConjugateGradient", "LevenbergMarquardt gauss_newton"):
        wanted = cases.alone(LAYERS[name])
        cases.agree(f"four {name}", LAYERS[name], "Shard(1)", Shard(0), wanted)
        pairs = cases.theta.items()
        theta = {key: distribute_tensor(leaf, square, [Replicate(), Shard(0)]).requires_grad_() for key, leaf in pairs}
        data = [distribute_tensor(t, square, [Shard(0), Replicate()]) for t in cases.data]
        cases.found[f"2 x 2 {name}"] = difference(gradient(LAYERS[name], theta, data), wanted)

    draw = torch.Generator().manual_seed(1)
    w1, w2, inputs = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((16, 64), (64, 4), (4, 16)))
    x = {"w1": cases.put(w1, Shard(1)).requires_grad_(), "w2": cases.put(w2, Shard(0)).requires_grad_()}
    squares, rows = il.least_squares(network), cases.put(inputs, Replicate())
    with Largest() as seen:
        operator = il.hessian_operator(squares, x, rows, curvature="gauss_newton", damping=9.0)
        u = il.linear_solve(operator, {name: leaf.detach() for name, leaf in x.items()}, CG)
        torch.autograd.grad(sum((leaf**2).sum() for leaf in u.values()), list(x.values()))
    cases.found["memory gauss_newton"] = f"1 / {(w1.numel() + w2.numel()) / seen.entries:g} of the unknowns"
