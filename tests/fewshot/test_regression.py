"""Sinusoids and the small regressor: the tasks are sines, the network is torch's own layers, task by task."""

import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from fewshot.network_problems import EXACT, Params, random_like, task
from torch import Tensor

from implicitlayer.fewshot import MLP, Sinusoids, mlp, task_mean_squared_error
from implicitlayer.meta import as_support_query

NETWORK = mlp(in_features=2, hidden=(5, 4), out_features=3)


def same(first: object, second: object) -> bool:
    """Whether two nested tuples hold the same tensors."""
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)


def test_every_task_is_one_sine_in_support_and_query() -> None:
    support, query = as_support_query(Sinusoids(num_shots=6, num_query=7, seed=3).sample(50))
    assert [tuple(t.shape) for t in (*support, *query)] == [(50, 6, 1)] * 2 + [(50, 7, 1)] * 2
    x, y = (torch.cat(pair, 1).squeeze(2).double() for pair in zip(support, query, strict=True))
    assert x.min() >= -5 and x.max() <= 5
    # A sin(x - p) = a sin x + b cos x: the support gives a and b by least squares, the query must lie on that curve.
    for x_task, y_task in zip(x, y, strict=True):
        waves = torch.stack([x_task.sin(), x_task.cos()], 1)
        a, b = torch.linalg.lstsq(waves[:6], y_task[:6]).solution
        # x is rounded to float32 after y was taken at it: 5 eps = 3e-7 in x, times A = 5; the fit multiplies it by the
        # condition of six random points, below 100.
        torch.testing.assert_close(waves[6:] @ torch.stack([a, b]), y_task[6:], rtol=0, atol=2e-4)
        assert 0.0999 <= math.hypot(a, b) <= 5.0001
        assert -1e-3 <= math.atan2(-b, a) <= math.pi + 1e-3 or math.atan2(-b, a) <= -math.pi + 1e-3


def test_amplitudes_phases_and_points_are_uniform_in_their_intervals() -> None:
    sampler = Sinusoids(num_shots=1, num_query=1, amplitude=(1, 3), phase=(math.pi / 2,) * 2, interval=(math.pi,) * 2)
    (x, y), _ = sampler.sample(4000)
    assert torch.equal(x, torch.full_like(x, math.pi))
    # sin(pi - pi/2) = 1, so y is the amplitude: uniform in [1, 3], deviation 2 / sqrt(12); five standard errors.
    assert abs(y.mean().item() - 2) < 5 * (2 / math.sqrt(12)) / math.sqrt(4000)
    assert 1 <= y.min() < 1.01 and 2.99 < y.max() <= 3


def test_tasks_do_not_depend_on_how_they_are_batched_and_resume_bit_for_bit() -> None:
    whole = Sinusoids(seed=5).sample(5)
    parts = Sinusoids(seed=5)
    first = parts.sample(2)
    file = io.BytesIO()
    torch.save(parts.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert json.loads(json.dumps(state)) == state
    resumed = Sinusoids(seed=0)
    resumed.load_state_dict(state)
    second = resumed.sample(3)
    assert same(second, parts.sample(3))
    joined = tuple(
        tuple(torch.cat(pair) for pair in zip(*sets, strict=True)) for sets in zip(first, second, strict=True)
    )
    assert same(joined, whole)
    assert same(next(parts.fixed(5, batch_size=9)), whole)
    assert not same(Sinusoids(seed=6).sample(5), whole)


def test_state_of_other_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_shots: 10 there, 5 here.*cannot be continued"):
        Sinusoids(num_shots=5).load_state_dict(Sinusoids().state_dict())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_shots": 0}, "num_shots=0 must be an integer of at least 1"),
        ({"num_query": 1.5}, r"num_query=1\.5 must be an integer of at least 1"),
        ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
        ({"amplitude": (2, 1)}, r"amplitude=\(2, 1\) must be two finite numbers, the smaller first"),
        ({"phase": (0, math.nan)}, r"phase=\(0, nan\) must be two finite numbers"),
        ({"interval": 5}, "interval=5 must be two finite numbers"),
        ({"phase": (1.0,)}, r"phase=\(1\.0,\) must be two finite numbers"),
        ({"interval": (-math.inf, 0)}, r"interval=\(-inf, 0\) must be two finite numbers"),
    ],
)
def test_bad_ranges_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sinusoids(**kwargs)


