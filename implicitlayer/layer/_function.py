"""``ImplicitArgmin``: the autograd Function that everything in this library is built on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer.base._failures import failed_lanes, finite_data, replaced
from implicitlayer.base._sharding import WHOLE, gathered, is_sharded
from implicitlayer.base._surroundings import plain_surroundings
from implicitlayer.base._types import Leaves
from implicitlayer.equation._capture import ClosedOver, derivatives_possible
from implicitlayer.equation._jacobian import Graph
from implicitlayer.equation._residual import Attached, Residual
from implicitlayer.equation._rules import implicit_jvp, implicit_vjp
from implicitlayer.equation._solve import Settings, alive, fill, lanes_first, over_batched_vectors
from implicitlayer.equation._state import Run
from implicitlayer.layer._forward import Calling, solve_forward


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """Everything about a call that is not a tensor."""

    residual: Residual
    calling: Calling
    num_x: int
    settings: Settings
    closed: ClosedOver | None = None  # tensors that the function reads from outside; None: it was not searched
    needs_derivative: bool = True  # whether something that was given needs a derivative
    stationarity_rtol: float | None = 1e-3
    polish: int = 0
    looks_at_lanes: bool = False  # whether lanes that read one another are looked for though nobody judges the answer

    @cached_property
    def masks(self) -> bool:
        """Whether lanes that fail are masked; see NOTE [masked lanes]."""
        return self.settings.on_failure == "mask"

    def at(self, saved: Sequence[torch.Tensor]) -> tuple[Leaves, Leaves, torch.Tensor | None]:
        """x, theta and the masked lanes, of the tensors that a call has saved; finite in the masked ones."""
        k = self.num_x
        x, rest = list(saved[:k]), list(saved[k:])
        if not self.masks:
            return x, rest, None
        failed = failed_lanes(x, self.residual.lane_dims)
        return replaced(failed, x, rest[:k]), finite_data(rest[k:], failed), failed

    def seen(self, theta: Leaves) -> Leaves:
        """Detached theta for solver and checks, with the closed-over leaves that a checkpoint will read again."""
        own: Sequence[torch.Tensor] = self.closed or ()
        if (
            self.closed is None
            or not self.closed.checkpoints
            or self.residual.levels
            or not all(t.is_leaf for t in own)
        ):
            return theta
        return [*theta[: self.calling.num_theta], *own]

    @property
    def accumulated(self) -> list[tuple[int, int]]:
        """What tells a change of .grad of the closed-over leaves."""
        gradients = [t.grad for t in self.closed or () if t.is_leaf]
        return [(0, 0) if g is None else (id(g), g._version) for g in gradients]

    def reaching(self, theta: Leaves, needed: Sequence[bool], mark: Run) -> tuple[Leaves, bool]:
        """theta leaves for a plain graph that reaches the ``needed`` ones; whether it is sure to miss nothing."""
        own: Leaves = []
        if self.closed and not self.residual.levels:
            own = self.closed.standing(theta[self.calling.num_theta :])
            self.closed.stood |= bool(own)
        explicit = theta[: len(theta) - len(own)]
        leaves = mark.marked([t.detach().requires_grad_(need) for t, need in zip(explicit, needed, strict=False)])
        return [*leaves, *own], len(leaves) == self.calling.num_theta

    def graph_for(self, x: Leaves, theta: Leaves, needed: Sequence[bool], held: Attached | None) -> Graph | None:
        """F for a plain backward, ``held`` or to be made; None where only torch.func finds all of its derivatives."""
        if held is not None and self.closed is not None and self.closed.constants:
            self.closed.refuse_changed()
        reaching, complete = self.reaching(theta, needed, Run())
        if held is None and not complete:
            return None
        # a record may hold it, so it holds neither the graph that x and theta have nor this spec
        return Graph(partial(self.residual.for_derivatives, [t.detach() for t in x], reaching), held)

    def refuse_unseen(self, x: Leaves, theta: Leaves) -> None:
        """Raise where a closed-over leaf stood for itself and no mode sees it read: a derivative would miss it."""
        if self.closed is not None and self.closed.stood:
            with plain_surroundings(x, derivatives=True):
                self.residual.refuse_unseen(x, theta)
            self.closed.stood = False


class ImplicitArgmin(torch.autograd.Function):
    """``apply(spec, *init leaves, *theta leaves) -> (*x leaves, found)``, differentiable in theta.

    ``forward`` runs the black-box solver on plain tensors; ``backward`` and ``jvp`` know nothing of the solver and are
    made of differentiable pieces, so every order composes; ``vmap`` adds one level of lanes to the same Function.
    ``found`` is what the forward pass has found out, no tensor.
    Use :func:`implicitlayer.argmin`, which builds the spec. ``init`` gets no gradient: the solution of a well-posed
    problem does not depend on where the search started.

    Source: implicit function theorem; Rajeswaran et al. 2019 (arXiv:1909.04630), Lemma 1, for the proximal objective.
    """

    @staticmethod
    def forward(spec: LayerSpec, *tensors: torch.Tensor) -> tuple[Any, ...]:
        x, found = solve_forward(spec, list(tensors[: spec.num_x]), list(tensors[spec.num_x :]))
        return (*x, found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        spec, *tensors = inputs
        *x, found = output
        ctx.spec, ctx.found, ctx.graph = spec, replace(found, graph=None, aux=()), found.graph
        ctx.set_materialize_grads(False)
        # x* is saved as an output: in a double backward it carries its own dependence on theta
        kept = tensors if spec.masks else tensors[spec.num_x :]  # init stands in for the x of masked lanes
        ctx.save_for_backward(*x, *kept)
        ctx.save_for_forward(*x, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        spec: LayerSpec = ctx.spec
        k, cotangents = spec.num_x, grads[:-1]
        saved = alive(ctx.saved_tensors)
        x, theta, failed = spec.at(saved)
        if not any(map(torch.is_tensor, cotangents)):
            return (None,) * (1 + k + len(theta))
        needed = ctx.needs_input_grad[1 + k :]

        graph = None
        if not derivatives_possible():  # else torch.func is at work, or this backward is differentiated
            graph = spec.graph_for(x, theta, needed, ctx.graph)
            if not _torch.keeps_graph():  # it goes with the first backward that is not told to keep it
                ctx.graph = None
        if graph is None:
            spec.refuse_unseen(x, theta)

        def rule(v: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
            filled = fill(v, x) if failed is None else replaced(failed, fill(v, x), 0.0)
            return implicit_vjp(spec.residual, x, theta, filled, needed, spec.settings, ctx.found, graph)

        theta_bar = over_batched_vectors(rule, alive(cotangents))
        if not set(map(type, theta_bar)) <= WHOLE:
            # those of plain tensors: torch gives parts or summands where DTensors were met on the way
            pairs = zip(theta_bar, theta, strict=True)
            theta_bar = [g if g is None or is_sharded(t) else gathered(g) for g, t in pairs]
        return (None, *(None,) * k, *theta_bar)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        spec: LayerSpec = ctx.spec
        k = spec.num_x
        saved = alive(ctx.saved_tensors)
        x, theta, failed = spec.at(saved)

        spec.refuse_unseen(x, theta)

        def rule(directions: list[torch.Tensor | None]) -> Leaves:
            result = implicit_jvp(spec.residual, x, theta, directions, spec.settings, ctx.found)
            if result is None:
                return [torch.zeros_like(leaf) for leaf in x]
            return result if failed is None else replaced(failed, result, 0.0)

        return (*over_batched_vectors(rule, tangents[k:]), None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: LayerSpec, *tensors: torch.Tensor) -> tuple[Any, Any]:
        k = spec.num_x
        forced = [i < k for i in range(len(tensors))]
        moved, has = lanes_first(tensors, in_dims[1:], forced, info.batch_size)
        lifted = replace(spec, residual=spec.residual.with_level(has[k:], info.randomness))
        return ImplicitArgmin.apply(lifted, *moved), (*[0] * k, None)
