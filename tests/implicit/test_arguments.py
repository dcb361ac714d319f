"""Misuse of the layer is an error with the argument, its value, the rule and the remedy; and the layer's records."""

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from references import F64, randn
from torch import Tensor

import implicitlayer as il


def objective(x: Tensor, t: Tensor) -> Tensor:
    return (x.exp() - t * x).sum()


def solver(f: Any, x: Tensor, t: Tensor) -> Tensor:
    return t.log()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"on_failure": "panic"}, ValueError, r"on_failure='panic' must be one of \('raise', .*'mask'\)"),
        ({"stationarity_rtol": -1.0}, ValueError, r"stationarity_rtol=-1.0 must be non-negative, or None to switch"),
        ({"stationarity_rtol": float("nan")}, ValueError, "stationarity_rtol=nan must be non-negative"),
        ({"polish": -1}, ValueError, "polish=-1 must be non-negative"),
        ({"batch_dims": -1}, ValueError, "batch_dims=-1 must be non-negative"),
        ({"linear_solver": "cg"}, TypeError, "linear_solver must be callable, got str"),
    ],
)
def test_bad_settings_are_refused_by_name_value_and_rule(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        il.argmin(objective, solver, **settings)


def test_objective_and_solver_must_be_callable() -> None:
    with pytest.raises(TypeError, match=r"callable, got Tensor"):
        il.argmin(torch.zeros(2), solver)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="solver must be callable, got str"):
        il.argmin(objective, "BFGS")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("init", "error", "message"),
    [
        ([], ValueError, "init has no leaves"),
        ({"a": 1.0}, TypeError, r"init leaf x\['a'\] is float; the unknowns must be tensors. Use torch.as_tensor"),
        (torch.zeros(2, dtype=torch.int64), TypeError, r"init leaf x has dtype torch.int64.*floating. Use .double\(\)"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, r"init leaf x is complex"),
    ],
)
def test_an_init_that_is_no_unknown_is_refused(init: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        il.argmin(objective, solver)(init, torch.ones(2, dtype=F64))


def test_a_linear_solver_that_returns_something_else_is_refused() -> None:
    t = torch.ones(2, dtype=F64, requires_grad=True)
    x = il.argmin(objective, solver, linear_solver=lambda operator, rhs: (rhs, 3))(torch.zeros(2, dtype=F64), t)
    with pytest.raises(TypeError, match=r"must return il.LinearSolution or a tensor of the shape of rhs \(2,\), got"):
        torch.autograd.grad(x.sum(), t)


def test_a_linear_solver_of_the_users_own_is_checked_by_its_residual() -> None:
    t = torch.tensor([0.5, 4.0], dtype=F64, requires_grad=True)

    def run(linear_solver: Any) -> Tensor:
        return il.argmin(objective, solver, linear_solver=linear_solver)(torch.zeros(2, dtype=F64), t)

    def dense(operator: Any, rhs: Tensor) -> Tensor:  # knows that the matrix is diagonal
        return rhs / operator(torch.ones_like(rhs))

    (gradient,) = torch.autograd.grad(run(dense).sum(), t)
    assert torch.allclose(gradient, 1 / t.detach(), rtol=1e-14)
    with pytest.warns(il.ConvergenceWarning, match="stopped falling"):
        torch.autograd.grad(run(lambda a, b: 0.9 * dense(a, b)).sum(), t)
    with pytest.raises(il.NotConvergedError):
        torch.autograd.grad(run(lambda a, b: -dense(a, b)).sum(), t)
    with pytest.raises(il.NonFiniteError):
        torch.autograd.grad(run(lambda a, b: b * float("nan")).sum(), t)


# ------------------------------------------------------------------------------------------------------------ records


def test_diagnostics_hold_one_record_per_forward_and_per_linear_solve() -> None:
    t = torch.tensor([0.5, 4.0], dtype=F64, requires_grad=True)
    # Wolfe's conditions compare values, so they see gradients down to about sqrt(eps) = 1.5e-8: 1e-6 is within reach
    layer = il.argmin(objective, il.solvers.SciPyMinimize("BFGS", options={"gtol": 1e-6}))
    with il.diagnostics() as records:
        x = layer(torch.zeros(2, dtype=F64), t)
        (g,) = torch.autograd.grad(x.sum(), t, create_graph=True)
        torch.autograd.grad(g.sum(), t)
    forward, first, *higher = records
    assert isinstance(forward, il.ForwardRecord) and isinstance(first, il.BackwardRecord)
    assert forward.solver_status is il.Status.CONVERGED and forward.num_steps is not None and forward.num_steps > 0
    # gtol bounds the larger of the two entries
    assert forward.stationarity_norm is not None and float(forward.stationarity_norm) <= 2e-6
    assert first.kind == "backward" and first.solution.num_steps == 2  # two distinct eigenvalues, 0.5 and 4
    assert 0.5 <= float(first.solution.smallest_curvature) <= 4
    # the second derivative solves once for the change of the matrix and once for that of the solution
    assert sorted(r.kind for r in higher if isinstance(r, il.BackwardRecord)) == ["backward", "higher-order backward"]
    assert layer.records == records and layer.last_record is records[-1]
    assert "forward: gradient norm" in str(forward) and "backward: Conjugate gradient converged, 2 steps" in str(first)


def test_diagnostics_stop_at_the_end_of_the_block_and_nest() -> None:
    layer, t = il.argmin(objective, solver), torch.ones(2, dtype=F64)
    with il.diagnostics() as outer:
        with il.diagnostics() as inner:
            layer(torch.zeros(2, dtype=F64), t)
        layer(torch.zeros(2, dtype=F64), t)
    layer(torch.zeros(2, dtype=F64), t)
    assert len(inner) == 1 and len(outer) == 2


def test_diagnostics_hear_of_other_threads_and_survive_an_error() -> None:
    t = torch.ones(2, dtype=F64)
    with il.diagnostics() as records:
        thread = threading.Thread(target=lambda: il.argmin(objective, solver)(torch.zeros(2, dtype=F64), t))
        thread.start()
        thread.join()
    assert len(records) == 1
    with pytest.raises(KeyError), il.diagnostics() as cut:
        raise KeyError
    il.argmin(objective, solver)(torch.zeros(2, dtype=F64), t)
    assert cut == []


def test_records_of_a_batch_have_lanes() -> None:
    t = randn(3, 2, seed=1).abs() + 0.5
    with il.diagnostics() as records:
        torch.func.vmap(torch.func.grad(lambda t: il.argmin(objective, solver)(torch.zeros(2, dtype=F64), t).sum()))(t)
    forward, backward = records
    assert isinstance(forward, il.ForwardRecord) and isinstance(backward, il.BackwardRecord)
    assert forward.stationarity_norm is not None and forward.stationarity_norm.shape == (3,)
    assert backward.solution.codes.shape == backward.solution.steps.shape == (3,) and backward.solution.value is None
    assert "over (3,) lanes" in str(backward)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5, dtype=F64))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.cos(self.scale * z) + u


