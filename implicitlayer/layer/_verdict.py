"""What the caller is told of an answer when the forward pass is over."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from implicitlayer._errors import (
    ConvergenceWarning,
    NotConvergedError,
    ObjectiveError,
    StationarityError,
    StationarityWarning,
    warn,
)
from implicitlayer.base._failures import refuse
from implicitlayer.base._parts import Parts, patternless
from implicitlayer.base._tree import name_lanes, ravel
from implicitlayer.base._types import Leaves, OnFailure
from implicitlayer.equation._distance import (
    CLEAR,
    TIGHT,
    Stationarity,
    far_at_other_draws,
    has_random_curvature,
    hessian_change,
    is_random,
    is_rounding,
)
from implicitlayer.equation._residual import Attached, Residual
from implicitlayer.layer._polish import Polish
from implicitlayer.linear._common import lane_norm, rounding_of, select

if TYPE_CHECKING:
    from implicitlayer.layer._function import LayerSpec


# A relative change of the Hessian above this many times stationarity_rtol makes a gradient wrong by more than an answer
# that is stationarity_rtol away lets expect.
CHANGES = 10.0


def judge_answer(
    spec: LayerSpec, measured: Stationarity, x: Leaves, theta: Leaves, limited: bool, polished: Polish | None
) -> None:
    """Apply the failure policy: not stationary, Newton steps that led nowhere, a step limit, a Hessian that changes.

    One of them is told, the gravest. ``limited``: the solver says that it stopped at its step limit.
    """
    rtol = spec.stationarity_rtol
    if spec.settings.on_failure == "ignore" or rtol is None:
        return
    refused = polished is not None and bool(polished.refused.any())
    bad = measured.relative > rtol
    if bool(bad.any()):
        bad = bad & ~is_rounding(measured.gradient, measured.norm, spec.residual, x, theta)
    suspect = bad
    if spec.closed is not None and spec.closed.draws:
        suspect = bad | far_at_other_draws(spec.residual, x, theta, rtol * measured.size)
    random = suspect & is_random(measured.gradient, spec.residual, x, theta) if bool(suspect.any()) else suspect
    if spec.closed is not None and spec.closed.draws:
        random = random | has_random_curvature(spec.residual, x, theta, rtol)
    if bool(random.any()):
        _tell_random(spec, random, bad | random)
    elif bool(bad.any()):
        _tell_not_stationary(spec, measured, bad, rtol, limited, refused)
    elif refused and polished is not None:
        message = (
            f"polish={spec.polish} did not help{name_lanes(polished.refused)}: the Newton step from the solver's "
            "answer is longer than stationarity_rtol allows, and no step made the gradient (the residual) smaller, so "
            "the answer is as the solver left it. Solve the inner problem more tightly: a Newton step needs a start "
            "near the solution."
        )
        _tell(spec.settings.on_failure, polished.refused, message, "polish refused")
    elif limited:
        tell_step_limit(spec.settings.on_failure)
    else:
        _judge_change(spec, measured, x, theta, rtol)


# NOTE [coupled lanes]: solvers and checks take dF/dx to have one block for each lane. So its transpose times a vector
# that is zero in some lanes is zero in these. Which lanes are chosen changes from call to call, as a bit of their
# number says: any two lanes differ in one of these, so every pair is told apart in some of a few calls. Multiples of
# the golden ratio have no period in common with the calls of a layer.
_CALLS = itertools.count()
_GOLDEN = 0.6180339887


def refuse_coupled(residual: Residual, x: Leaves, at: Attached) -> None:
    """Raise where lanes of ``batch_dims`` read one another's unknowns; ``at``: F's run at x."""
    lanes = x[0].shape[: residual.lane_dims]
    count = lanes.numel()
    if count < 2:
        return
    flat = ravel(x, residual.lane_dims)
    turn = 0.0 if type(flat) is Parts else next(_CALLS) * _GOLDEN % 1.0  # all processes are to do the same
    bits = (count - 1).bit_length()
    bit, side = divmod(int(turn * 2 * bits), 2)
    chosen = ((torch.arange(count, device=flat.device) >> bit) % 2 == side).reshape(lanes)
    product = lane_norm(at.flat_pull(residual.lane_dims)(select(chosen, patternless(flat)))).nan_to_num(0.0, 0.0)
    coupled = ~chosen & (product > torch.finfo(flat.dtype).eps ** 0.5 * torch.where(chosen, product, 0.0).amax())
    if bool(coupled.any()):
        raise ObjectiveError(
            f"with batch_dims={residual.lane_dims_of_function} every problem must be one by itself, but"
            f"{name_lanes(coupled)} the derivative reads the unknowns of other problems (a mean over the batch, batch "
            "statistics of BatchNorm?). Use batch_dims=0, which makes one problem of all unknowns, or write the "
            "function so that no problem reads another."
        )


def _judge_change(spec: LayerSpec, measured: Stationarity, x: Leaves, theta: Leaves, rtol: float) -> None:
    """A Hessian that changes between the answer and the solution, or seems to because the function is random."""
    change = hessian_change(spec.residual, x, theta, measured)
    moved = change > CHANGES * rtol
    if not bool(moved.any()):
        return
    # in a part that works in a shorter dtype, F is known to its rounding, and no shorter step tells of a change
    pull = spec.residual.attached(x, theta).flat_pull(spec.residual.lane_dims)
    eps = 2 * float(rounding_of(pull, patternless(measured.gradient)).nan_to_num(0.0, 0.0).amax())
    moved = moved & (measured.distance > eps**TIGHT * measured.size)
    moved = moved & ~is_rounding(measured.gradient, measured.norm / CLEAR, spec.residual, x, theta, eps)
    if not bool(moved.any()):
        return
    random = moved & is_random(measured.gradient, spec.residual, x, theta)
    if bool(random.any()):
        return _tell_random(spec, random, random)
    pick = tuple(moved.nonzero()[0].tolist())
    message = (
        f"the solver's answer is about {measured.relative[pick].item():.1e} of its size from the solution, but the "
        f"{'Hessian' if spec.residual.is_gradient else 'Jacobian'} changes by {change[pick].item():.1e} of itself over "
        f"that distance{name_lanes(moved)} (a barrier, a cusp). The implicit gradient carries an error of that order. "
        "Solve the inner problem more tightly, pass polish=1 for a Newton step after the solver, or "
        "stationarity_rtol=None if an early stop is intended."
    )
    _tell(spec.settings.on_failure, moved, message, "changing Hessian")


def _tell_random(spec: LayerSpec, random: torch.Tensor, lanes: torch.Tensor) -> None:
    """Two evaluations in the ``random`` lanes differ; ``lanes``: those that fail by it."""
    message = (
        f"the {_what(spec)} is random{name_lanes(random)}: two evaluations at the solver's answer differ, so there "
        "is no solution to differentiate at. Dropout in train mode does that (call .eval() on its module), and so "
        "do torch.rand and torch.randn: draw once, before the layer, and pass the draw as one more theta."
    )
    _tell(spec.settings.on_failure, lanes, message, "random function")


def _tell(on_failure: OnFailure, lanes: torch.Tensor, message: str, kind: str) -> None:
    if on_failure in ("raise", "mask"):
        return refuse(lanes, StationarityError(message))
    warn(message, StationarityWarning, kind)


def _what(spec: LayerSpec) -> str:
    return "gradient of the objective" if spec.residual.is_gradient else "residual"


def _tell_not_stationary(
    spec: LayerSpec, measured: Stationarity, bad: torch.Tensor, rtol: float, limited: bool, refused: bool
) -> None:
    """Row "answer not stationary": the implicit gradient there is that of no minimum."""
    pick = tuple(bad.nonzero()[0].tolist())
    remedy = "Solve the inner problem more tightly, pass polish=1 for a Newton step after the solver"
    if refused:
        remedy = f"polish={spec.polish} did not help (no Newton step made it smaller). Solve the problem more tightly"
    elif limited:
        remedy = "The solver stopped at its step limit: raise its max_steps, pass polish=1 for a Newton step after it"
    message = (
        f"the solver's answer is not stationary{name_lanes(bad)}: the {_what(spec)} has norm "
        f"{measured.norm[pick].item():.3g} there, and the solution is at least about "
        f"{measured.distance[pick].item():.3g} away ({measured.relative[pick].item():.1e} of its size, allowed "
        f"{rtol:.1e}). The implicit gradient carries an error of that order at least. {remedy}, or "
        "stationarity_rtol=None if an early stop is intended."
    )
    _tell(spec.settings.on_failure, bad, message, f"not stationary {limited} {refused}")


def tell_step_limit(on_failure: OnFailure) -> None:
    """Apply the failure policy to a solver that says that it stopped at its step limit before its tolerance.

    A solver of many lanes does not say which of them it was, so nothing is masked: "mask" warns.
    """
    if on_failure == "ignore":
        return
    message = (
        "the solver stopped at its step limit before it reached its tolerance. The gradient at its answer is small, "
        "but where the problem is ill-conditioned the solution may be far all the same, and the implicit gradient "
        "wrong. Raise its max_steps, loosen its tolerance, pass polish=1 for a Newton step after the solver, or give "
        "max_steps alone if a fixed number of steps is intended."
    )
    if on_failure == "raise":
        raise NotConvergedError(message)
    warn(message, ConvergenceWarning, "step limit of the solver")
