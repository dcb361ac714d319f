"""The proximal objective of implicit MAML, and Bregman ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer.base._tree import CopiesFunctions, flatten, lane_reduce, leaves_like, unflatten
from implicitlayer.equation._flat import Composite
from implicitlayer.layer._strengths import MatrixStrength, OperatorStrength

_KNOWN = (MatrixStrength, OperatorStrength)


@dataclass(frozen=True, eq=False)
class Proximal(CopiesFunctions):
    """``G(phi, theta, *data) = loss(phi, *data) + 1/2 ||phi - theta||^2_strength``; made by :func:`proximal`."""

    loss: Callable[..., torch.Tensor]
    strength: Any
    divergence: Callable[[Any, Any], torch.Tensor] | None = None

    def __call__(self, phi: Any, theta: Any, *data: Any) -> torch.Tensor:
        value = self.loss(phi, *data)
        if self.divergence is not None:
            return value + self._divergence(phi, theta)
        return self._with_penalty(value, _difference(phi, theta, value.ndim))

    def _divergence(self, phi: Any, theta: Any) -> torch.Tensor:
        assert self.divergence is not None
        weighed: torch.Tensor = self._strength * self.divergence(phi, theta)
        return weighed

    def _with_penalty(self, value: torch.Tensor, difference: Any) -> torch.Tensor:
        """``value`` + 1/2 ||difference||^2_strength, per lane of ``value``."""
        known = self._strength
        if isinstance(known, _KNOWN):
            return value + 0.5 * known.quadratic(difference, value.ndim)
        for strength, d in zip(self._strengths(difference), flatten(difference)[0], strict=True):
            if _has_entries(strength):
                _check_broadcast(strength, d)
                value = value + 0.5 * lane_reduce(strength * d * d, value.ndim)
            else:
                value = value + (0.5 * strength) * lane_reduce(d * d, value.ndim)
        return value

    def value_and_gradient(self, phi: Any, theta: Any, *data: Any) -> tuple[torch.Tensor, Any] | None:
        """The value and its gradient in phi, constants: what solvers ask an objective for, where it knows.

        grad G = grad loss + strength (phi - theta): only the loss is differentiated by autograd. None where the penalty
        is no sum of weighed squares.
        """
        if self.divergence is not None or isinstance(self._strength, _KNOWN):
            return None
        leaves, spec = flatten(phi)
        with torch.enable_grad():
            points = [leaf.detach().requires_grad_() for leaf in leaves]
            loss = self.loss(unflatten(points, spec), *data)
            if not isinstance(loss, torch.Tensor) or not loss.requires_grad:  # the general way has the words for it
                return None
            slopes = torch.autograd.grad(loss.sum() if loss.ndim else loss, points, materialize_grads=True)
        with torch.no_grad():
            difference = _difference(phi, theta, loss.ndim)
            value, gradient = loss.detach(), []
            for slope, strength, d in zip(slopes, self._strengths(difference), flatten(difference)[0], strict=True):
                if _has_entries(strength):
                    _check_broadcast(strength, d)
                weighed = strength * d
                value = value + 0.5 * lane_reduce(weighed * d, loss.ndim)
                gradient.append(slope + weighed)
            return value, unflatten(gradient, spec)

    def coupling(self, lane_dims: int) -> Callable[[Any, Any], torch.Tensor]:
        """The penalty alone, the only term that reads theta: see NOTE [objectives with parts]."""

        def penalty(phi: Any, theta: Any) -> torch.Tensor:
            if self.divergence is not None:
                return self._divergence(phi, theta)
            lanes = flatten(phi)[0][0]
            zero = lanes.new_zeros(lanes.shape[:lane_dims])
            return self._with_penalty(zero, _difference(phi, theta, lane_dims))

        return penalty

    def curvature_metric(self, phi: Any, theta: Any, *data: Any) -> Any:
        """The known part of the curvature, diagonal: the Hessian in phi is ``H + strength``.

        It makes conjugate gradients work on (I + H / strength), its own well-conditioned form, with the cotangent
        itself as the answer of zero steps (first-order MAML).
        """
        known = self._strength
        if isinstance(known, _KNOWN) or self.divergence is not None:
            return None
        leaves, spec = flatten(phi)
        like = leaves[0]
        if not isinstance(known, (dict, list, tuple)) and not _has_entries(known):
            shared = torch.as_tensor(known, dtype=like.dtype, device=like.device)
            return unflatten([shared] * len(leaves), spec)
        return unflatten(
            [
                torch.as_tensor(s, dtype=p.dtype, device=p.device).expand(p.shape)
                for s, p in zip(self._strengths(phi), leaves, strict=True)
            ],
            spec,
        )

    def curvature_matrix(self, phi: Any, theta: Any, *data: Any) -> torch.Tensor | None:
        """The same where it is a full matrix, [n, n]; else None."""
        known = self._strength
        return known.dense() if isinstance(known, MatrixStrength) else None

    def as_composite(self) -> Composite | None:
        """The proximal term has no model to linearise: it joins the loss with phi - theta among the outputs."""
        inner = self.loss.as_composite() if hasattr(self.loss, "as_composite") else None
        if inner is None or self.divergence is not None:
            return None
        return Composite(
            lambda outputs, theta, *data: self._with_penalty(inner.loss(outputs[0], *data), outputs[1]),
            lambda phi, theta, *data: (inner.model(phi, *data), _difference(phi, theta, None)),
        )

    @property
    def _strength(self) -> Any:
        return self.strength() if callable(self.strength) else self.strength

    def _strengths(self, phi: Any) -> list[Any]:
        known = self._strength
        if isinstance(known, (dict, list, tuple)):
            return leaves_like(known, phi, "strength must be one number or have the structure of phi")
        return [known] * len(flatten(phi)[0])


def _check_broadcast(strength: torch.Tensor, leaf: torch.Tensor) -> None:
    # from the right, and never to a larger shape than that of the leaf
    sizes = list(zip(reversed(strength.shape), reversed(leaf.shape), strict=False))
    if strength.ndim > leaf.ndim or any(s not in (1, n) for s, n in sizes):
        raise ValueError(
            f"a strength of shape {tuple(strength.shape)} does not broadcast to a leaf of phi of shape "
            f"{tuple(leaf.shape)} (lanes included). Give one number, or a pytree like phi with one entry per tensor."
        )


def _difference(phi: Any, theta: Any, lane_dims: int | None) -> Any:
    """phi - theta, in the structure of phi; theta may lack the ``lane_dims`` lanes of phi (None: already checked)."""
    leaves, spec = flatten(phi)
    difference = []
    for p, t in zip(leaves, leaves_like(theta, phi, "theta must have the structure of phi"), strict=True):
        if lane_dims is not None and t.shape not in (p.shape, p.shape[lane_dims:]):
            raise ValueError(
                f"theta must have the shapes of phi: a leaf of theta has shape {tuple(t.shape)}, that of phi "
                f"{tuple(p.shape)}. It would broadcast to another problem."
            )
        difference.append(p - t)
    return unflatten(difference, spec)


def _has_entries(strength: Any) -> bool:
    return isinstance(strength, torch.Tensor) and strength.ndim > 0


def proximal(
    loss: Callable[..., torch.Tensor], strength: Any, *, divergence: Callable[[Any, Any], torch.Tensor] | None = None
) -> Proximal:
    """The objective ``G(phi, theta, *data) = loss(phi, *data) + 1/2 ||phi - theta||^2_strength``.

    Its argmin is the inner problem of implicit MAML; the gradient in theta is g with (I + H / strength) g = v, where H
    is the Hessian of ``loss`` at the solution.

    Args:
        loss: ``loss(phi, *data) -> 0-d tensor``, or one value per lane, [*lanes], in a layer with ``batch_dims``.
        strength: the strength lambda >= 0 of the regulariser, in units of the curvature of ``loss``: a number or 0-d
            tensor; a tensor that broadcasts to every leaf of phi (one strength per entry); or a pytree like phi of
            these (one strength per tensor); a :class:`MatrixStrength` or :class:`OperatorStrength`. A tensor that
            requires a gradient gets one: strength can be learned. A callable without arguments, such as
            :class:`LearnedStrength`, is asked at every evaluation.
        divergence: ``divergence(phi, theta) -> 0-d tensor`` (or one per lane), in place of ``1/2 ||phi - theta||^2``,
            such as :func:`bregman`; the strength is then one number. The linear solve has no metric then: zero steps of
            conjugate gradients are not first-order MAML.

    Returns:
        A callable objective for :func:`argmin`; ``theta`` has the structure of ``phi``, with or without its lanes.

    Raises:
        ValueError: a negative or NaN strength, a strength that is no number (one number, with a divergence).

    Source: Rajeswaran et al. 2019 (arXiv:1909.04630), eq. 3 and Lemma 1.

    Example:
        >>> import torch, implicitlayer as il
        >>> objective = il.proximal(lambda phi: 0.5 * (phi**2).sum(), strength=3.0)  # argmin: 3/4 theta
        >>> layer = il.argmin(objective, lambda f, init, theta: 0.75 * theta)
        >>> theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> layer(theta, theta).sum().backward()
        >>> theta.grad.tolist()
        [0.75, 0.75]
    """
    for leaf in [] if callable(strength) or isinstance(strength, _KNOWN) else flatten(strength)[0]:
        if not isinstance(leaf, (int, float, torch.Tensor)) or isinstance(leaf, bool):
            raise ValueError(f"strength must be a number or a tensor, got {type(leaf).__name__}.")
        wrapped = isinstance(leaf, torch.Tensor) and _torch.is_wrapped(leaf)
        if not wrapped and not bool(((torch.as_tensor(leaf) >= 0) & (torch.as_tensor(leaf) < torch.inf)).all()):
            raise ValueError(
                f"strength={leaf} must be non-negative and finite: a negative one rewards distance from theta."
            )
    if divergence is not None and (isinstance(strength, (*_KNOWN, dict, list, tuple)) or _has_entries(strength)):
        raise ValueError("with a divergence the strength must be one number: it weighs the divergence as a whole.")
    return Proximal(loss, strength, divergence)


@dataclass(frozen=True, eq=False)
class Bregman(CopiesFunctions):
    """``D(phi, theta) = psi(phi) - psi(theta) - <grad psi(theta), phi - theta>``; made by :func:`bregman`."""

    potential: Callable[[Any], torch.Tensor]

    def __call__(self, phi: Any, theta: Any) -> torch.Tensor:
        value = self.potential(phi)
        # theta may lack the lanes of phi; the gradient of the sum over lanes holds that of each
        slopes = torch.func.grad(lambda t: self.potential(t).sum())(theta)
        leaves = zip(*(flatten(tree)[0] for tree in (phi, theta, slopes)), strict=True)
        linear = [lane_reduce(s * (p - t), value.ndim) for p, t, s in leaves]
        return value - self.potential(theta) - torch.stack(linear).sum(0)


def bregman(potential: Callable[[Any], torch.Tensor]) -> Bregman:
    """The Bregman divergence of a convex ``potential``, as a ``divergence`` of :func:`proximal`.

    ``||x||^2 / 2`` gives half the squared distance; ``logsumexp`` of logits gives KL(softmax(theta) || softmax(phi));
    ``sum x log x`` of densities gives KL(phi || theta).

    Args:
        potential: ``potential(x) -> 0-d tensor``, or one value per lane, [*lanes], in plain torch code; convex.

    Source: L. M. Bregman, USSR Comput. Math. Math. Phys. 7 (1967).

    Example:
        >>> import torch, implicitlayer as il
        >>> kl = il.bregman(lambda logits: logits.logsumexp(-1))
        >>> phi, theta = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.0])
        >>> p, q = phi.softmax(-1), theta.softmax(-1)
        >>> torch.allclose(kl(phi, theta), (q * (q / p).log()).sum())
        True
    """
    return Bregman(potential)
