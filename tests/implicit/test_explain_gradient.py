"""il.explain_gradient, verdict by verdict: each is compared with what the layer itself then gives."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from explanations import SETTINGS, START, explained, scalar, squares, stay, written
from references import F64
from torch import Tensor

import implicitlayer as il
from implicitlayer.explain._explain import explain_gradient


def detached_in_a_block(x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        doubled = t * 2
    return doubled * squares(x)


def through_a_buffer(x: Tensor, t: Tensor) -> Tensor:
    buffer = torch.zeros(2, dtype=F64)
    buffer[0] = t
    return (buffer * x**2).sum()


class Doubled(torch.autograd.Function):
    """With a derivative: what its forward does without grad mode is no detachment."""

    @staticmethod
    def forward(t: Tensor) -> Tensor:
        return t * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return 2 * gradient


class Severed(Doubled):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return 2 * gradient


DETACH = written("t.detach()", ".detach()")
CLAMP = written("t.clamp(0, 1)", "clamp()")
NUMPY = written("t.detach().numpy()", ".numpy()")

# name: (what is added to |x - s|^2, outcome, part of the verdict, source text that is pointed at)
CASES: dict[str, tuple[Callable[[Tensor, Tensor], Any], str, str, str]] = {
    "a factor": (lambda x, t: t * squares(x), "gradient", "gets its gradient.", ""),
    "as_tensor of a tensor": (lambda x, t: torch.as_tensor(t) * squares(x), "gradient", "gets its gradient.", ""),
    "written into a buffer": (through_a_buffer, "gradient", "gets its gradient.", ""),
    "a Function": (lambda x, t: Doubled.apply(t) * squares(x), "gradient", "gets its gradient.", ""),
    "a gradient inside": (
        lambda x, t: torch.func.grad(lambda y: t * squares(y))(x).sum() ** 2,
        "gradient",
        "gets its gradient.",
        "",
    ),
    "unused": (lambda x, t: 0, "zero", "never reads it", ""),
    "additive": (lambda x, t: t**2, "zero", "a term of its own, on which the solution does not depend", ""),
    "additive and detached": (lambda x, t: t.item() ** 2, "error", "takes a Python number out of", "t.item()"),
    "cancels": (lambda x, t: (t * x - t * x).sum(), "zero", "does not change the gradient", "t * x"),
    "item": (lambda x, t: t.item() * squares(x), "error", "takes a Python number out of", "t.item()"),
    "float": (lambda x, t: float(t) * squares(x), "error", "takes a Python number out of", "float(t)"),
    "math": (lambda x, t: math.exp(t) * squares(x), "error", "takes a Python number out of", "math.exp(t)"),
    "data": (lambda x, t: t.data * squares(x), "zero", "detached at `t.data`", "t.data"),
    "detach": (lambda x, t: t.detach() * squares(x), "zero", f"detached at {DETACH}", "t.detach()"),
    "tolist": (lambda x, t: t.tolist() * squares(x), "error", "takes a Python number out of", "t.tolist()"),
    "copy": (lambda x, t: torch.tensor(t) * squares(x), "zero", "torch.stack", "torch.tensor(t)"),
    "copies": (lambda x, t: (torch.tensor([t, t]) * x**2).sum(), "zero", "torch.stack", "torch.tensor([t, t])"),
    "no_grad": (detached_in_a_block, "zero", "take it out of torch.no_grad()", "doubled = t * 2"),
    "integers": (lambda x, t: t.int() * squares(x), "zero", "Integers have no derivative", "t.int()"),
    "argmax": (
        lambda x, t: torch.stack([t, 2 * t]).argmax() * squares(x),
        "zero",
        "as integers only",
        "torch.stack([t, 2 * t]).argmax()",
    ),
    "branch": (lambda x, t: squares(x) if t > 0 else 2 * squares(x), "zero", "only a truth value leaves it", "t > 0"),
    "where": (lambda x, t: torch.where(t > 0, x, 2 * x).sum() ** 2, "zero", "only a truth value", "t > 0"),
    "round": (lambda x, t: t.round() * squares(x), "zero", "through `t.round()`", "t.round()"),
    "sign": (lambda x, t: torch.sign(t) * squares(x), "zero", "whose derivative is zero", "torch.sign(t)"),
    "clamp": (lambda x, t: t.clamp(0, 1) * squares(x), "zero", f"through {CLAMP}", "t.clamp(0, 1)"),
    "severed": (lambda x, t: Severed.apply(t) * squares(x), "zero", "autograd sees no path from it", "t * 2"),
    "shape only": (lambda x, t: torch.zeros_like(t) * squares(x), "zero", "does not change", "zeros_like(t)"),
    "partly detached": (
        lambda x, t: t.item() * t * squares(x),
        "error",
        "takes a Python number out of",
        "t.item()",
    ),
    "NumPy": (
        lambda x, t: torch.as_tensor(np.exp(t.detach().numpy())) * squares(x),
        "error",
        f"ClosureError: NumPy reads it at {NUMPY}",
        "t.detach().numpy()",
    ),
    "an old Function": (lambda x, t: OldStyle.apply(t) * squares(x), "gradient", "gets its gradient", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_a_theta_gets_what_its_verdict_says(case: str) -> None:
    term, outcome, text, source = CASES[case]
    layer = il.argmin(lambda x, s, t: squares(x - s) + term(x, t), stay, **SETTINGS)
    s, t = torch.ones(2, dtype=F64, requires_grad=True), scalar()
    leaf = explained(layer, START, s, t, **{"theta[0]": s, "theta[1]": t})["theta[1]"]
    assert leaf.outcome == outcome and text in leaf.verdict
    assert leaf.reaches_gradient == (outcome == "gradient" or case == "partly detached")
    assert leaf.read == (case != "unused") and leaf.reaches_value == (leaf.reaches_gradient or case == "additive")
    if source:
        assert leaf.where is not None and leaf.where.filename == __file__ and source in leaf.where.text


@pytest.mark.parametrize("case", ["a Function", "an old Function", "severed"])
def test_a_function_is_known_where_torch_calls_it_from_c(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does from 2.14 on, where ``apply`` has no frame of Python that could be found."""
    monkeypatch.setattr(torch.autograd.Function, "apply", torch._C._FunctionBase.__dict__["apply"])
    test_a_theta_gets_what_its_verdict_says(case)


