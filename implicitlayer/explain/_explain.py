"""``il.explain_gradient``: why is my gradient None, or zero?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from implicitlayer import _torch
from implicitlayer._errors import UnsupportedTransformError
from implicitlayer.api._module import ArgminLayer
from implicitlayer.base._sharding import Sharding, mesh_of
from implicitlayer.base._surroundings import plain_surroundings
from implicitlayer.base._tree import flatten, flatten_with_names
from implicitlayer.constrained._constrained import ProxLayer
from implicitlayer.equation._flat import Signature
from implicitlayer.explain._explain_leaves import (
    GradientExplanation,
    closed_leaves,
    record,
    theta_leaves,
    unread_parameters,
)
from implicitlayer.explain._explain_probe import Problem, ask_layer, closed_over_tensors, probe, quietly
from implicitlayer.explain._explain_verdicts import WORDS, Verdict, verdict_of, verdict_of_unknown
from implicitlayer.layer._layer import ImplicitLayer, check_init, without_aux


def explain_gradient(layer: ImplicitLayer | ArgminLayer, /, *args: Any) -> GradientExplanation:
    """Why the gradient of a layer is None, or zero: a verdict on every theta leaf and every closed-over tensor.

    The solver is not run. The objective (residual, map) is evaluated a few times at and near init, and its derivatives
    decide: theta gets a gradient where the gradient of the objective in x has a derivative in theta. Calls where a
    tensor leaves its graph are watched on the way, to name the line. What is flat near init may not be so at the
    solution: pass the layer's own answer as init to ask there. Elsewhere any entry of x may be held by a set, or free.

    Args:
        layer: what :func:`argmin`, :func:`root` or :func:`fixed_point` returns, or an :class:`ArgminLayer`.
        args: as the layer is called: ``init, *theta``; for a module its forward's arguments.

    Returns:
        A :class:`GradientExplanation`: ``.leaves``, ``.unknowns``, ``.notes``, one leaf by ``[name]``; prints readably.

    Raises:
        TypeError: ``layer`` is something else.
        UnsupportedTransformError: called inside a torch.func transform.
        ObjectiveError: the objective returns what no layer accepts.

    Source: mixed derivatives as in the implicit function theorem (see :func:`argmin`), with no linear solve.

    Example:
        >>> import torch, implicitlayer as il
        >>> layer = il.argmin(lambda x, t: ((x - t["a"]) ** 2).sum() + t["b"] ** 2, lambda f, x, t: t["a"])
        >>> t = {name: torch.ones((), requires_grad=True) for name in "ab"}
        >>> print(il.explain_gradient(layer, torch.zeros(()), t))
        theta[0]['a'] (float32, shape (), requires_grad=True): gets its gradient.
        theta[0]['b'] (float32, shape (), requires_grad=True): its gradient is zero: it reaches the objective, but
        not the gradient of the objective in x: it stands in a term of its own, on which the solution does not depend.
        Zero is right.
        x (float32, shape (), requires_grad=False): in order.
    """
    settings, init, theta = _resolve(layer, args)
    if _torch.transforms_active():
        raise UnsupportedTransformError(
            "explain_gradient was called inside a torch.func transform, whose tensors have no requires_grad to "
            "explain. Call it outside, with plain tensors that require a gradient."
        )
    x, x_names = flatten_with_names(init, "x")
    check_init(x, x_names, settings.batch_dims)
    if mesh_of(x) is not None:
        sharding = Sharding(init)
        settings, init = settings.inside(sharding, init), sharding.inside(init)
        x = flatten(init)[0]
    notes = _mode_notes()
    with torch.inference_mode(False), torch.enable_grad(), plain_surroundings(x), quietly():
        problem = _problem(settings, init, theta)
        x_facts, facts = probe(problem)
        ask_layer(problem, facts)
    if not any(t.requires_grad for t in problem.tensors):
        notes.append("Nothing here requires a gradient: the layer's answer has no graph.")
    held = isinstance(settings, ProxLayer)
    words = WORDS["constrained" if held else settings.kind]
    verdicts = [verdict_of(t, fact, words) for t, fact in zip(problem.tensors, facts, strict=True)]
    if notes:  # no call has a graph now, so no tensor gets anything
        verdicts = [Verdict("none", v.sentence, v.where) for v in verdicts]
    regular = held or settings.damping > 0 or settings.curvature != "hessian"
    unknowns = [
        record(name, "unknown", t, fact, verdict_of_unknown(t, fact, words, regular=regular))
        for name, t, fact in zip(x_names, x, x_facts, strict=True)
    ]
    leaves = (*theta_leaves(problem, facts, verdicts), *closed_leaves(problem, facts, verdicts))
    return GradientExplanation(tuple(notes), tuple(unknowns), (*leaves, *unread_parameters(problem)))


def _resolve(layer: Any, args: tuple[Any, ...]) -> tuple[ImplicitLayer, Any, tuple[Any, ...]]:
    """The layer with its function as the user wrote it, init and theta."""
    stored = None
    if isinstance(layer, ArgminLayer):
        stored, layer = layer.init, replace(layer._layer, function=layer.objective)
        if callable(stored) and not isinstance(stored, torch.Tensor):
            with torch.no_grad():
                stored = stored(*args)
    if isinstance(layer, ImplicitLayer):
        if stored is None and not args:
            raise TypeError("explain_gradient(layer, init, *theta) needs init: the layer has stored none.")
        return (layer, args[0], args[1:]) if stored is None else (layer, stored, args)
    inside = ""
    if isinstance(layer, nn.Module):
        held = [name for name, module in layer.named_modules() if isinstance(module, ArgminLayer)]
        inside = f" It holds one at {held[0]!r}: pass layer.get_submodule({held[0]!r})." if held else ""
    raise TypeError(
        f"explain_gradient got {type(layer).__name__}: it takes what il.argmin, il.root or il.fixed_point returns, or "
        f"an il.ArgminLayer. Of a wrapper, pass the layer inside it, with the arguments that the layer gets.{inside}"
    )


def _problem(layer: ImplicitLayer, init: Any, theta: tuple[Any, ...]) -> Problem:
    value_of = without_aux(layer.function) if layer.objective_has_aux else layer.function
    function, parts = value_of, {"objective": layer.function}
    if isinstance(layer, ProxLayer):
        function = partial(layer.with_conditions, value_of)
        parts[layer.terms_name] = layer.terms
    x, x_spec = flatten(init)
    signature = Signature.of(theta)
    closed = closed_over_tensors(function, (init, *theta))
    tensors = [*signature.tensors, *closed]
    return Problem(layer, parts, function, init, theta, x, x_spec, signature, tensors, closed)


def _mode_notes() -> list[str]:
    """What the surroundings of the call do to every gradient."""
    if torch.is_inference_mode_enabled():
        what, case = "Inference mode is on here", "outside of it"
    elif not torch.is_grad_enabled():
        what, case = "Grad mode is off here (torch.no_grad())", "with grad mode on"
    else:
        return []
    return [f"{what}: a call of the layer has no graph and no tensor gets a gradient. What follows is the case {case}."]
