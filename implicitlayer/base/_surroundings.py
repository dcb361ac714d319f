"""What surrounds a call and must not leak into the solve, and what torch cannot do inside."""

# NOTE [second derivatives]: a solution is differentiated through second derivatives of its objective. The fused kernels
# of attention have first ones only, so they are switched off where derivatives are made; the plain formula takes their
# place. What else torch cannot differentiate twice, or not under a transform, is named, with what to write instead.

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, ParamSpec, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from implicitlayer import _torch
from implicitlayer._errors import ImplicitLayerError, ObjectiveError
from implicitlayer.base._tree import is_data

P = ParamSpec("P")
R = TypeVar("R")


_DEVICE_TYPE = attrgetter("device.type")
NO_NUMBERS = (
    "a tensor on the device 'meta' has a shape but no numbers, which a solve needs. Give it a device with numbers."
)
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
        "Cannot access storage of Sparse",
        "a sparse tensor under forward mode (jvp, jacfwd, hessian), which torch has not",
        "Differentiate in reverse mode (jacrev, .backward()), or make it dense: .to_dense().",
    ),
    (
        "value out of a tracing tensor",
        "values while torch traces it (torch.func.linearize, make_fx)",
        "A solver decides by values and cannot be traced: torch.func.jvp or vjp take the place of linearize.",
    ),
    (
        "Inference tensors cannot be saved",
        "a closed-over tensor that was made in inference mode",
        "Pass it to the layer as one more theta, or close over .clone() of it, made outside of that mode.",
    ),
    (
        "higher order operator doesn't work unless|aot_autograd does not currently support double",
        "code of torch's compiler (torch.compile, torch.cond, while_loop), which has no second derivative",
        "Give what is not compiled, and compile around the layer; write torch.where in place of torch.cond.",
    ),
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
# what says so only where the function itself was run under a transform
_LIMITS_OF_TRANSFORMS = (
    (
        r"attempting to call Tensor.requires_grad_\(\)|element 0 of tensors does not require grad",
        "torch.autograd.grad (or .requires_grad_()) under a transform",
        "Write torch.func.grad(function)(x), which transforms can see through, or call the layer outside of them.",
    ),
    (
        r"vmap: It looks like you're (?:either \(1\) )?calling .item\(\)",
        "a Python number of a tensor, or a branch on its value, under vmap",
        "Compute with the tensor itself; write torch.where in place of a branch.",
    ),
)


@contextmanager
def plain_surroundings(tensors: Sequence[torch.Tensor], *, derivatives: bool = False) -> Iterator[None]:
    """Run the block without saved-tensor hooks and autocast, whatever is active around it.

    The graphs built inside live and die inside: hooks that offload, compress or count saved tensors (activation
    checkpointing) have no business with them, and torch.func refuses to run under such hooks. Autocast would give the
    forward and the backward solve different objectives; the layer works in the dtype of its tensors.

    ``derivatives``: the block takes derivatives of user code, with kernels that have second ones, and errors that name
    what torch cannot do; see NOTE [second derivatives].
    """
    for kind in set(map(_DEVICE_TYPE, tensors)):
        if kind == "meta":
            raise ValueError(NO_NUMBERS)
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False), plain_surroundings(tensors, derivatives=derivatives):
                yield
            return
    popped, switched = [], []
    while (pair := _torch.saving_hooks(False)) is not None:
        popped.append(pair)
        _torch.pop_saving_hooks()
    for enabled, switch in _SWITCHES if derivatives else ():
        if enabled():
            switch(False)
            switched.append(switch)
    try:
        yield
    except RuntimeError as error:
        if derivatives:
            name_limit(error)
        raise
    finally:
        for switch in switched:
            switch(True)
        for pack, unpack in reversed(popped):
            _torch.push_saving_hooks(pack, unpack)


class ReadingMode(TorchFunctionMode):
    """A mode of this library, active while a function of a layer runs: it watches what the function reads."""


def announce(tensor: Any) -> Any:
    """Let an enclosing finder see ``tensor``: our own Functions take tensors past every TorchFunctionMode."""
    if is_data(tensor) and _torch.num_modes() > 0:
        alias: torch.Tensor = tensor.view_as(tensor)
        return alias
    return tensor


@contextmanager
def unread() -> Iterator[None]:
    """Run the block, the solver of a layer, past the modes of a layer whose function it is called in.

    What a solver does is no part of the function around it: it may use NumPy and Python numbers. Modes of others (a
    default device is one) stay.
    """
    if not _torch.num_modes():
        yield
        return
    modes = [_torch.pop_mode() for _ in range(_torch.num_modes())][::-1]
    others = [mode for mode in modes if not isinstance(mode, ReadingMode)]
    for mode in others:
        _torch.push_mode(mode)
    try:
        yield
    finally:
        for _ in others:
            _torch.pop_mode()
        for mode in modes:
            _torch.push_mode(mode)


def saves_by_hooks() -> bool:
    """Whether hooks on saved tensors are active."""
    return _torch.saving_hooks(True) is not None


def out_of_inference(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies that autograd can record of tensors made in inference mode; the others as they are."""
    if not any(map(torch.Tensor.is_inference, tensors)):
        return list(tensors)
    return [tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]


def outside_compiled_code(function: Callable[P, R]) -> Callable[P, R]:
    """A graph break around ``function`` in code compiled by torch.compile: solvers are black boxes to it too."""
    uncompiled: Callable[P, R] = _torch.not_compiled(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return uncompiled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def random_states(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The states of torch's generators, on the CPU and where ``tensors`` are."""
    states = [torch.default_generator.get_state()]
    if torch.cuda.is_initialized():
        for index in sorted({tensor.device.index or 0 for tensor in tensors if tensor.is_cuda}):
            states.append(torch.cuda.default_generators[index].get_state())
    return states


def name_limit(error: Exception, *, transformed: bool = False) -> None:
    """Raise an ObjectiveError from ``error`` if it is one of torch's that says what torch cannot do.

    ``transformed``: it comes from a run of the function itself under a transform.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, ImplicitLayerError):
        return
    message, limits = str(error), (*_LIMITS, *_LIMITS_OF_TRANSFORMS) if transformed else _LIMITS
    for pattern, what, remedy in limits:
        if found := re.search(pattern, message, re.DOTALL):
            if remedy is None:
                remedy = next((text for key, text in _REMEDIES.items() if key in message), PLAINLY)
            operation = what.format(*found.groups())
            raise ObjectiveError(f"the objective (or a function of the layer) uses {operation}. {remedy}") from error
