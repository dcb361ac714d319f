"""Compiled layers: the numbers, errors and transforms of the layer that they compile."""

import copy
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from references import F64, randn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import implicitlayer as il

SOLVERS: dict[str, Any] = {
    "GradientDescent, fixed steps": il.solvers.GradientDescent(0.05, 60),
    "GradientDescent, to a tolerance": il.solvers.GradientDescent(0.05, 3000, rtol=1e-9),
    "GradientDescent, searched": il.solvers.GradientDescent(0.05, 3000, rtol=1e-9, line_search="armijo"),
    "NewtonCG": il.solvers.NewtonCG(rtol=1e-11),
    "NewtonCG, five products": il.solvers.NewtonCG(rtol=1e-11, cg_steps=5),
    "LBFGS": il.solvers.LBFGS(rtol=1e-10),
    "LBFGS, few pairs": il.solvers.LBFGS(rtol=1e-10, memory=4),
}


def objective(x: Tensor, t: Tensor, a: Tensor) -> Tensor:
    """Smooth, convex, not quadratic; one value per lane of x [*lanes, n] and t [*lanes]."""
    ax = x @ a.mT
    return (ax.exp() - ax + 0.5 * x**2 + t[..., None] * x).sum(-1)


def data(lanes: tuple[int, ...] = (), dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    t = 0.3 * randn(*lanes, seed=1).to(dtype)
    return torch.zeros(*lanes, 4, dtype=dtype), t.requires_grad_(), (0.5 * randn(4, 4, seed=2)).to(dtype)


def answers(layer: Callable[..., Tensor], init: Tensor, t: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    x = layer(init, t, a)
    (gradient,) = torch.autograd.grad((x * torch.arange(1.0, 5.0, dtype=x.dtype)).sum(), t)
    return x.detach(), gradient


def traced(layer: Any) -> Any:
    """Compiled as far as the tracing: what the solvers and checks compute is decided by then."""
    return il.compile(layer, backend="eager")


@pytest.mark.parametrize(("name", "lanes"), [*((name, (3,)) for name in SOLVERS), ("NewtonCG", ())])
def test_the_traced_layer_is_the_layer(name: str, lanes: tuple[int, ...]) -> None:
    fixed = "fixed" in name
    layer = il.argmin(objective, SOLVERS[name], batch_dims=len(lanes), stationarity_rtol=None if fixed else 1e-3)
    compiled = traced(layer)
    args = data(lanes)
    expected = answers(layer, *args)
    answers(compiled, *args)  # the first call is the layer's own
    found = answers(compiled, *args)
    assert compiled.num_compilations == 2
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-12)


def test_where_the_hessian_is_indefinite_the_traced_steps_are_those_of_the_layer() -> None:
    """A lane that starts between two wells, one beside them, one at its minimum, x = 1, one that is stuck: x = 0."""
    layer = il.argmin(lambda x: ((x**2 - 1) ** 2).sum(-1), il.solvers.NewtonCG(rtol=1e-12, atol=1e-12), batch_dims=1)
    init = torch.tensor([[0.1, -0.2], [3.0, 0.3], [1.0, 1.0], [0.0, 0.0]], dtype=F64)
    compiled = traced(layer)
    for _ in range(2):
        torch.testing.assert_close(compiled(init), layer(init), rtol=1e-13, atol=0)
    torch.testing.assert_close(compiled(init)[:3].abs(), torch.ones(3, 2, dtype=F64), rtol=1e-11, atol=0)


def test_no_steps_are_no_steps() -> None:
    layer = traced(il.argmin(lambda x, t: ((x - t) ** 2).sum(), il.solvers.GradientDescent(0.1, 0)))
    init, t = torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)
    for _ in range(2):
        assert torch.equal(layer(init, t), init)


@pytest.mark.parametrize(
    ("linear_solver", "damping"),
    [(il.ConjugateGradient(max_steps=2), 0.5), (il.ConjugateGradient(max_steps=0), 0.0), (il.Dense(), 0.5)],
    ids=repr,
)
def test_linear_solvers_and_damping_are_those_of_the_layer(linear_solver: Any, damping: float) -> None:
    layer = il.argmin(objective, SOLVERS["NewtonCG"], linear_solver=linear_solver, damping=damping, batch_dims=1)
    args = data((3,))
    compiled = traced(layer)
    answers(compiled, *args)
    torch.testing.assert_close(answers(compiled, *args)[1], answers(layer, *args)[1], rtol=1e-11, atol=1e-12)


