"""What the layer promises about orders, transforms, the graph and its surroundings. One test per situation."""

# Rows 20-28; rows 1-14 are in test_reliability.py, rows 15-19 in test_reliability_theta.py.

import copy
import gc
import math
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from log_layer import leaf, log_layer, log_objective, log_solver, zeros
from references import F64, newton, randn, relative_error
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import implicitlayer as il

# ------------------------------------------------------------------------------------------------ order and transforms


def test_row_20_second_order_is_right_also_with_a_constant_cotangent() -> None:
    t = leaf(3)
    (first,) = torch.autograd.grad(log_layer()(zeros(3), t).sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), t)
    assert relative_error(second, -1 / t.detach() ** 2) < 1e-9


def test_row_20_where_second_order_is_refused_it_is_an_error() -> None:
    with pytest.raises(il.UnsupportedTransformError, match="forward mode over forward mode"):
        jacfwd(jacfwd(lambda t: log_layer()(torch.zeros_like(t), t)))(leaf(2).detach())


def test_row_21_every_transform_is_right() -> None:
    t = leaf(3).detach()
    run = lambda t: log_layer()(torch.zeros_like(t), t)  # noqa: E731
    assert relative_error(jvp(run, (t,), (t,))[1], torch.ones(3, dtype=F64)) < 1e-9
    for jacobian in (jacrev(run)(t), jacfwd(run)(t)):
        assert relative_error(jacobian, torch.diag(1 / t)) < 1e-9
    assert relative_error(hessian(lambda t: run(t).sum())(t), torch.diag(-1 / t**2)) < 1e-8
    assert relative_error(vmap(run)(torch.stack([t, 2 * t])), torch.stack([t, 2 * t]).log()) < 1e-14
    leaf_t = t.clone().requires_grad_()
    (rows,) = torch.autograd.grad(run(leaf_t), leaf_t, torch.eye(3, dtype=F64), is_grads_batched=True)
    assert relative_error(rows, torch.diag(1 / t)) < 1e-9


def lanes_of_curvature(curvature: Tensor, on_failure: Any) -> tuple[Tensor, list[Any]]:
    """Gradients of x = t / c in t over lanes of curvature c."""

    def run(c: Tensor, t: Tensor) -> Tensor:
        layer = il.argmin(
            lambda x, c, t: (0.5 * c * x**2 - t * x).sum(),
            lambda f, x, c, t: t / torch.where(c == 0, 1.0, c),
            on_failure=on_failure,
            stationarity_rtol=None,
        )
        return layer(zeros(2), c, t).sum()

    with il.diagnostics() as records:
        gradient = vmap(grad(run, argnums=1))(curvature, torch.ones(len(curvature), 2, dtype=F64))
    return gradient, records


@pytest.mark.parametrize("bad", [-1.0, 0.0])
def test_row_22_a_lane_that_fails_leaves_the_others_untouched_and_the_record_names_it(bad: float) -> None:
    good = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    clean, _ = lanes_of_curvature(good, "raise")
    broken = good.clone()
    broken[2] = bad
    gradient, records = lanes_of_curvature(broken, "ignore")
    assert torch.equal(gradient[[0, 1, 3]], clean[[0, 1, 3]])
    solution = records[-1].solution
    assert solution.codes.shape == (4,) and [code == 0 for code in solution.codes.tolist()] == [True, True, False, True]
    assert "in lane 2 of (4,)" in solution.describe()
    with pytest.raises(il.LinearSolveError, match=r"in lane 2 of \(4,\)"):
        lanes_of_curvature(broken, "warn")


def test_row_22_a_lane_whose_solver_fails_is_named() -> None:
    def run(t: Tensor) -> Tensor:
        return il.argmin(log_objective, lambda f, x, t: t.log())(zeros(2), t)

    t = torch.ones(4, 2, dtype=F64)
    t[2, 0] = -1.0  # log(-1) is NaN
    with pytest.raises(il.NonFiniteError, match="lane 2"):
        vmap(run)(t)


def test_row_22_a_lane_with_a_nan_cotangent_is_named() -> None:
    weights = torch.ones(4, dtype=F64)
    weights[2] = math.nan
    run = lambda t, w: w * log_layer()(zeros(2), t).sum()  # noqa: E731
    with pytest.raises(il.NonFiniteError, match="lane 2"):
        vmap(grad(run))(torch.ones(4, 2, dtype=F64), weights)


def test_row_22_a_lane_that_is_not_stationary_is_named() -> None:
    t = torch.ones(4, 2, dtype=F64)
    offsets = torch.tensor([0.0, 0.0, 0.5, 0.0], dtype=F64)
    run = lambda t, o: il.argmin(  # noqa: E731
        lambda x, t, o: log_objective(x, t), lambda f, x, t, o: t.log() + o, on_failure="raise"
    )(zeros(2), t, o).sum()
    with pytest.raises(il.StationarityError, match=r"in lane 2 of \(4,\)"):
        vmap(grad(run))(t, offsets)


