"""Problems with constraints, for one t [n] or lanes of it [*lanes, n]: one for SciPy, and projections onto x <= 1."""

from collections.abc import Callable
from typing import Any

import torch
from references import F64


def slsqp(problem: Any, init: torch.Tensor, *theta: Any) -> Any:
    """SciPy's SLSQP, told of the constraints by the problem itself."""
    from scipy import optimize

    def with_gradient(flat: Any) -> tuple[float, Any]:
        x = torch.tensor(flat, dtype=F64).requires_grad_()
        value = problem(x, *theta)
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    def side(function: Callable[..., torch.Tensor], sign: int) -> Any:
        return lambda flat: sign * function(torch.tensor(flat, dtype=F64), *theta).numpy()

    constraints = [
        {"type": kind, "fun": side(function, sign)}
        for kind, function, sign, size in (
            ("eq", problem.equality_vector, 1, problem.num_equalities),
            ("ineq", problem.inequality_vector, -1, problem.num_inequalities),
        )
        if size
    ]
    options = {"ftol": 1e-14, "maxiter": 300}
    found = optimize.minimize(
        with_gradient, init.numpy(), jac=True, constraints=constraints, method="SLSQP", options=options
    )
    return found.x


def objective(x: torch.Tensor, t: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - t) ** 2).sum(-1) + a * (x**4).sum(-1)


def on_the_plane(x: torch.Tensor, t: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return x.sum(-1) - 1 - 0.3 * a


def non_negative(x: torch.Tensor, t: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return -x + 0.1 * a


def squares(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return ((x - t) ** 2).sum(-1)


def bound(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x - 1


def clamp(problem: Any, init: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The solution of squares under bound, lane by lane."""
    return t[problem.lane].clamp(max=1.0)
