"""A small inner problem in float64 for the tests of il.meta: u·tanh(W x), B tasks, n = 3 + 3·2 = 9 unknowns of each."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

import implicitlayer as il

B, LAMBDA, N = 3, 0.7, 9


def task_loss(params: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(params, batch) - batch[1]).square().mean(-1)


def model(params: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    hidden = torch.tanh(batch[0] @ params["w"].mT)  # of [B, K, 2], and the targets are [B, K]
    return (hidden * params["u"].unsqueeze(1)).sum(-1)


def problem() -> tuple[dict[str, torch.Tensor], Any, Any]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    theta = {"u": draw(3).requires_grad_(), "w": draw(3, 2).requires_grad_()}
    return theta, (draw(B, 4, 2), draw(B, 4)), (draw(B, 6, 2), draw(B, 6))


def flat(tree: dict[str, torch.Tensor], start: int = 0) -> torch.Tensor:
    return torch.cat([tree["u"].flatten(start), tree["w"].flatten(start)], -1)


def gradient_of(method: il.meta.MetaMethod, theta: Any, support: Any, query: Any) -> torch.Tensor:
    losses = method(theta, support, query)
    assert losses.shape == (B,)
    return flat(dict(zip(theta, torch.autograd.grad(losses.mean(), list(theta.values())), strict=True)))


def dense_parts(phi: Any, support: Any, query: Any, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Support gradient [n], support Hessian [n, n] and query gradient [n] of task i at phi, by torch.autograd."""

    def loss_of(vector: torch.Tensor, batch: Any) -> torch.Tensor:
        params = {"u": vector[None, :3], "w": vector[None, 3:].reshape(1, 3, 2)}
        return task_loss(params, tuple(part[i : i + 1] for part in batch))[0]

    point = flat(phi, 1)[i].detach()
    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    return (
        jacobian(lambda p: loss_of(p, support), point),
        hessian(lambda p: loss_of(p, support), point),
        jacobian(lambda p: loss_of(p, query), point),
    )


def assert_matches_differences(
    value: Callable[[], torch.Tensor],
    tensors: Sequence[torch.Tensor],
    *,
    rtol: float,
    value_under_differences: Callable[[], torch.Tensor] | None = None,
) -> None:
    """The gradient of value() in each tensor, along a random direction, is the central difference of step 1e-5.

    Its error is about h² = 1e-10 by the third derivative, and 1e-16/h = 1e-11 by rounding, for values of order 1.
    """
    generator = torch.Generator().manual_seed(11)
    gradients = torch.autograd.grad(value(), list(tensors))
    h = 1e-5
    for tensor, gradient in zip(tensors, gradients, strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(direction, alpha=sign * h)
                ends.append((value_under_differences or value)())
                tensor.sub_(direction, alpha=sign * h)
        expected = (ends[0] - ends[1]) / (2 * h)
        assert expected.abs() > 1e-4  # the test would see a zero
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=rtol, atol=1e-9)
