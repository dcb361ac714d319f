"""Cases of sharded_run besides layers of ``il.argmin``: each function of DTensors against the same of plain tensors."""

from collections.abc import Callable
from typing import Any

import torch
from sharded_problem import CG, Cases, difference
from torch.distributed.tensor import DTensor, Replicate, Shard

import implicitlayer as il


def other_problems(cases: Cases) -> None:
    """Constraints, programs, values, linear systems, other meta-learners: those of one process."""
    t, matrix = cases.theta["w1"], cases.data[0].mT @ cases.data[0] + torch.eye(3)
    p, two, rows = cases.data[0][0], torch.tensor(0.3, dtype=torch.float64), cases.data[0][1:3]
    same = cases.same

    def halves(x: torch.Tensor, t: torch.Tensor, *_: Any) -> torch.Tensor:
        return ((x - t) ** 2 + x**2).sum()

    def constrained(t: torch.Tensor) -> il.ConstrainedLayer:
        return il.constrained_argmin(
            lambda x, t: ((x - t) ** 2).sum() + (x**4).sum(),
            il.solvers.SQP(),
            equality=lambda x, t: x.sum() - 1,
            inequality=lambda x, t: x - t.abs() / 4 - 0.3,
            return_multipliers=True,
        )

    def program(Q: torch.Tensor, p: torch.Tensor, A: torch.Tensor) -> Any:
        return il.qp(Q, p, A, p[:2], ub=p.abs() + 0.1, return_multipliers=True)

    same("constrained_argmin", lambda t: constrained(t)(t.detach() * 0, t), (p, "0"))
    same("qp", program, (matrix, "0"), (p, "0"), (rows, "1"))
    same("value", lambda Q, p: il.value(il.qp)(Q, p, ub=p.detach() * 0), (matrix, "0"), (p, "whole"))
    same("linear_solve", il.linear_solve, (matrix, "0"), (p, "0"))
    solve = il.linear_solve
    same("linear_solve of a function", lambda Q, p: solve(lambda u, Q: Q @ u, p, CG, Q), (matrix, "0"), (p, "0"))
    for how in ("0", "whole"):
        same(f"hvp {how}", lambda x, v: il.hvp(lambda x: (x**4).sum(), x, v), (p, how), (rows[0], "whole"))

    def by_hessian(x: torch.Tensor, v: torch.Tensor, *solver: il.Dense) -> torch.Tensor:
        return solve(il.hessian_operator(network_of_one, x), v, *solver)

    for how in ("0", "whole"):  # the right-hand side placed as x is, and otherwise
        same(f"hessian_operator {how}", by_hessian, (p, "0"), (rows[0], how))
    same("hessian_operator Dense", lambda x, v: by_hessian(x, v, il.Dense()), (p, "0"), (rows[0], "0"))

    def explained(*theta: torch.Tensor) -> str:
        halved = il.argmin(lambda x, t, s: halves(x, t).sum() + s, il.solvers.NewtonCG())
        boxed = il.argmin(halves, il.solvers.ProjectedGradient(rtol=1e-12), constraint=lambda t, s: il.sets.Box(-s, s))
        return "\n".join(str(il.explain_gradient(layer, theta[0].detach() * 0, *theta)) for layer in (halved, boxed))

    alone, parts = (t.clone().requires_grad_(), two), (cases.put(t, Shard(1)).requires_grad_(), two)
    assert "gets its gradient" in explained(*alone)
    cases.found["explain_gradient"] = float(explained(*parts) != explained(*alone))

    # x = t / 2 is to be 1: t = 2 in every entry, by an outer optimizer that looks at all entries together
    outer = cases.put(t[0], Shard(0)).requires_grad_()
    optimizer = torch.optim.LBFGS([outer], line_search_fn="strong_wolfe")
    solution = il.argmin(lambda x, t: halves(x, t).sum(), il.solvers.NewtonCG())

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = ((solution(outer.detach() * 0, outer) - 1) ** 2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    cases.found["an outer LBFGS"] = difference([outer], [torch.full_like(t[0], 2.0)])

    def few_shot(make: Callable[..., il.meta.MetaMethod]) -> Callable[..., Any]:
        def losses(*theta: torch.Tensor) -> torch.Tensor:
            inputs, labels = cases.data[0][:6].expand(2, 6, 3), torch.tensor([0, 1]).repeat(2, 3)
            if isinstance(theta[0], DTensor):
                inputs, labels = cases.put(inputs, Replicate()), cases.put(labels, Replicate())
            method = make(lambda p, x: torch.tanh(x @ p["f"]), il.fewshot.task_cross_entropy, head=("w", "b"))
            return method(dict(zip(("f", "w", "b"), theta, strict=True)), (inputs, labels), (2 * inputs, labels))

        return losses

    head = cases.theta["w2"].mT, cases.theta["w2"][0]
    anil = few_shot(lambda *args, **kwargs: il.meta.ANIL(*args, **kwargs, step_size=0.3, num_steps=2))
    same("ANIL", anil, (t, "1"), (head[0], "1"), (head[1], "whole"))
    same("ProtoNet", few_shot(il.meta.ProtoNet), (t, "1"), (head[0], "1"), (head[1], "whole"))

    weights = cases.put(p, Shard(0)).requires_grad_()
    losses, strength, tasks = (
        lambda x, b: ((x - b) ** 2).sum(-1),
        il.MatrixStrength(matrix),
        cases.put(rows, Replicate()),
    )
    weighed = il.meta.iMAML(losses, il.solvers.GradientDescent(0.2), strength=strength)
    cases.refused("iMAML, a matrix as its strength", lambda: weighed(weights, tasks, tasks))
    cases.refused("MatrixStrength of a DTensor", lambda: il.MatrixStrength(cases.put(matrix, Shard(0))))


def network_of_one(x: torch.Tensor) -> torch.Tensor:
    return (x**4).sum() + (x**2).sum()