def test_row_23_complex_unknowns_are_an_error_that_shows_the_way() -> None:
    with pytest.raises(TypeError, match=r"x is complex \(torch.complex128\).*view_as_real"):
        log_layer()(torch.zeros(2, dtype=torch.complex128), leaf(2))
    with pytest.raises(il.SolverOutputError, match="complex x"):
        il.argmin(log_objective, lambda f, x, t: t.log() + 0j)(zeros(2), leaf(2))


@pytest.mark.parametrize("closed_over", [False, True])
def test_row_23_a_complex_theta_that_needs_a_gradient_is_an_error(closed_over: bool) -> None:
    z = torch.tensor([1.0 + 2.0j, 0.5 - 1.0j], dtype=torch.complex128, requires_grad=True)

    def objective(x: Tensor, w: Tensor) -> Tensor:
        return 0.5 * ((x - (w * w.conj()).real) ** 2).sum()

    layer = il.argmin((lambda x: objective(x, z)) if closed_over else objective, lambda f, x, *w: x)
    with pytest.raises(TypeError, match=r"complex theta of shape \(2,\) requires a gradient.*view_as_real"):
        layer(zeros(2), *([] if closed_over else [z]))
    constant = il.argmin(lambda x, w, t: 0.5 * ((x - (w * t).real) ** 2).sum(), lambda f, x, w, t: (w * t).real)
    t = leaf(2)
    (gradient,) = torch.autograd.grad(constant(zeros(2), z.detach(), t).sum(), t)
    assert torch.allclose(gradient, z.detach().real, rtol=1e-12)  # without a gradient of its own it is plain data


# --------------------------------------------------------------------------------------------------- graph and memory


def test_row_24_without_gradients_there_is_no_graph_and_no_product() -> None:
    t, counts = leaf(3), [0]

    def objective(x: Tensor, t: Tensor) -> Tensor:
        counts[0] += 1
        return log_objective(x, t)

    layer = il.argmin(objective, log_solver)
    with torch.no_grad():
        x = layer(zeros(3), t)
        assert counts == [1]  # to see what it keeps of theta, once for a layer
        layer(zeros(3), t)
    assert not x.requires_grad and x.grad_fn is None and counts == [1]
    x = layer(zeros(3), t.detach())
    assert not x.requires_grad and len(layer.records) == 1
    with torch.inference_mode():
        assert torch.equal(layer(zeros(3), t), t.log())


def test_row_25_repeats_and_a_second_backward_are_bitwise_equal() -> None:
    weight, offset, strength = randn(6, 4, seed=1), leaf(6, seed=2), torch.tensor(0.2, dtype=F64)

    def objective(x: Tensor, offset: Tensor) -> Tensor:
        return torch.nn.functional.softplus(weight @ x + offset).sum() + strength * (x**2).sum()

    results = []
    for _ in range(3):
        x = il.argmin(objective, newton)(zeros(4), offset)
        (x**2).sum().backward(retain_graph=True)
        assert offset.grad is not None
        first, offset.grad = offset.grad, None
        (x**2).sum().backward()
        results += [first, offset.grad]
        offset.grad = None
    assert all(torch.equal(r, results[0]) for r in results)


def test_row_26_nothing_survives_del_and_collect() -> None:
    class Data(torch.Tensor):
        pass

    def build() -> tuple[list[Any], Tensor, Any]:
        closed, t = leaf(3, seed=1), leaf(3, seed=2)
        layer = il.argmin(lambda x, t: (x.exp() - closed * t * x).sum(), lambda f, x, t: (t * closed.detach()).log())
        x = layer(zeros(3), t)
        (g,) = torch.autograd.grad(x.sum(), t, create_graph=True)
        (g.sum() + x.sum()).backward()
        watched = [weakref.ref(o) for o in (closed, t, x, g, layer)]
        return watched, x, layer

    for _ in range(2):
        watched, x, layer = build()
        del x, layer
        gc.collect()
        assert [reference() is None for reference in watched] == [True] * 5


def test_row_26_the_layer_keeps_no_data_of_its_last_call() -> None:
    layer = log_layer()
    t = leaf(3)
    x = layer(zeros(3), t)
    x.sum().backward()
    watched = [weakref.ref(t), weakref.ref(x)]
    del t, x
    gc.collect()
    assert all(reference() is None for reference in watched)


