"""What torch cannot differentiate twice, or not under a transform: avoided where it can be, named where it cannot."""

# A solution is differentiated through second derivatives of its objective. The fused kernels of attention have first
# ones only, so they are switched off where derivatives are made; the plain formula takes their place. What is left is
# named, with what to write in its place.

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from implicitlayer._errors import ObjectiveError

_FUSED = ("flash", "mem_efficient", "cudnn")
_cuda: Any = torch.backends.cuda
_SWITCHES = [(getattr(_cuda, f"{name}_sdp_enabled"), getattr(_cuda, f"enable_{name}_sdp")) for name in _FUSED]

_PLAINLY = "Write it in plain operations, or keep it out of the objective (compute it before, and pass it as a theta)."
_REMEDIES = {
    "_cdist": "Write torch.linalg.vector_norm(a[..., :, None, :] - b[..., None, :, :], dim=-1) in place of cdist.",
    "_embedding_bag": "Write torch.nn.functional.embedding(index, weight).sum(-2) (or .mean) in place of EmbeddingBag.",
    "attention": "Write the attention as softmax(q @ k.mT / sqrt(d)) @ v.",
}
_UNDER_TRANSFORMS = (
    "Closed-over weights and second derivatives need torch.func, which cannot run it. Give an autograd.Function a "
    "setup_context (and generate_vmap_rule = True), remove full backward hooks from the modules"
)
_IN_PLACE = "an operation in place on a tensor"
_OUT = "Write it out of place: x * 2 for x.mul_(2), torch.stack or torch.cat for a buffer that is filled."
_LIMITS = (
    (
        r"[Dd]erivative for '?(?:aten::)?(\w+)'? is not implemented",
        "{0}, of which torch has no second derivative",
        None,
    ),
    ("Autograd not support dtype", "an operation of which torch has no second derivative", None),
    ("do not have strides", "a sparse CSR tensor where torch.func is needed", "Make it a COO one: .to_sparse_coo()."),
    ("once_differentiable", "an autograd.Function that is once_differentiable", _PLAINLY),
    ("must override the setup_context", "an autograd.Function without setup_context (or a full backward hook)", ""),
    ("torch.utils.checkpoint|saved tensor hooks", "torch.utils.checkpoint (or hooks on saved tensors)", ""),
    ("vmap: .*(in-place|inplace)|doesn't match the broadcast shape", _IN_PLACE + " without the lanes of vmap", _OUT),
    ("leaf Variable that requires grad.*in-place|mutate a captured Tensor", _IN_PLACE + " (x or theta)", _OUT),
)


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Run the block, which takes derivatives of user code, with kernels that have second ones; see the top."""
    switched = [switch for enabled, switch in _SWITCHES if enabled()]
    for switch in switched:
        switch(False)
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
    named = _named(str(error)) if isinstance(error, RuntimeError) else None
    if named is not None:
        raise ObjectiveError(named) from error


def _named(message: str) -> str | None:
    for pattern, what, remedy in _LIMITS:
        found = re.search(pattern, message, re.DOTALL)
        if found is None:
            continue
        operation = what.format(*found.groups())
        if remedy is None:
            remedy = next((text for key, text in _REMEDIES.items() if key in message), _PLAINLY)
        elif not remedy:
            remedy = f"{_UNDER_TRANSFORMS}, or call torch.utils.checkpoint around the layer, not inside."
        return f"the objective (or a function of the layer) uses {operation}. {remedy}"
    return None


def refuse_once_differentiable(node: Any) -> None:
    """Raise for the node of a Function marked once_differentiable: torch takes its second derivative as zero."""
    function = getattr(type(node), "_forward_cls", None)
    if function is not None and function.backward.__code__.co_filename == _ONCE.__code__.co_filename:
        raise ObjectiveError(
            f"the objective uses the autograd.Function {function.__name__}, which is once_differentiable: torch would "
            f"take its second derivative as zero in silence, and the gradient would be wrong. {_PLAINLY}"
        )


_ONCE = torch.autograd.function.once_differentiable


def leaves_of(values: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The leaf tensors that the graph of ``values`` reaches."""
    yield from (value for value in values if value.grad_fn is None and value.requires_grad)
    stack = [value.grad_fn for value in values if value.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        refuse_once_differentiable(node)
        if type(node).__name__ == "AccumulateGrad":
            variable: torch.Tensor = node.variable  # type: ignore[attr-defined]
            yield variable
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