def near(x: Tensor, t: Tensor) -> Tensor:
    return ((x - t) ** 2).sum()


TIGHT = il.solvers.LBFGS(rtol=1e-12)
WARM: dict[str, Callable[[], Callable[..., Any]]] = {
    "argmin": lambda: il.argmin(objective, TIGHT),
    "mask": lambda: il.argmin(objective, TIGHT, on_failure="mask"),
    "compiled": lambda: il.compile(il.argmin(objective, TIGHT), backend="eager"),
    "root": lambda: il.root(lambda x, t: x**3 + x - t, il.solvers.Newton()),
    "fixed_point": lambda: il.fixed_point(lambda x, t: torch.cos(x) + t, il.solvers.AndersonAcceleration(rtol=1e-12)),
    "a set": lambda: il.argmin(near, il.solvers.ProjectedGradient(rtol=1e-12), constraint=il.sets.Box(0.0, 5.0)),
    "constraints": lambda: il.constrained_argmin(near, il.solvers.SQP(), equality=lambda x, t: x[:1] - t[1:]),
    "value": lambda: il.value(il.argmin(objective, TIGHT)),
    "DeepEquilibrium": lambda: lambda z, t: il.DeepEquilibrium(Block())(t[None], init=z.reshape(1, 2))[0],
}