def problem() -> tuple[Params, Tensor, Tensor]:
    draws = [NETWORK.init(torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    params = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    return params, torch.randn(3, 6, 2, dtype=torch.float64), torch.randn(3, 6, 3, dtype=torch.float64)


def plain(params: Params, x: Tensor) -> Tensor:
    for layer in (1, 2):
        x = F.relu(F.linear(x, params[f"linear{layer}.weight"], params[f"linear{layer}.bias"]))
    return F.linear(x, params["linear3.weight"], params["linear3.bias"])


@pytest.mark.parametrize("shared", [False, True])
def test_outputs_gradients_and_products_are_those_of_torch_layers(shared: bool) -> None:
    params, x, y = problem()
    if shared:
        params = task(params, 0)
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    ours = task_mean_squared_error(NETWORK(leaves, x), y)
    loop = [F.mse_loss(plain(leaves if shared else task(leaves, i), x[i]), y[i]) for i in range(3)]
    torch.testing.assert_close(ours, torch.stack(loop), **EXACT)
    values, direction = list(leaves.values()), list(random_like(leaves).values())
    answers = []
    for loss in (ours.square().sum(), torch.stack(loop).square().sum()):
        gradients = torch.autograd.grad(loss, values, create_graph=True)
        answers.append((gradients, torch.autograd.grad(gradients, values, direction)))
    torch.testing.assert_close(*answers, **EXACT)


def test_one_task_and_vmapped_tasks_equal_the_native_batch() -> None:
    params, x, _ = problem()
    outputs = NETWORK(params, x)
    torch.testing.assert_close(NETWORK(task(params, 1), x[1]), outputs[1], **EXACT)
    torch.testing.assert_close(torch.vmap(NETWORK)(params, x), outputs, **EXACT)


def test_initial_parameters_have_the_stated_range_and_a_seed_fixes_them() -> None:
    network = mlp(in_features=100, hidden=(100,), out_features=50)
    params, again = (network.init(torch.Generator().manual_seed(1)) for _ in range(2))
    assert {name: tuple(p.shape) for name, p in params.items()} == network.shapes
    assert all(0.09 < p.abs().max() <= 0.1 for p in params.values())  # 1 / sqrt(100)
    assert all(torch.equal(params[name], again[name]) for name in params)
    assert list(mlp(hidden=()).shapes) == ["linear1.weight", "linear1.bias"]


def test_wrong_sizes_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden\[1\]=0 must be an integer of at least 1"):
        mlp(hidden=(4, 0))
    with pytest.raises(ValueError, match=r"out_features=2\.0 must be an integer"):
        MLP(out_features=2.0)  # type: ignore[arg-type]
    params, x, y = problem()
    with pytest.raises(ValueError, match=r"inputs of shape \(3, 6, 1\) must be \[K, 2\], or \[B, K, 2\].*in_features"):
        NETWORK(params, x[..., :1])
    with pytest.raises(ValueError, match=r"params has no 'linear1\.weight'; mlp needs linear1\.weight"):
        NETWORK({}, x)
    with pytest.raises(TypeError, match=r"input of mlp has dtype torch\.float32 and params\['linear1\.weight'\] .*64"):
        NETWORK(params, x.float())
    with pytest.raises(ValueError, match=r"\(3, 4, 5\) must have shape \(4, 5\), as the input holds one task"):
        NETWORK(task(params, 0) | {"linear2.weight": params["linear2.weight"]}, x[0])
    with pytest.raises(ValueError, match=r"predictions of shape \(3, 6, 3\) and targets of shape \(3, 6\).*unsqueeze"):
        task_mean_squared_error(y, y[..., 0])
