"""The layer as an ``nn.Module``, and a deep equilibrium model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from implicitlayer.api._argmin import argmin, fixed_point, root
from implicitlayer.base._records import Record
from implicitlayer.base._tree import CopiesFunctions, flatten, unflatten
from implicitlayer.layer._layer import ImplicitLayer
from implicitlayer.linear._bicgstab import Bicgstab
from implicitlayer.solvers._anderson import AndersonAcceleration


class ArgminLayer(CopiesFunctions, nn.Module):
    """:func:`argmin` as a module: ``forward(*theta) -> x``, or ``forward(init, *theta)`` without a stored ``init``.

    An objective that is an ``nn.Module`` is registered, so its parameters are in ``parameters()`` and
    ``state_dict()``, move with ``.to()``, and get gradients. So are the modules that :func:`least_squares`,
    :func:`composite` and :func:`proximal` (a loss, a learned strength) were given, in ``layer.parts``.

    The layer pickles and copies if the objective, solver and ``init`` do. No lambda pickles; ``copy.deepcopy`` of a
    module gives a layer in it whose objective is a lambda or nested function over the module (its parts, its tensors)
    the weights of the copy. What a function reads as a global, or through an object of your own that can be called,
    stays shared.

    The weights of a call are kept for its backward, whatever happens to the module in between
    (``torch.func.functional_call``, ensembles by ``vmap``).

    BatchNorm inside an objective: batch statistics (``track_running_stats=False``) and frozen running statistics
    (``eval()`` mode) differentiate under every transform; in train mode running statistics would be written at every
    evaluation of the solver, which is an error.

    Args:
        objective, solver: as in :func:`argmin`.
        init: starting point: a tensor or pytree (a tensor is registered as a buffer), or a function of ``theta``;
            None if ``forward`` is to receive it first.
        settings: keyword arguments of :func:`argmin`.

    Example:
        >>> import torch, implicitlayer as il
        >>> layer = il.ArgminLayer(
        ...     lambda x, t: ((x - t) ** 2).sum() + (x**2).sum(), lambda f, x, t: t / 2, init=torch.zeros_like
        ... )
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), layer)
        >>> model(torch.ones(3)).shape
        torch.Size([2])
    """

    _facade: ClassVar[Callable[..., ImplicitLayer]] = staticmethod(argmin)

    def __init__(
        self,
        objective: Callable[..., Any],
        solver: Callable[..., Any],
        *,
        init: Any = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.objective = objective
        parts = _modules_in(objective)
        if parts:
            self.parts = nn.ModuleDict(parts)
        self._layer: ImplicitLayer = self._facade(objective, solver, **settings)
        if isinstance(init, torch.Tensor):
            self.register_buffer("init", init)
        else:
            self.init = init

    @property
    def last_record(self) -> Record | None:
        """The latest of :attr:`records`, after a backward that of its solve; None before the first call."""
        return self._layer.last_record

    @property
    def records(self) -> list[Record]:
        """Diagnostics of the latest call."""
        return self._layer.records

    def forward(self, *args: Any) -> Any:
        """x for ``theta``."""
        init = self.init
        if init is None:
            if not args:
                raise TypeError("forward(init, *theta) needs init: none was stored in the layer.")
            init, *args = args  # type: ignore[assignment]
        return self._solved(init, args)

    def _solved(self, init: Any, theta: Sequence[Any]) -> Any:
        # a layer of this call's own: threads may call at once, and the weights of a call go with its graph
        layer = replace(self._layer, function=_with_weights_of_now(self.objective))
        if callable(init) and not isinstance(init, torch.Tensor):
            with torch.no_grad():
                init = init(*theta)
        solution = layer(init, *theta)
        self._layer.records = layer.records
        return solution


def _with_weights_of_now(objective: Any) -> Any:
    """The same function, which keeps the weights that it has."""
    if isinstance(objective, nn.Module):
        if hasattr(objective, "as_composite"):  # it knows its parts (see NOTE [objectives with parts])
            return objective
        weights = {**dict(objective.named_parameters()), **dict(objective.named_buffers())}
        stores = [s for m in objective.modules() for s in (m._parameters, m._buffers, m._modules)]
        held = [(store, name, value) for store in stores for name, value in store.items()]

        def of_now(*args: Any) -> Any:
            if all(store.get(name) is value for store, name, value in held):  # as nearly always, and far cheaper
                return objective(*args)
            return torch.func.functional_call(objective, weights, args)

        return of_now
    if _modules_in(objective):
        functions = {name: part for name, part in vars(objective).items() if name in ("loss", "model")}
        return replace(objective, **{name: _with_weights_of_now(part) for name, part in functions.items()})
    return objective


def _modules_in(objective: Any) -> dict[str, nn.Module]:
    """The modules that an objective was made of, by the names of its fields."""
    found: dict[str, nn.Module] = {}
    if isinstance(objective, nn.Module) or not is_dataclass(objective):
        return found
    for name, value in vars(objective).items():
        if isinstance(value, nn.Module):
            found[name] = value
        found |= {f"{name}_{inner}": module for inner, module in _modules_in(value).items()}
    return found


class RootLayer(ArgminLayer):
    """:func:`root` as a module; the residual stands in the place of :class:`ArgminLayer`'s objective.

    Example:
        >>> import torch, implicitlayer as il
        >>> layer = il.RootLayer(lambda x, a: x**3 - a, lambda r, x, a: a ** (1 / 3), init=torch.ones_like)
        >>> layer(torch.tensor([8.0, 27.0], dtype=torch.float64)).tolist()
        [2.0, 3.0]
    """

    _facade = staticmethod(root)


class FixedPointLayer(ArgminLayer):
    """:func:`fixed_point` as a module: a deep equilibrium model where the map is an ``nn.Module``.

    Source: Bai, Kolter, Koltun, Deep Equilibrium Models, NeurIPS 2019.

    Example:
        >>> import torch, implicitlayer as il
        >>> solver = il.solvers.AndersonAcceleration(rtol=1e-6)
        >>> model = il.FixedPointLayer(torch.nn.Bilinear(2, 2, 2), solver, init=torch.zeros_like)
        >>> model(0.1 * torch.ones(2)).sum().backward()
        >>> model.objective.weight.grad is not None
        True
    """

    _facade = staticmethod(fixed_point)


# Jacobian regularisation, with J = df/dz at the equilibrium and v normal: E ||J'v||^2 = E v'JJ'v = trace(J J') =
# ||J||_F^2 (Hutchinson). One product J'v by reverse mode is one estimate; the mean over k vectors has 1/k of its
# variance. z is held fixed: the derivative of ||J(z, theta)||_F^2 along dz/dtheta would need another implicit solve.


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
        >>> model = il.DeepEquilibrium(torch.nn.Bilinear(2, 2, 2))
        >>> u = 0.1 * torch.ones(5, 2)
        >>> z = model(u)
        >>> loss = (z**2).sum() + 0.1 * model.jacobian_norm(z, u)
        >>> loss.backward()
        >>> model.objective.weight.grad is not None
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