@pytest.mark.parametrize("case", ["a factor", "additive", "item", "NumPy"])
def test_without_requires_grad_the_verdict_says_whether_that_would_do(case: str) -> None:
    term, _, _, source = CASES[case]
    layer = il.argmin(lambda x, s, t: squares(x - s) + term(x, t), stay, **SETTINGS)
    s, t = torch.ones(2, dtype=F64, requires_grad=True), scalar().detach()
    leaf = explained(layer, START, s, t, **{"theta[0]": s, "theta[1]": t})["theta[1]"]
    assert leaf.outcome == "none" and "requires_grad is False. Call .requires_grad_()" in leaf.verdict
    assert ("That alone would not do" in leaf.verdict) == (case != "a factor") and source in leaf.verdict


def test_integers_numbers_and_complex_tensors_are_told_apart() -> None:
    layer = il.argmin(lambda x, t: t["s"] * t["n"] * t["p"] * squares(x) * t["c"].abs(), stay, **SETTINGS)
    t = {"s": scalar(), "n": torch.tensor(2), "p": 3.0, "c": torch.tensor(1j, dtype=torch.complex128)}
    names = {f"theta[0]['{key}']": value for key, value in t.items() if isinstance(value, Tensor)}
    explanation = explained(layer, START, t, **names)
    assert "int64 has no derivative" in explanation["theta[0]['n']"].verdict
    assert "a Python number gets no gradient" in explanation["theta[0]['p']"].verdict
    assert "torch.view_as_real" in explanation["theta[0]['c']"].verdict
    t["c"] = t["c"].requires_grad_()
    with pytest.raises(TypeError, match="complex"):
        layer(START, t)
    assert explain_gradient(layer, START, t)["theta[0]['c']"].outcome == "error"


