"""What a layer really gives its tensors, for the tests of il.explain_gradient."""

# The derivatives behind a verdict are those of the layer, so an outcome is compared with the layer's gradient as it
# is: an error, None, exactly zero, or not zero. No tolerance is involved.

import sys
import warnings
from typing import Any

import torch
from references import F64
from torch import Tensor

import implicitlayer as il
from implicitlayer.explain._explain import GradientExplanation, explain_gradient

START = torch.tensor([1.1, 0.7], dtype=F64)
SETTINGS: dict[str, Any] = {"stationarity_rtol": None, "on_failure": "ignore", "linear_solver": il.Dense()}


def written(expression: str, operation: str) -> str:
    """How a verdict names a place: the expression as written, or, on Python 3.10, which keeps no columns, its operation
    and the line."""
    return f"`{expression}`" if sys.version_info >= (3, 11) else f"`{operation}` (test_"


def stay(f: Any, x: Any, *theta: Any) -> Any:
    """A solver that returns init: the implicit gradient there is as good as anywhere for None, zero or not."""
    return x


def layer_outcomes(layer: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> list[str]:
    """What a backward through the layer leaves in each of ``tensors``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about the mistakes under test
        try:
            value = sum(leaf.sum() for leaf in torch.utils._pytree.tree_leaves(layer(*args)))
        except Exception:
            return ["error" if t.requires_grad else "none" for t in tensors]
        outcomes = []
        for tensor in tensors:
            if not tensor.requires_grad or not value.requires_grad:
                outcomes.append("none")
                continue
            try:
                (gradient,) = torch.autograd.grad(value, tensor, retain_graph=True, allow_unused=True)
            except Exception:
                outcomes.append("error")
                continue
            outcomes.append("none" if gradient is None else "gradient" if bool((gradient != 0).any()) else "zero")
    return outcomes


def explained(layer: Any, *args: Any, **tensors: Tensor) -> GradientExplanation:
    """The explanation, after its outcomes were compared with the layer's; ``tensors`` by name of leaf."""
    explanation = explain_gradient(layer, *args)
    names = [name.replace("__", ".") for name in tensors]
    assert [explanation[name].outcome for name in names] == layer_outcomes(layer, args, list(tensors.values()))
    return explanation


def scalar(value: float = 1.3) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


def squares(x: Tensor) -> Tensor:
    return (x**2).sum()