def test_a_diagonal_metric_preconditions_as_in_the_layer() -> None:
    strengths = torch.tensor([0.5, 1.0, 4.0, 30.0], dtype=F64)
    proximal = il.proximal(lambda x, t: ((x - t) ** 4).sum(), strengths)
    layer = il.argmin(proximal, SOLVERS["LBFGS"], linear_solver=il.ConjugateGradient(max_steps=1))
    center, t = torch.zeros(4, dtype=F64).requires_grad_(), torch.tensor(1.5, dtype=F64)
    compiled = traced(layer)
    gradients = []
    for one in (layer, compiled, compiled):
        x = one(torch.zeros(4, dtype=F64), center, t)
        gradients.append(torch.autograd.grad(x.sum(), center)[0])
    assert compiled.num_compilations == 2
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-10, atol=0)


def test_float32_and_pytrees() -> None:
    def tree_objective(x: dict[str, Tensor], t: tuple[Tensor, float]) -> Tensor:
        return ((x["a"] - t[0]) ** 2).sum() + t[1] * (x["b"] - x["a"].sum()) ** 2

    layer = il.argmin(tree_objective, il.solvers.LBFGS(rtol=1e-6))
    compiled = traced(layer)
    init = {"a": torch.zeros(3), "b": torch.zeros(())}
    t = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    for _ in range(2):
        x = compiled(init, (t, 2.0))
    assert x.keys() == {"a", "b"} and x["a"].dtype is torch.float32
    x["b"].backward()  # b = sum(a) = sum(t)
    torch.testing.assert_close(x["b"].detach(), torch.tensor(6.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(t.grad, torch.ones(3), rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def log_layers() -> tuple[Any, Any]:
    """x = log t by Newton's method, and its compiled form, which has compiled."""
    layer = il.argmin(lambda x, t: (x.exp() - t * x).sum(), il.solvers.NewtonCG(rtol=1e-13))
    compiled = traced(layer)
    t = torch.tensor([2.0, 4.0], dtype=F64, requires_grad=True)
    for _ in range(2):
        compiled(torch.zeros(2, dtype=F64), t).sum().backward()
    return layer, compiled


def test_transforms_and_second_derivatives_are_right(log_layers: tuple[Any, Any]) -> None:
    """x = log t: dx/dt = 1/t, d2x/dt2 = -1/t^2."""
    _, compiled = log_layers
    zeros, t = torch.zeros(2, dtype=F64), torch.tensor([2.0, 4.0], dtype=F64)
    solve = partial(compiled, zeros)
    assert torch.autograd.gradgradcheck(solve, (t.clone().requires_grad_(),))
    torch.testing.assert_close(torch.func.jacrev(solve)(t), torch.diag(1 / t))
    torch.testing.assert_close(torch.func.jacfwd(solve)(t), torch.diag(1 / t))
    hessian = torch.func.hessian(lambda s: solve(s).sum())(t)
    torch.testing.assert_close(hessian, torch.diag(-1 / t**2))
    lanes = torch.tensor([[2.0, 4.0], [3.0, 5.0]], dtype=F64)
    torch.testing.assert_close(torch.vmap(solve)(lanes), lanes.log())
    leaf = t.clone().requires_grad_()
    x = solve(leaf)
    rows = torch.autograd.grad(x, leaf, torch.eye(2, dtype=F64), is_grads_batched=True)[0]
    torch.testing.assert_close(rows, torch.diag(1 / t))


def test_what_the_layer_tells_the_compiled_one_tells(log_layers: tuple[Any, Any]) -> None:
    layer, compiled = log_layers
    zeros = torch.zeros(2, dtype=F64)
    bad = torch.tensor([2.0, torch.nan], dtype=F64, requires_grad=True)  # the same signature as before
    for one in (layer, compiled):
        with pytest.raises(il.NonFiniteError, match="met NaN or Inf"):
            one(zeros, bad)
    x = compiled(zeros, torch.tensor([2.0, 4.0], dtype=F64, requires_grad=True))
    with pytest.raises(il.NonFiniteError, match="cotangent"):
        x.backward(torch.tensor([1.0, torch.nan], dtype=F64))
    with il.diagnostics() as records:
        compiled(zeros, torch.tensor([2.0, 4.0], dtype=F64, requires_grad=True)).sum().backward()
    assert [type(record) for record in records] == [il.ForwardRecord, il.BackwardRecord]


def test_an_answer_that_is_not_stationary_is_told_of() -> None:
    layer = il.argmin(lambda x, t: (x.exp() - t * x).sum(), il.solvers.GradientDescent(0.1, 3))
    compiled = traced(layer)
    t = torch.tensor([2.0], dtype=F64, requires_grad=True)
    for _ in range(3):
        with pytest.warns(il.StationarityWarning, match="not stationary"):
            compiled(torch.zeros(1, dtype=F64), t)


def test_negative_curvature_is_told_of() -> None:
    """A saddle of t (y^2 - x^2) is where the solver stays if it starts there."""
    layer = il.argmin(lambda x, t: t * (x[0] ** 2 - x[1] ** 2), il.solvers.GradientDescent(0.1, 5))
    compiled = traced(layer)
    t = torch.tensor(1.0, dtype=F64, requires_grad=True)
    for _ in range(2):
        x = compiled(torch.zeros(2, dtype=F64), t)
        with pytest.raises(il.IndefiniteError):
            x[1].backward()


def test_a_number_that_changes_is_followed() -> None:
    settings = {"shift": 1.0}
    layer = il.argmin(lambda x, t: ((x - t - settings["shift"]) ** 2).sum(), il.solvers.NewtonCG(rtol=1e-12))
    compiled = traced(layer)
    t = torch.zeros(2, dtype=F64, requires_grad=True)
    for _ in range(2):
        compiled(torch.zeros(2, dtype=F64), t)
    settings["shift"] = 3.0
    torch.testing.assert_close(compiled(torch.zeros(2, dtype=F64), t).detach(), torch.full((2,), 3.0, dtype=F64))


def test_nothing_is_compiled_anew_for_the_same_shapes(log_layers: tuple[Any, Any]) -> None:
    _, compiled = log_layers
    before = compiled.num_compilations
    for step in range(100):
        t = torch.tensor([2.0 + step, 4.0], dtype=F64, requires_grad=True)
        x = compiled(torch.zeros(2, dtype=F64), t)
        x.sum().backward()
        torch.testing.assert_close(t.grad, 1 / t.detach())
    assert compiled.num_compilations == before == 2


def test_one_tensor_may_be_several_arguments() -> None:
    """x = (t + s) / 2: with both the same tensor, x = t and dx/dt = 1."""
    layer = il.argmin(lambda x, t, s: ((x - t) ** 2 + (x - s) ** 2).sum(), il.solvers.NewtonCG(rtol=1e-12))
    compiled = traced(layer)
    t = torch.tensor([2.0, 4.0], dtype=F64, requires_grad=True)
    for _ in range(2):
        x = compiled(t, t, t)
        (gradient,) = torch.autograd.grad(x.sum(), t)
    assert compiled.num_compilations == 2
    torch.testing.assert_close(x.detach(), t.detach())
    torch.testing.assert_close(gradient, torch.ones(2, dtype=F64))


def test_autocast_changes_nothing(log_layers: tuple[Any, Any]) -> None:
    _, compiled = log_layers
    t = torch.tensor([2.0, 4.0], dtype=F64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = compiled(torch.zeros(2, dtype=F64), t)
    torch.testing.assert_close(x.detach(), t.detach().log())


def test_a_number_that_is_another_each_time_is_told_of() -> None:
    compiled = traced(il.argmin(lambda x, t, s: ((x - s * t) ** 2).sum(), il.solvers.NewtonCG(rtol=1e-12)))
    t = torch.ones(2, dtype=F64, requires_grad=True)
    for step in range(32):
        compiled(torch.zeros(2, dtype=F64), t, 1.0 + step)
    with pytest.warns(il.ImplicitLayerWarning, match="passed as tensors"):
        compiled(torch.zeros(2, dtype=F64), t, 0.5)


def test_random_objectives_and_branches_on_values_are_named() -> None:
    t = torch.ones(2, dtype=F64, requires_grad=True)
    drawing = lambda x, t: ((x - t) ** 2).sum() * (1 + 0 * torch.rand(()))  # noqa: E731
    random = traced(il.argmin(drawing, il.solvers.NewtonCG(), on_failure="ignore"))
    with pytest.raises(il.ObjectiveError, match="random numbers"):
        random(torch.zeros(2, dtype=F64), t)

    def branching(x: Tensor, t: Tensor) -> Tensor:
        return ((x - t) ** 2).sum() * (2.0 if bool(t.sum() > 0) else 1.0)

    compiled = traced(il.argmin(branching, il.solvers.NewtonCG(rtol=1e-12)))
    compiled(torch.zeros(2, dtype=F64), t)
    with pytest.raises(il.ObjectiveError, match="cannot follow the objective"):
        compiled(torch.zeros(2, dtype=F64), t)


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_an_array_of_numpy_in_the_objective_is_named() -> None:
    array, t = np.array([1.0, 2.0]), torch.ones(2, dtype=F64, requires_grad=True)
    compiled = traced(
        il.argmin(lambda x, t: ((x - t * torch.as_tensor(array)) ** 2).sum(), il.solvers.NewtonCG(rtol=1e-12))
    )
    compiled(torch.zeros(2, dtype=F64), t)
    with pytest.raises(il.ObjectiveError, match=r"cannot follow the objective.*NumPy"):
        compiled(torch.zeros(2, dtype=F64), t)


def test_threads_that_compile_at_once_get_their_own_gradients() -> None:
    compiled = traced(il.argmin(lambda x, t: (x.exp() - t * x).sum(), il.solvers.NewtonCG(rtol=1e-12)))
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        for _ in range(2):
            t = torch.full((2,), 1.0 + number, dtype=F64, requires_grad=True)
            (found[number],) = torch.autograd.grad(compiled(torch.zeros(2, dtype=F64), t).sum(), t)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):  # x = log t
        torch.testing.assert_close(found[number], torch.full((2,), 1 / (1.0 + number), dtype=F64))


def test_under_checkpointing_a_layer_compiles() -> None:
    compiled = traced(il.argmin(lambda x, t: (x.exp() - t * x).sum(), il.solvers.NewtonCG(rtol=1e-12)))
    for _ in range(2):
        t = torch.tensor([2.0, 4.0], dtype=F64, requires_grad=True)
        x = checkpoint(lambda t: compiled(torch.zeros(2, dtype=F64), t), t, use_reentrant=False)
        x.sum().backward()
        torch.testing.assert_close(t.grad, 1 / t.detach())  # x = log t


def quadratic(x: Tensor, t: Tensor) -> Tensor:
    return ((x - t) ** 2).sum()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: il.argmin(quadratic, lambda f, x, t: t), TypeError, "solver=.*no compiled form"),
        (lambda: il.root(quadratic, lambda f, x, t: t), TypeError, "il.argmin"),
        (lambda: il.argmin(quadratic, il.solvers.NewtonCG(), linear_solver=il.Minres()), TypeError, "linear_solver="),
        (lambda: il.argmin(quadratic, il.solvers.NewtonCG(), polish=1), ValueError, "polish"),
        (lambda: il.argmin(quadratic, il.solvers.NewtonCG(), regularizer=il.L1(1.0)), TypeError, "ProximalGradient"),
        (lambda: il.argmin(quadratic, il.solvers.NewtonCG(callback=print)), ValueError, "callback"),
    ],
)
def test_what_has_no_compiled_form_is_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        il.compile(make())


