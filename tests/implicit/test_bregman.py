"""Bregman divergences as the proximal term: closed forms on densities, lanes, and what is refused."""

import pytest
import torch
from references import F64, randn, relative_error
from torch import Tensor

import implicitlayer as il


def half_square(x: Tensor) -> Tensor:
    return 0.5 * (x * x).sum()


def test_the_divergence_of_half_the_square_is_half_the_squared_distance() -> None:
    phi, theta = randn(4, seed=0), randn(4, seed=1)
    assert torch.allclose(il.bregman(half_square)(phi, theta), 0.5 * ((phi - theta) ** 2).sum(), rtol=1e-13)


def test_the_divergence_of_the_negative_entropy_is_that_of_kullback_and_leibler() -> None:
    p, q = randn(5, seed=0).softmax(-1), randn(5, seed=1).softmax(-1)
    divergence = il.bregman(lambda p: (p * p.log()).sum())
    assert torch.allclose(divergence(p, q), (p * (p / q).log()).sum(), rtol=1e-12)


def test_with_half_the_square_it_is_the_ordinary_proximal_term() -> None:
    matrix, v = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=F64)), randn(3, seed=2)
    gradients = []
    for divergence in (None, il.bregman(half_square)):
        objective = il.proximal(lambda phi: 0.5 * phi @ matrix @ phi, 2.0, divergence=divergence)
        theta = randn(3, seed=1).requires_grad_()
        layer = il.argmin(objective, lambda f, x, t: 2 * t / (matrix.diagonal() + 2))
        gradients.append(torch.autograd.grad(layer(theta.detach(), theta), theta, v)[0])
    assert relative_error(gradients[1], gradients[0]) < 1e-9


def log_likelihood_loss(logits: Tensor, frequencies: Tensor) -> Tensor:
    """-sum f log p with p = softmax(logits), per lane."""
    return -(frequencies * logits.log_softmax(-1)).sum(-1)


def closed_form(frequencies: Tensor, logits: Tensor, strength: Tensor) -> Tensor:
    """argmin_p -sum f log p + s KL(q || p) = (f + s q) / (1 + s)."""
    return (frequencies + strength * logits.softmax(-1)) / (1 + strength)


def solver(f: object, init: Tensor, theta: Tensor, frequencies: Tensor) -> Tensor:
    return closed_form(frequencies, theta, torch.tensor(0.7, dtype=F64)).log()


KL = il.bregman(lambda logits: logits.logsumexp(-1))


def test_a_density_with_a_prior_density_has_the_gradient_of_its_closed_form() -> None:
    """The Hessian is singular (logits are free up to a constant), the cotangent of a density is in its range."""
    frequencies, v = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=F64), randn(4, seed=2)
    theta, strength = randn(4, seed=1).requires_grad_(), torch.tensor(0.7, dtype=F64, requires_grad=True)
    layer = il.argmin(il.proximal(log_likelihood_loss, strength, divergence=KL), solver)
    p = layer(torch.zeros(4, dtype=F64), theta, frequencies).softmax(-1)
    got = torch.autograd.grad(p, (theta, strength), v)
    expected = torch.autograd.grad(closed_form(frequencies, theta, strength), (theta, strength), v)
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 1e-9


def test_lanes_may_share_the_prior() -> None:
    frequencies = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]], dtype=F64)
    theta, v = randn(3, seed=1).requires_grad_(), randn(2, 3, seed=2)
    objective = il.proximal(log_likelihood_loss, 0.7, divergence=KL)
    layer = il.argmin(objective, solver, batch_dims=1)
    p = layer(torch.zeros(2, 3, dtype=F64), theta, frequencies).softmax(-1)
    (got,) = torch.autograd.grad(p, theta, v)
    (expected,) = torch.autograd.grad(closed_form(frequencies, theta, torch.tensor(0.7, dtype=F64)), theta, v)
    assert relative_error(got, expected) < 1e-9
    one = il.argmin(objective, solver)
    lanes = torch.func.vmap(lambda f: one(torch.zeros(3, dtype=F64), theta, f))(frequencies).softmax(-1)
    (got,) = torch.autograd.grad(lanes, theta, v)
    assert relative_error(got, expected) < 1e-9


@pytest.mark.parametrize("strength", [torch.ones(3), {"a": 1.0}, il.MatrixStrength(torch.eye(3))])
def test_a_divergence_is_weighed_by_one_number(strength: object) -> None:
    with pytest.raises(ValueError, match="must be one number: it weighs the divergence"):
        il.proximal(half_square, strength, divergence=KL)
