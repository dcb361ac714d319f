"""Recorded inner steps and products: the same numbers as one by one, whatever the order of the calls.

A CUDA graph replays what was recorded from fixed buffers. Here, without a device, the recorder hands the functions
themselves back, which work on the same buffers: all is tested but the recording itself. Tests marked ``gpu`` do that.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import implicitlayer as il
from implicitlayer.meta import _recording
from implicitlayer.meta._settings import differences, plain

# B: tasks, K: points of a task, F: features

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
runs: list[int] = []  # how many functions each recording was made of


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a recording is a function that is run again."""
    original = _recording.recorder

    def again(bodies: Sequence[Callable[[], None]]) -> list[Callable[[], object]]:
        runs.append(len(bodies))
        for body in bodies:
            body()
        return list(bodies)

    runs.clear()
    monkeypatch.setattr(_recording, "recorder", lambda device: again if device.type == "cpu" else original(device))


def task_loss(params: Any, batch: Any) -> torch.Tensor:
    x, y = batch
    return ((params["w"].unsqueeze(1) * x).sum(-1).tanh() + params["b"].unsqueeze(1) - y).square().mean(1)


def problem(
    num_tasks: int = 3, *, device: str = "cpu", seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    theta = {"w": draw(4).requires_grad_(), "b": draw().requires_grad_()}
    return theta, (draw(num_tasks, 6, 4), draw(num_tasks, 6)), (draw(num_tasks, 6, 4), draw(num_tasks, 6))


def gradients(method: Any, theta: Any, support: Any, query: Any) -> list[torch.Tensor]:
    leaves = [*theta.values(), *method.parameters()]
    return list(torch.autograd.grad(method(theta, support, query).mean(), leaves))


def make(strength: Any = 0.7, **settings: Any) -> il.meta.iMAML:
    solver = settings.pop("solver", il.solvers.GradientDescent(0.1, max_steps=8))
    return il.meta.iMAML(task_loss, solver, strength=strength, **settings)


def strengths(device: str) -> dict[str, Any]:
    double = {"dtype": torch.float64, "device": device}
    factor = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    return {
        "number": 0.7,
        "learned": torch.tensor(0.7, requires_grad=True, **double),
        "constant tensor": torch.tensor(0.7, **double),
        "per tensor": {"w": torch.full((4,), 0.5, requires_grad=True, **double), "b": 2.0},
        "matrix": il.MatrixStrength(factor=(torch.eye(5, **double) + 0.1 * factor).requires_grad_()),
        "positive": il.LearnedStrength(torch.tensor(0.7, **double)),
    }


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", list(strengths("cpu")))
def test_recorded_meta_gradient_is_that_of_the_plain_way(kind: str, device: str) -> None:
    theta, support, query = problem(device=device)
    strength = strengths(device)[kind]
    expected = gradients(make(strength), theta, support, query)
    recorded = make(strength, capture=True)
    for _ in range(2):
        # the same operations in another layout: rounding of float64, a few hundred operations
        torch.testing.assert_close(gradients(recorded, theta, support, query), expected, rtol=1e-11, atol=1e-12)
    assert runs == [1, 2] or device == "cuda"  # recorded once: the steps; the linearisation and the product


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("device", DEVICES)
def test_replays_follow_theta_the_strength_and_the_tasks(device: str) -> None:
    strength = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    recorded = make(strength, capture=True)
    for seed in range(3):
        theta, support, query = problem(device=device, seed=seed)
        with torch.no_grad():
            strength += 0.2  # as an optimizer changes it: in place
        expected = gradients(make(strength), theta, support, query)
        torch.testing.assert_close(gradients(recorded, theta, support, query), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("device", DEVICES)
def test_recorded_steps_have_their_own_sizes(device: str) -> None:
    theta, support, query = problem(device=device)
    sizes = {"w": torch.linspace(0.05, 0.2, 4, dtype=torch.float64, device=device), "b": 0.3}
    solver = il.solvers.GradientDescent(sizes, max_steps=8)
    expected = gradients(make(solver=solver), theta, support, query)
    found = gradients(make(solver=solver, capture=True), theta, support, query)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert runs == [1, 2] or device == "cuda"


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("device", DEVICES)
def test_backward_after_another_adaptation_is_that_of_its_own_tasks(device: str) -> None:
    recorded = make(capture=True)
    theta, support, query = problem(device=device)
    _, other_support, _ = problem(device=device, seed=1)
    expected = gradients(make(), theta, support, query)
    losses = recorded(theta, support, query)
    recorded.adapt(theta, other_support)
    torch.testing.assert_close(
        list(torch.autograd.grad(losses.mean(), list(theta.values()))), expected, rtol=1e-11, atol=1e-12
    )


@pytest.mark.usefixtures("replays")
def test_each_shape_has_its_own_recording_and_evaluation_records_no_products() -> None:
    recorded = make(capture=True)
    for num_tasks in (3, 2, 3):
        theta, support, query = problem(num_tasks)
        expected = gradients(make(), theta, support, query)
        torch.testing.assert_close(gradients(recorded, theta, support, query), expected, rtol=1e-11, atol=1e-12)
    assert runs == [1, 2, 1, 2]
    with torch.no_grad():
        phi = recorded.adapt(theta, support)
    assert runs == [1, 2, 1, 2, 1]
    torch.testing.assert_close(phi, make().adapt(theta, support), rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("replays")
def test_zero_cg_steps_replay_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    theta, support, query = problem()
    first_order = il.ConjugateGradient(max_steps=0)
    expected = gradients(make(linear_solver=first_order), theta, support, query)
    recorded = make(linear_solver=first_order, capture=True)
    gradients(recorded, theta, support, query)
    (recording,) = _recording.recordings_of(recorded).kept.values()
    assert recording is not None
    monkeypatch.setattr(recording, "_products", [])  # would fail if it were called
    torch.testing.assert_close(gradients(recorded, theta, support, query), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("replays")
def test_a_solver_that_decides_while_it_runs_keeps_its_recorded_products() -> None:
    theta, support, query = problem()
    for solver in (il.solvers.NewtonCG(max_steps=4, cg_steps=5), il.solvers.GradientDescent(0.1, 20, rtol=1e-9)):
        expected = gradients(make(solver=solver), theta, support, query)
        recorded = make(solver=solver, capture=True)
        with pytest.warns(il.ImplicitLayerWarning, match="inner steps run one by one: .* decides while it runs"):
            found = gradients(recorded, theta, support, query)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
        (recording,) = _recording.recordings_of(recorded).kept.values()
        assert recording is not None and not recording.has_steps and recording._products


@pytest.mark.usefixtures("replays")
def test_a_loss_that_reads_a_tensor_from_elsewhere_is_not_recorded() -> None:
    theta, support, query = problem()
    weight = torch.full((3,), 2.0, dtype=torch.float64)
    method = il.meta.iMAML(
        lambda params, batch: weight * task_loss(params, batch),
        il.solvers.GradientDescent(0.1, max_steps=8),
        capture=True,
    )
    with pytest.warns(il.ImplicitLayerWarning, match=r"closes over a tensor of shape \(3,\).*Pass it in the batch"):
        method.adapt(theta, support)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(method, theta, support, query)  # told once for a shape


def test_on_a_cpu_nothing_is_recorded_and_it_is_said() -> None:
    theta, support, query = problem()
    recorded = make(capture=True)
    with pytest.warns(il.ImplicitLayerWarning, match="tensors on cpu cannot be recorded, only those on a CUDA device"):
        found = gradients(recorded, theta, support, query)
    assert all(
        torch.equal(a, b) for a, b in zip(found, gradients(make(), theta, support, query), strict=True)
    )  # the same way, so the same bits


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (lambda s: (*s, "words"), "objects that are no tensors"),
        (lambda s: (s[0], s[1], torch.zeros(3, device="meta")), "several dtypes or devices"),
    ],
)
@pytest.mark.usefixtures("replays")
def test_what_no_recording_can_hold_is_named(support: Any, message: str) -> None:
    theta, data, _ = problem()
    method = il.meta.iMAML(
        lambda params, batch: task_loss(params, batch[:2]), il.solvers.GradientDescent(0.1, max_steps=2), capture=True
    )
    init = {"w": torch.zeros(3, 4), "b": torch.zeros(3)}
    with pytest.warns(il.ImplicitLayerWarning, match=message):
        method._recorded(method.inner_solver, (init, theta, support(data)))


@pytest.mark.usefixtures("replays")
def test_recorded_conv4_meta_gradient_is_that_of_the_plain_way() -> None:
    network = il.fewshot.conv4(3, num_filters=4, image_size=12)
    theta = {
        name: value.requires_grad_()
        for name, value in network.init(torch.Generator().manual_seed(0), dtype=torch.float64).items()
    }
    images = torch.rand(2, 6, 1, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = images, torch.arange(3).repeat(2, 2)

    def loss(params: Any, data: Any) -> torch.Tensor:
        return il.fewshot.task_cross_entropy(network(params, data[0]), data[1])

    found = [
        gradients(
            il.meta.iMAML(loss, il.solvers.GradientDescent(0.05, max_steps=3), strength=2.0, capture=capture),
            theta,
            batch,
            batch,
        )
        for capture in (False, True)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)  # five CG steps magnify rounding


def test_a_checkpoint_does_not_depend_on_how_its_numbers_were_computed() -> None:
    assert differences(plain(make(capture=True)), plain(make())) == []
    assert differences(plain(make(0.6)), plain(make())) == ["strength: 0.6 there, 0.7 here"]


@pytest.mark.gpu
@needs_cuda
def test_replays_do_not_wait_for_the_device() -> None:
    theta, support, _ = problem(device="cuda", dtype=torch.float32)
    recorded = make(capture=True)
    recorded.adapt(theta, support)
    (recording,) = _recording.recordings_of(recorded).kept.values()
    assert recording is not None
    init = {name: leaf.detach().expand(3, *leaf.shape) for name, leaf in theta.items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        phi = recording.descend(init, theta, support)
        product = recording.products_at(phi, [*theta.values(), *support])
        product(product(phi))
    finally:
        torch.cuda.set_sync_debug_mode("default")