def test_copies_compile_for_themselves(log_layers: tuple[Any, Any]) -> None:
    _, compiled = log_layers
    made = copy.deepcopy(compiled)
    assert made.num_compilations == 0 and made.number != compiled.number
    layer = traced(il.argmin(quadratic, il.solvers.NewtonCG(rtol=1e-12)))
    loaded = pickle.loads(pickle.dumps(layer))
    t = torch.ones(2, dtype=F64, requires_grad=True)
    torch.testing.assert_close(loaded(torch.zeros(2, dtype=F64), t).detach(), t.detach())


@pytest.mark.parametrize("calls_before", [0, 2])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inside_a_compiled_model_a_layer_trains_as_it_does_outside(backend: str, calls_before: int) -> None:
    """No graph break, and ten steps of a model with the layer inside are those of the layer that is not compiled.

    Also where the layer has been called by itself before, and what is compiled for it is there.
    """

    class Model(torch.nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer = layer
            self.linear = torch.nn.Linear(3, 2, dtype=F64)
            torch.nn.init.constant_(self.linear.weight, 0.2)
            torch.nn.init.constant_(self.linear.bias, 0.1)

        def forward(self, inputs: Tensor) -> Tensor:
            t = self.linear(inputs).exp()
            return self.layer(torch.zeros(2, dtype=F64), t).sin()

    layer = il.argmin(lambda x, t: (x.exp() - t * x).sum(), il.solvers.NewtonCG(rtol=1e-13))
    losses = []
    for inside in (layer, traced(layer)):
        model = Model(inside)
        run = model if inside is layer else torch.compile(model, backend=backend, fullgraph=True)
        for seed in range(calls_before):
            model(randn(3, seed=seed)).sum().backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        history = []
        for step in range(10):
            loss = ((run(randn(3, seed=step)) - 0.5) ** 2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert inside.num_compilations == 2  # one solve, one derivative
    assert losses[0][0] > 2 * losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_without_a_compiler_the_layer_is_called_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    layer = il.compile(il.argmin(quadratic, il.solvers.NewtonCG(rtol=1e-12)))
    t = torch.ones(2, dtype=F64, requires_grad=True)
    layer(torch.zeros(2, dtype=F64), t)
    with pytest.warns(RuntimeWarning, match="needs a C.. compiler"):
        x = layer(torch.zeros(2, dtype=F64), t)
    (gradient,) = torch.autograd.grad(x.sum(), t)
    torch.testing.assert_close(gradient, torch.ones(2, dtype=F64))
    layer(torch.zeros(2, dtype=F64), t)  # said once
    assert layer.num_compilations == 0