def test_row_26_outputs_are_saved_through_save_for_backward() -> None:
    """In-place changes of what backward needs are noticed, the output's included."""
    t = leaf(3)
    for change in ("output", "theta"):
        s = t.detach().clone().requires_grad_()
        scaled = s * 1
        x = log_layer()(zeros(3), scaled)
        with torch.no_grad():
            (x if change == "output" else scaled).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            x.sum().backward()


def test_row_26_memory_does_not_grow_with_the_solvers_steps() -> None:
    """What the solver records is cut off: its graph dies with the call."""

    class Mark:
        pass

    marks: list[weakref.ref[Mark]] = []

    def solver(f: Any, x: Tensor, t: Tensor) -> Tensor:
        middle = t.requires_grad_().clone()
        mark = Mark()
        middle.grad_fn.metadata["mark"] = mark  # lives as long as the node of the graph
        marks.append(weakref.ref(mark))
        return middle.log()

    x = il.argmin(log_objective, solver)(zeros(3), leaf(3))
    gc.collect()
    assert x.requires_grad and marks[0]() is None


def test_row_27_closed_over_tensors_and_weights_get_their_gradient() -> None:
    t, net = leaf(3), torch.nn.Linear(3, 1).double()

    def objective(x: Tensor) -> Tensor:
        return 0.5 * ((x - t**2) ** 2).sum() + torch.nn.functional.softplus(net(x)).sum()

    il.argmin(objective, newton)(zeros(3)).sum().backward()
    gradients = [t.grad, net.weight.grad, net.bias.grad]
    assert all(g is not None and float(g.norm()) > 0 for g in gradients)
    at = newton(objective, zeros(3)).detach()
    w, p = net.weight.detach()[0], torch.sigmoid(net(at)).detach()
    u = torch.linalg.solve(torch.eye(3, dtype=F64) + p * (1 - p) * torch.outer(w, w), torch.ones(3, dtype=F64))
    expected = [2 * t.detach() * u, -(p * u + p * (1 - p) * (w @ u) * at)[None], -(p * (1 - p) * (w @ u))]
    for g, e in zip(gradients, expected, strict=True):
        assert g is not None and relative_error(g, e) < 1e-9


# -------------------------------------------------------------------------------------------------------- surroundings


def expected_and(function: Any) -> tuple[Tensor, Tensor]:
    t = leaf(3)
    (expected,) = torch.autograd.grad((t.log() ** 2).sum(), t)
    (got,) = torch.autograd.grad((function(t) ** 2).sum(), t)
    return got, expected


def run(t: Tensor) -> Tensor:
    return log_layer()(torch.zeros_like(t), t)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_row_28_checkpoint_gives_the_same_gradient(use_reentrant: bool) -> None:
    def function(t: Tensor) -> Tensor:
        return checkpoint(lambda t: run(t * 1), t, use_reentrant=use_reentrant)

    t = leaf(3)
    (function(t) ** 2).sum().backward()
    expected = 2 * t.detach().log() / t.detach()
    assert t.grad is not None and relative_error(t.grad, expected) < 1e-9


def test_row_28_saved_tensor_hooks_around_the_layer_are_right_or_refused() -> None:
    packed = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        got, expected = expected_and(run)
    assert relative_error(got, expected) < 1e-9 and packed
    with torch.autograd.graph.save_on_cpu():
        got, expected = expected_and(run)
    assert relative_error(got, expected) < 1e-9


def test_row_28_threads_get_the_gradients_of_one_thread() -> None:
    layer, barrier = log_layer(), threading.Barrier(4)

    def work(seed: int) -> float:
        barrier.wait()
        worst = 0.0
        for i in range(10):
            t = leaf(3, seed=seed + i)
            (gradient,) = torch.autograd.grad(layer(zeros(3), t).sum(), t)
            worst = max(worst, relative_error(gradient, 1 / t.detach()))
        return worst

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(0, 400, 100))) < 1e-9


def test_row_28_autocast_around_the_layer_does_not_change_its_precision() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = expected_and(run)
    assert relative_error(got, expected) < 1e-9


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_row_28_a_copied_or_pickled_layer_gives_the_same_gradient(duplicate: Any) -> None:
    layer = log_layer(linear_solver=il.ConjugateGradient(rtol=1e-12))
    layer(zeros(3), leaf(3))
    got, expected = expected_and(lambda t: duplicate(layer)(torch.zeros_like(t), t))
    assert relative_error(got, expected) < 1e-9


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo looks at it
def test_row_28_a_compiled_model_that_holds_the_layer_is_equal() -> None:
    weight = leaf(3, seed=5)
    layer = log_layer()

    def model(t: Tensor) -> Tensor:
        return (layer(torch.zeros_like(t), t * weight) * 2).sum()

    compiled = torch.compile(model, backend="eager")
    t = leaf(3)
    got, expected = torch.autograd.grad(compiled(t), (t, weight)), torch.autograd.grad(model(t), (t, weight))
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)
