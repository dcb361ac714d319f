"""Bregman divergences, for proximal terms that measure distance in another geometry (densities, for one)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer.base._copying import CopiesFunctions
from implicitlayer.base._tree import flatten, lane_reduce

__all__ = ["Bregman", "bregman"]


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