@pytest.mark.parametrize("name", WARM)
def test_an_answer_may_be_the_next_init_and_no_backward_enters_its_graph(name: str) -> None:
    """A warm start over an outer loop: init gets no gradient, so a graph that is used up does not matter, nor lives."""
    layer, x, gradients = WARM[name](), torch.ones(2, dtype=F64), []
    for _ in range(4):
        t = torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True)
        answer = layer(x, t)
        gradients.append(torch.autograd.grad(answer.square().sum(), t)[0])  # frees the graph of this answer
        x = answer if name != "value" else x * answer / answer
    for gradient in gradients[1:]:
        assert torch.allclose(gradient, gradients[0], rtol=1e-3 if name == "DeepEquilibrium" else 1e-8)  # its rtol
    last = weakref.ref(t)
    del t, answer
    x = layer(x, torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True))
    gc.collect()
    assert last() is None


@pytest.mark.parametrize("make", [il.argmin, il.root, il.fixed_point])
def test_a_class_of_ones_own_inside_init_is_told_what_may_hold_unknowns(make: Any) -> None:
    @dataclass
    class Pair:
        a: Tensor
        b: Tensor

    with pytest.raises(TypeError, match=r"init leaf x is Pair; .* Pass a dict, list, tuple or namedtuple of tensors"):
        make(lambda x, t: x.a - t, lambda f, x, t: x)(
            Pair(torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64)), torch.ones(3, dtype=F64, requires_grad=True)
        )
    for number in (1.0, np.zeros(3)):
        with pytest.raises(TypeError, match=r"init leaf x is \w+; the unknowns must be tensors. Use torch.as_tensor."):
            make(lambda x, t: x - t, lambda f, x, t: x)(number, torch.ones(3, dtype=F64, requires_grad=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", [iter, lambda weights: (w for w in weights), lambda weights: map(abs, weights)])
@pytest.mark.parametrize("within", [lambda weights: weights, lambda weights: {"weights": weights}])
def test_what_can_be_read_only_once_is_refused_as_a_theta(make: Any, within: Any, frozen: bool) -> None:
    """The first evaluation would use it up, and the solution be that of a sum over nothing, without a word."""
    weights = [torch.ones(3, dtype=F64, requires_grad=not frozen) for _ in range(2)]

    def total(x: Tensor, t: Any) -> Tensor:
        given = t["weights"] if isinstance(t, dict) else t
        return ((x - sum(2 * w for w in given)) ** 2).sum()

    layer = il.argmin(total, TIGHT)
    with pytest.raises(TypeError, match=r"theta holds a \w+, which can be read only once, .* Pass list\(\.\.\.\)"):
        layer(torch.zeros(3, dtype=F64), within(make(weights)))
    assert torch.allclose(layer(torch.zeros(3, dtype=F64), within(list(make(weights)))), 4 * weights[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda meta: il.argmin(objective, il.solvers.LBFGS())(meta, torch.ones(3, dtype=F64)),
        lambda meta: il.argmin(objective, il.solvers.LBFGS())(torch.zeros(3, dtype=F64), meta),
        lambda meta: il.root(lambda x, t: x - t, il.solvers.Newton())(meta, meta),
        lambda meta: il.linear_solve(torch.diag(meta), meta),
        lambda meta: il.hvp(lambda x: (x**2).sum(), meta, meta),
        lambda meta: il.qp(torch.diag(meta), meta),
    ],
    ids=["init", "theta", "root", "linear_solve", "hvp", "qp"],
)
def test_tensors_without_numbers_are_told_by_their_device(call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match="on the device 'meta' has a shape but no numbers"):
        call(torch.empty(3, dtype=F64, device="meta"))
