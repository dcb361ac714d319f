"""What torch cannot differentiate twice, or not under a transform: avoided where it can be, named where it cannot."""

# A solution is differentiated through second derivatives of its objective. The fused kernels of attention have first
# ones only, so they are switched off where derivatives are made; the plain formula takes their place. What is left is
# named, with what to write in its place.

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from implicitlayer._errors import ImplicitLayerError, ObjectiveError

_FUSED = ("flash", "mem_efficient", "cudnn")
_cuda: Any = torch.backends.cuda
_SWITCHES = [(getattr(_cuda, f"{name}_sdp_enabled"), getattr(_cuda, f"enable_{name}_sdp")) for name in _FUSED]

PLAINLY = "Write it in plain operations, or keep it out of the objective (compute it before, and pass it as a theta)."
_REMEDIES = {
    "_cdist": "Write torch.linalg.vector_norm(a[..., :, None, :] - b[..., None, :, :], dim=-1) in place of cdist.",
    "_embedding_bag": "Write torch.nn.functional.embedding(index, weight).sum(-2) (or .mean) in place of EmbeddingBag.",
    "attention": "Write the attention as softmax(q @ k.mT / sqrt(d)) @ v.",
}
_UNDER_TRANSFORMS = (
    "Transforms (vmap), second derivatives and closed-over tensors that are no leaves need torch.func, which cannot "
    "run it. Give an autograd.Function a setup_context (and generate_vmap_rule = True), remove full backward hooks "
    "from the modules, or call torch.utils.checkpoint around the layer, not inside."
)
_LANES = (
    "Make the tensor that is written to of x or theta (torch.zeros_like(x), x.new_zeros(...) do), or write torch.cat, "
    "torch.stack or torch.where in place of writing into it."
)
_LIMITS = (
    (
        r"[Dd]erivative for '?(?:aten::)?(\w+)'? is not implemented",
        "{0}, of which torch has no second derivative",
        None,
    ),
    ("Autograd not support dtype", "an operation of which torch has no second derivative", None),
    ("do not have strides", "a sparse CSR tensor where torch.func is needed", "Make it a COO one: .to_sparse_coo()."),
    ("once_differentiable", "an autograd.Function that is once_differentiable", PLAINLY),
    (
        "must override the setup_context",
        "an autograd.Function without setup_context (or a full backward hook)",
        _UNDER_TRANSFORMS,
    ),
    (
        "Trying to backward through the graph a second time",
        "a graph that has been used up: something that it has kept of an earlier run (a cache)",
        "Compute it anew in every run. (Or the solver calls backward twice for one value: then retain_graph=True.)",
    ),
    (
        "use_reentrant=True",
        "torch.utils.checkpoint with use_reentrant=True, whose backward has no derivative",
        "Pass use_reentrant=False.",
    ),
    (
        "torch.utils.checkpoint|saved tensor hooks|escaped from inside a function being vmapped",
        "torch.utils.checkpoint (or something else that keeps tensors for later)",
        _UNDER_TRANSFORMS,
    ),
    (
        "vmap: .*(in-place|inplace|not possible because there exists a Tensor `other`)|output with shape .* broadcast|"
        "doesn't match the broadcast shape",
        "an operation in place on a tensor that has not the shape of its result (under vmap, not its lanes)",
        _LANES,
    ),
    (
        "leaf Variable that requires grad.*in-place|mutate a captured Tensor",
        "an operation in place on a tensor (x or theta)",
        "Write it out of place: x * 2 for x.mul_(2), torch.stack or torch.cat for a buffer that is filled.",
    ),
)


@contextmanager
def limits_named() -> Iterator[None]:
    """Run the block, which runs user code, with errors that name what torch cannot do there and the remedy."""
    try:
        yield
    except RuntimeError as error:
        name_limit(error)
        raise


@contextmanager
def second_derivatives() -> Iterator[None]:
    """The same of a block that takes derivatives of user code, with kernels that have second ones; see the top."""
    switched = []
    for enabled, switch in _SWITCHES:
        if enabled():
            switch(False)
            switched.append(switch)
    try:
        yield
    except RuntimeError as error:
        name_limit(error)
        raise
    finally:
        for switch in switched:
            switch(True)


def name_limit(error: Exception) -> None:
    """Raise an ObjectiveError from ``error`` if it is one of torch's that says what torch cannot do."""
    unknown = isinstance(error, RuntimeError) and not isinstance(error, ImplicitLayerError)
    named = _named(str(error)) if unknown else None
    if named is not None:
        raise ObjectiveError(named) from error


def _named(message: str) -> str | None:
    for pattern, what, remedy in _LIMITS:
        found = re.search(pattern, message, re.DOTALL)
        if found is None:
            continue
        operation = what.format(*found.groups())
        if remedy is None:
            remedy = next((text for key, text in _REMEDIES.items() if key in message), PLAINLY)
        return f"the objective (or a function of the layer) uses {operation}. {remedy}"
    return None