def test_a_tensor_in_two_roles_has_a_verdict_for_each() -> None:
    t = torch.ones(2, dtype=F64, requires_grad=True)
    layer = il.argmin(lambda x, a, b: squares(x - a) + squares(b) + (t * x).sum(), stay, **SETTINGS)
    explanation = explain_gradient(layer, t, t, t)
    assert [leaf.outcome for leaf in explanation.leaves] == ["gradient", "zero", "gradient"]
    assert "the same tensor as theta[1]" in explanation["theta[0]"].verdict
    assert "the same tensor as theta[0]" in explanation["t"].verdict
    assert "It is also init, which gets no gradient" in explanation["theta[0]"].verdict
    assert "init requires a gradient and gets none" in explanation["x"].verdict
    (gradient,) = torch.autograd.grad(layer(t, t, t).sum(), t)  # x = a - t / 2: 1 from a, 0 from b and init, -1/2
    assert gradient.tolist() == [0.5, 0.5]


def test_a_theta_that_is_no_leaf_passes_its_gradient_on() -> None:
    w = torch.ones(2, dtype=F64, requires_grad=True)
    t = w * 2
    layer = il.argmin(lambda x, t: squares(x - t), stay, **SETTINGS)
    assert "its own .grad stays None" in explained(layer, START, t, **{"theta[0]": t})["theta[0]"].verdict
    t.retain_grad()
    assert "its own .grad" not in explain_gradient(layer, START, t)["theta[0]"].verdict


def test_surroundings_without_a_graph_are_said_first() -> None:
    layer, t = il.argmin(lambda x, t: squares(x - t), stay, **SETTINGS), scalar()
    for surroundings, text in ((torch.no_grad(), "Grad mode is off"), (torch.inference_mode(), "Inference mode is on")):
        with surroundings:
            explanation = explained(layer, START, t, **{"theta[0]": t})
        assert str(explanation).startswith(text) and explanation["theta[0]"].outcome == "none"
        assert "gets its gradient" in explanation["theta[0]"].verdict
    explanation = explained(layer, START, t.detach(), **{"theta[0]": t.detach()})
    assert explanation.notes == ("Nothing here requires a gradient: the layer's answer has no graph.",)


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        (lambda x, t: squares(x.detach()) * t, "detached at `x.detach()`"),
        (lambda x, t: t**2, "the objective never reads it"),
        (lambda x, t: squares(x.detach()) * t + 0 * t, "does not depend on it in a way that autograd can see"),
    ],
)
def test_an_objective_without_x_is_an_error_of_the_layer_and_explained(objective: Any, text: str) -> None:
    layer, t = il.argmin(objective, stay, **{**SETTINGS, "stationarity_rtol": 1e-3}), scalar()
    explanation = explained(layer, START, t, **{"theta[0]": t})
    assert "ObjectiveError" in explanation["theta[0]"].verdict and text in explanation["x"].verdict


def test_an_objective_that_is_linear_in_x_is_said_to_be_singular() -> None:
    t = torch.ones(2, dtype=F64, requires_grad=True)
    layer = il.argmin(lambda x, t: (t * x).sum(), stay, stationarity_rtol=None)
    assert "the linear solve of a backward is singular" in explain_gradient(layer, START, t)["x"].verdict
    with pytest.raises(il.LinearSolveError):
        layer(START, t).sum().backward()
    damped = il.argmin(lambda x, t: (t * x).sum(), stay, stationarity_rtol=None, damping=1.0)
    explanation = explained(damped, START, t, **{"theta[0]": t})
    assert "singular" not in explanation["x"].verdict and explanation["theta[0]"].outcome == "gradient"


def test_an_x_that_is_partly_detached_is_pointed_at() -> None:
    layer, t = il.argmin(lambda x, t: (x.detach() * x).sum() * t + squares(x), stay, **SETTINGS), scalar()
    leaf = explained(layer, START, t, **{"theta[0]": t})["x"]
    assert "derivatives in x miss it" in leaf.verdict and leaf.where is not None and "x.detach()" in leaf.where.text
    layer = il.argmin(lambda x, t: squares(x) * float(x.detach().numpy().sum()) * t, stay, **SETTINGS)
    explanation = explained(layer, START, t, **{"theta[0]": t})
    assert explanation["theta[0]"].outcome == "error" and "NumPy reads it at" in explanation["x"].verdict
