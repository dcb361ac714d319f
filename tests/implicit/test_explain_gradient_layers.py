"""il.explain_gradient for every kind of layer, and the names it gives to closed-over tensors."""

import functools
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from explanations import SETTINGS, START, explained, layer_outcomes, scalar, squares, stay, written
from references import F64
from torch import Tensor, nn

import implicitlayer as il
from implicitlayer.explain._explain import explain_gradient


class Box:
    def __init__(self, w: Tensor) -> None:
        self.w = w


def test_tensors_in_an_object_that_is_no_pytree_count_as_closed_over() -> None:
    box = Box(scalar())
    layer = il.argmin(lambda x, b: squares(x) * b.w, stay, **SETTINGS)
    explanation = explained(layer, START, box, **{"theta[0]__w": box.w})
    assert "pytrees take a Box as one leaf" in explanation["theta[0]"].verdict
    assert explanation["theta[0].w"].role == "closed over" and explanation["theta[0].w"].outcome == "gradient"
    other = explain_gradient(il.argmin(lambda x, mode: squares(x), stay, **SETTINGS), START, "fast")
    assert "a str is passed through" in other["theta[0]"].verdict


WEIGHT = torch.tensor(2.0, dtype=F64, requires_grad=True)


def test_closed_over_tensors_are_found_and_named() -> None:
    offset, data, held = scalar(), torch.ones(2, dtype=F64), {"a": [scalar()]}

    def objective(x: Tensor, t: Tensor, *, scale: Tensor) -> Tensor:
        return scale * squares(x - data) * WEIGHT + (t * offset * held["a"][0] * x).sum()

    scale, t = scalar(), scalar()
    layer = il.argmin(functools.partial(objective, scale=scale), stay, **SETTINGS)
    tensors = {"offset": offset, "WEIGHT": WEIGHT, "scale": scale, "held['a'][0]": held["a"][0], "data": data}
    explanation = explained(layer, START, t, **tensors)
    places = {leaf.name: leaf.found_in for leaf in explanation.leaves if leaf.role == "closed over"}
    assert places == {
        "offset": "closure",
        "data": "closure",
        "held['a'][0]": "closure",
        "WEIGHT": "globals",
        "scale": "partial argument",
    }
    assert "closed over `offset` (closure, float64, shape (), requires_grad=True): gets its gradient." in str(
        explanation
    )


def test_attributes_and_tensors_without_a_name_are_named_as_far_as_can_be() -> None:
    class Model:
        def __init__(self) -> None:
            self.weight = scalar()

        def objective(self, x: Tensor) -> Tensor:
            return self.weight * squares(x)

    model = Model()
    assert explained(il.argmin(model.objective, stay, **SETTINGS), START, self__weight=model.weight)
    hidden = scalar()
    read = itertools.repeat(hidden).__next__
    layer = il.argmin(lambda x: squares(x) * read(), stay, **SETTINGS)
    leaf = explain_gradient(layer, START).leaves[0]
    assert leaf.name == "closed_over[0]" and leaf.found_in == "its name was not found" and leaf.outcome == "gradient"


class Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3, dtype=F64)
        self.idle = nn.Parameter(torch.ones(1, dtype=F64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return squares(torch.tanh(self.linear(x))) + t * squares(x)


@pytest.mark.parametrize("make", [il.argmin, il.ArgminLayer])
def test_parameters_of_a_module_have_their_names_and_the_unread_one_is_listed(make: Any) -> None:
    energy, t = Energy(), scalar()
    layer = make(energy, stay, **SETTINGS)
    linear, idle = energy.linear, energy.idle
    explanation = explain_gradient(layer, START, t)
    tensors = {"objective.linear.weight": linear.weight, "objective.linear.bias": linear.bias, "objective.idle": idle}
    assert [explanation[name].outcome for name in tensors] == ["gradient", "gradient", "none"]
    assert layer_outcomes(layer, (START, t), list(tensors.values())) == ["gradient", "gradient", "none"]
    assert "never reads it" in explanation["objective.idle"].verdict


def test_a_module_with_an_init_of_its_own_takes_the_arguments_of_its_forward() -> None:
    t = torch.ones(2, dtype=F64, requires_grad=True)
    for init in (START, torch.zeros_like):
        layer = il.ArgminLayer(lambda x, t: squares(x - t), stay, init=init, **SETTINGS)
        assert explained(layer, t, **{"theta[0]": t})["theta[0]"].outcome == "gradient"


def test_a_tensor_that_cannot_be_followed_is_refused_as_the_layer_does() -> None:
    w, t = scalar(), scalar()

    def objective(x: Tensor, t: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # as in an extension
            unseen = w * 2
        return squares(x) * unseen * t

    layer = il.argmin(objective, stay, **SETTINGS)
    assert "ClosureError" in explained(layer, START, t, **{"theta[0]": t})["theta[0]"].verdict


@pytest.mark.parametrize("detached", [False, True])
def test_roots_and_fixed_points_are_explained_by_their_own_equation(detached: bool) -> None:
    a, b = torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True), scalar()
    read: Callable[[Tensor], Tensor] = torch.detach if detached else torch.Tensor.clone
    root = il.root(lambda x, a, b: x**2 - read(a) + 0 * b, stay, stationarity_rtol=None, on_failure="ignore")
    heron = il.fixed_point(
        lambda x, a, b: 0.5 * (x + read(a) / x) + 0 * b, stay, stationarity_rtol=None, on_failure="ignore"
    )
    for layer, word in ((root, "the residual"), (heron, "the map")):
        explanation = explained(layer, START, a, b, **{"theta[0]": a, "theta[1]": b})
        assert [leaf.outcome for leaf in explanation.leaves] == ["zero" if detached else "gradient", "zero"]
        assert f"reaches {word} through {written('0 * b', 'mul()')}" in explanation["theta[1]"].verdict
        assert explanation["x"].verdict == "in order."


def test_pytrees_batches_and_auxiliary_values_are_understood() -> None:
    def objective(x: dict[str, Tensor], t: dict[str, Tensor]) -> tuple[Tensor, str]:
        return ((x["a"] - t["a"]) ** 2).sum(-1) + (x["b"] ** 2).sum(-1) + t["c"].sum(-1), "aux"

    t = {k: torch.ones(4, 2, dtype=F64, requires_grad=True) for k in "abc"}
    init = {k: torch.ones(4, 2, dtype=F64) for k in "ab"}
    layer = il.argmin(objective, stay, objective_has_aux=True, batch_dims=1, **SETTINGS)
    explanation = explained(layer, init, t, **{f"theta[0]['{k}']": t[k] for k in "abc"})
    assert [leaf.outcome for leaf in explanation.leaves] == ["gradient", "zero", "zero"]
    assert [leaf.name for leaf in explanation.unknowns] == ["x['a']", "x['b']"]
    assert explanation["theta[0]['a']"].shape == (4, 2) and explanation["theta[0]['a']"].dtype == F64


def test_a_proximal_objective_names_its_learned_strength_and_the_rounding_of_its_loss() -> None:
    strength, data = scalar(), torch.ones(2, dtype=F64, requires_grad=True)
    layer = il.argmin(il.proximal(lambda phi, d: squares(phi) * d.round().sum(), strength), stay, **SETTINGS)
    theta = torch.zeros(2, dtype=F64, requires_grad=True)
    tensors = {"theta[0]": theta, "theta[1]": data, "objective.strength": strength}
    explanation = explained(layer, START, theta, data, **tensors)
    assert [leaf.outcome for leaf in explanation.leaves] == ["gradient", "zero", "gradient"]
    assert f"through {written('d.round()', 'round()')}" in explanation["theta[1]"].verdict


def test_what_is_no_layer_is_refused_with_what_is_accepted() -> None:
    inner = il.ArgminLayer(lambda x, t: squares(x - t), stay, init=START)
    with pytest.raises(TypeError, match=r"got Sequential: .* holds one at '1': pass layer.get_submodule\('1'\)"):
        explain_gradient(nn.Sequential(nn.Identity(), inner), START)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got function: it takes what il.argmin, il.root or il.fixed_point returns"):
        explain_gradient(stay, START)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"explain_gradient\(layer, init, \*theta\) needs init"):
        explain_gradient(il.argmin(squares, stay))
    with pytest.raises(
        TypeError, match=r"explain_gradient\(layer, init, \*theta\) needs init: the layer has stored none"
    ):
        explain_gradient(il.ArgminLayer(squares, stay))
    with pytest.raises(il.UnsupportedTransformError, match=r"inside a torch\.func transform"):
        torch.func.grad(lambda t: explain_gradient(il.argmin(squares, stay), t))(START)
    with pytest.raises(il.ObjectiveError, match="must return a 0-d tensor"):
        explain_gradient(il.argmin(lambda x: x**2, stay), START)
    with pytest.raises(KeyError, match=r"no leaf is named 'y'; there are \['x'\]"):
        explain_gradient(il.argmin(squares, stay), START)["y"]


def test_an_explanation_runs_no_solver_and_leaves_no_trace() -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("the solver was called")

    t = torch.ones(2, dtype=F64, requires_grad=True)
    layer = il.argmin(lambda x, t: squares(x - t * torch.rand(2, dtype=F64)), refuse)
    state, version = torch.get_rng_state(), t._version
    explanation = explain_gradient(layer, START, t)
    assert explanation["theta[0]"].outcome == "gradient"
    assert torch.equal(torch.get_rng_state(), state) and t.grad is None and t._version == version
    alive = weakref.ref(t)
    del t
    gc.collect()
    assert alive() is None, f"{explanation} holds it"


def test_writing_into_a_closed_over_tensor_is_an_error_as_in_the_layer() -> None:
    log, t = torch.zeros(3, dtype=F64), scalar()

    def objective(x: Tensor, t: Tensor) -> Tensor:
        log[0] = squares(x).detach()
        return t * squares(x)

    layer = il.argmin(objective, stay, **SETTINGS)
    assert "the objective itself changes a tensor" in explained(layer, START, t, **{"theta[0]": t})["theta[0]"].verdict


def test_a_layer_inside_the_objective_passes_its_theta_on() -> None:
    inner = il.argmin(lambda y, t: (torch.exp(y) - t * y).sum(), lambda f, y, t: torch.log(t), **SETTINGS)
    layer = il.argmin(lambda x, t: squares(x - inner(torch.zeros((), dtype=F64), t)), stay, **SETTINGS)
    t = scalar()
    assert explained(layer, START, t, **{"theta[0]": t})["theta[0]"].outcome == "gradient"
