"""A deep equilibrium model: the fixed point of a block, with the settings that training one needs."""

# Jacobian regularisation, with J = df/dz at the equilibrium and v normal: E ||J'v||^2 = E v'JJ'v = trace(J J') =
# ||J||_F^2 (Hutchinson). One product J'v by reverse mode is one estimate; the mean over k vectors has 1/k of its
# variance. z is held fixed: the derivative of ||J(z, theta)||_F^2 along dz/dtheta would need another implicit solve.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from implicitlayer.api._module import FixedPointLayer
from implicitlayer.base._tree import flatten, unflatten
from implicitlayer.linear._bicgstab import Bicgstab
from implicitlayer.solvers._anderson import AndersonAcceleration

__all__ = ["DeepEquilibrium"]


class DeepEquilibrium(FixedPointLayer):
    """The equilibrium ``z = cell(z, *inputs)`` of a block: ``forward(*inputs, init=None) -> z``.

    A :class:`FixedPointLayer` with other defaults: the first dimension enumerates samples, each of which stops by
    itself in the forward and in the backward solve, and the search begins at zero. The gradient is that of the exact
    equilibrium; a sample that has none within the solver's limit is told, as ``on_failure`` says.

    Args:
        cell: the block, ``cell(z, *inputs) -> z``; the parameters of an ``nn.Module`` are registered.
        solver: of the forward pass; default :class:`il.solvers.AndersonAcceleration` with rtol 1e-4, relative to
            ``||cell(z, *inputs) - z||`` at ``init``, and at most 60 steps.
        linear_solver: of the backward pass; default :class:`Bicgstab` with rtol 1e-4.
        init: where the search begins: a function of the inputs, or a tensor or pytree; default zeros like the first
            input, which then has the shape of z.
        batch_dims: leading dimensions of z that enumerate samples.
        stationarity_rtol: allowed distance to the equilibrium, relative to its size.
        settings: further keyword arguments of :func:`fixed_point`.

    Source: Bai, Kolter, Koltun, Deep Equilibrium Models, NeurIPS 2019 (arXiv:1909.01377), there with Broyden's method.

    Example:
        >>> import torch, implicitlayer as il
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(2, 2)
        ...     def forward(self, z, u):
        ...         return torch.tanh(0.1 * self.linear(z) + u)
        >>> model = il.DeepEquilibrium(Cell())
        >>> u = torch.ones(5, 2)
        >>> z = model(u)
        >>> loss = (z**2).sum() + 0.1 * model.jacobian_norm(z, u)
        >>> loss.backward()
        >>> model.objective.linear.weight.grad is not None
        True
        >>> _ = model(1.01 * u, init=z)  # a warm start
    """

    def __init__(
        self,
        cell: Callable[..., Any],
        *,
        solver: Callable[..., Any] | None = None,
        linear_solver: Callable[..., Any] | None = None,
        init: Any = None,
        batch_dims: int = 1,
        stationarity_rtol: float | None = 1e-2,
        **settings: Any,
    ) -> None:
        super().__init__(
            cell,
            AndersonAcceleration(rtol=1e-4, max_steps=60) if solver is None else solver,
            init=_zeros if init is None else init,
            linear_solver=Bicgstab(rtol=1e-4) if linear_solver is None else linear_solver,
            batch_dims=batch_dims,
            stationarity_rtol=stationarity_rtol,
            **settings,
        )

    def forward(self, *inputs: Any, init: Any = None) -> Any:
        """The equilibrium for ``inputs``; the search begins at ``init``, which gets no gradient, where it is given."""
        return self._solved(self.init if init is None else init, inputs)

    def jacobian_norm(self, z: Any, *inputs: Any, num_vectors: int = 1) -> torch.Tensor:
        """``||dcell/dz||_F^2`` over the number of unknowns, mean over the samples; a 0-d tensor, differentiable.

        Added to the loss with a weight, it keeps the block contractive and so the solver fast. An unbiased estimate
        from ``num_vectors`` normal vectors, one reverse pass each; z counts as fixed in its derivative.

        Args:
            z: the equilibrium for ``inputs``, as ``forward`` gave it.
            inputs: as given to ``forward``.
            num_vectors: at least 1.

        Source: Bai, Koltun, Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021
        (arXiv:2106.14342).
        """
        if num_vectors < 1:
            raise ValueError(f"num_vectors={num_vectors} must be at least 1.")
        leaves, spec = flatten(z)
        graded = torch.is_grad_enabled()
        with torch.enable_grad():
            at = [leaf.detach().requires_grad_() for leaf in leaves]
            image = flatten(self.objective(unflatten(at, spec), *inputs))[0]
            norms = []
            for _ in range(num_vectors):
                v = [torch.randn_like(leaf) for leaf in image]
                pulled = torch.autograd.grad(
                    image, at, v, create_graph=graded, retain_graph=True, materialize_grads=True
                )
                norms.append(torch.stack([(leaf**2).sum() for leaf in pulled]).sum())
            mean: torch.Tensor = torch.stack(norms).mean() / max(sum(leaf.numel() for leaf in at), 1)
        return mean


def _zeros(first: Any, *_: Any) -> Any:
    return torch.zeros_like(first)
