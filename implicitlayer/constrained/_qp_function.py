"""The plain path of ``il.qp``: a Function whose backward is one solve with the factors of the forward pass."""

# NOTE [plain path]: a program whose solution is proved, with nothing to tell about it, needs none of what a layer does
# for solvers and functions that it does not know. This Function hands the proof to backward, which solves K u = v with
# its factors, looks at the residual, and reads the gradients off. Everything else is left to the general layer, of
# which this is a special case, with the same numbers: a kink, a program that is not proved, a transform, records that
# somebody collects; and in backward a second derivative, batched cotangents, or a solve that is not good enough.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer.base._records import listening
from implicitlayer.base._surroundings import saves_by_hooks
from implicitlayer.base._types import Leaves
from implicitlayer.constrained._qp_arguments import Entries
from implicitlayer.constrained._qp_solve import Proof
from implicitlayer.equation._capture import derivatives_possible
from implicitlayer.equation._solve import alive, over_batched_vectors
from implicitlayer.linear._operator import default_rtol

Pull = list[torch.Tensor | None]
# (x, y, z and mask of the proof, data, cotangents of these four, which data need a gradient) -> their gradients
General = Callable[[Leaves, Leaves, Pull, tuple[bool, ...]], Pull]
# (x, y, z), (u_x, u_y, u_z), data, which of them need a gradient -> <dF/d data, u>
ByData = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], Leaves, Sequence[bool]], Pull]


def in_plain_surroundings(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether nothing is at work around a call that the plain path would have to know."""
    return not (
        _torch.transforms_active()
        or _torch.forward_mode_active()
        or _torch.num_modes()
        or listening()
        or saves_by_hooks()
        or any(t.is_inference() for t in tensors)
    )


class ProvedProgram(torch.autograd.Function):
    """``apply(proof, (general, by_data), Q, p, A, b, G, h) -> x, y, z``; see NOTE [plain path]."""

    @staticmethod
    def forward(
        ctx: Any, proof: Proof, rules: tuple[General, ByData], *data: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, y, z, held = proof.solution()
        dtype = data[1].dtype
        x, y, z = (t.to(dtype, copy=True) for t in (x, y, z))  # what is handed out may be written to
        ctx.proof, ctx.rules = proof, rules
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, z, held, *data)
        return x, y, z

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        solution, data = list(saved[:4]), list(saved[4:])
        given, (general, pull) = [c for c in cotangents if c is not None], ctx.rules
        if not given:
            return (None,) * 8
        if not (derivatives_possible() or listening() or any(_torch.is_batched_by_grad(c) for c in given)):
            u = _adjoint(ctx.proof, solution, cotangents)
            if u is not None:
                return (None, None, *pull(solution[:3], u, data, needed))
        solution, data = list(alive(solution)), list(alive(data))
        solution[3] = solution[3].to(data[1].dtype)
        rule = lambda v: general(solution, data, v, needed)  # noqa: E731
        return (None, None, *over_batched_vectors(rule, [*alive(cotangents), None]))


def _adjoint(
    proof: Proof, solution: Leaves, cotangents: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """u by the factors of the proof; None where these do not give it to the usual tolerance."""
    x, y = solution[:2]
    u = proof.adjoint([None if c is None else c.double() for c in cotangents], default_rtol(x.dtype))
    if u is None:
        return None
    ux, uw = (-t.to(x.dtype) for t in u)
    return ux, uw[..., : y.shape[-1]], uw[..., y.shape[-1] :]


# With F the conditions of ``_qp`` at u = (u_x, u_y, u_z), u_z zero where an inequality is not held, as z is:
#     <F, u> = u_x'(Q x + p + A'y + G'z) + u_y'(A x - b) + u_z'(G x - h),   Q its symmetric part.


def by_data(
    at: Sequence[torch.Tensor],
    u: Sequence[torch.Tensor],
    data: Leaves,
    needed: Sequence[bool],
    places: Sequence[Entries] = (),
) -> Pull:
    """The derivatives of <F, u> in the data that are needed; summed where programs share them.

    Of sparse matrices Q, A, G those in the values of the ``places`` that are stored.
    """
    (x, y, z), (ux, uy, uz) = at, u
    found: Pull = [None] * 6
    both = torch.stack([ux, x], -2)
    for k, w, uw in ((0, x, ux), (2, y, uy), (4, z, uz)):
        if needed[k]:
            left = torch.stack([w, uw] if k else [w / 2, uw / 2], -1)
            found[k] = places[k // 2].of_product(left, both) if places else left @ both
        if k and needed[k + 1]:
            found[k + 1] = -uw
    if needed[1]:
        found[1] = ux
    return [
        t if t is None or t.shape == like.shape else t.sum_to_size(like.shape)
        for t, like in zip(found, data, strict=True)
    ]
