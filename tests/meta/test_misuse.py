"""What would have gone wrong silently, or ended in an error of torch's own: losses and metrics that are not one number
per task, batches and parameters of other types, budgets out of range."""

import gc
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from meta.lines import Lines, hit_rate, make_trainer, task_loss

import implicitlayer as il

# B: tasks, K: points of a task


def theta() -> dict[str, torch.Tensor]:
    return {name: torch.zeros((), dtype=torch.float64, requires_grad=True) for name in ("w", "b")}


def gradient_descent(max_steps: int = 2) -> il.solvers.GradientDescent:
    return il.solvers.GradientDescent(step_size=0.1, max_steps=max_steps)


METHODS: dict[str, Callable[[Any], il.meta.MetaMethod]] = {
    "iMAML": lambda loss: il.meta.iMAML(loss, gradient_descent()),
    "iMAML-HF": lambda loss: il.meta.iMAML(loss, il.solvers.NewtonCG(max_steps=1, cg_steps=2)),
    "MAML": lambda loss: il.meta.MAML(loss, step_size=0.1, num_steps=2),
    "no steps": lambda loss: il.meta.MAML(loss, step_size=0.1, num_steps=0),
    "TruncatedMAML": lambda loss: il.meta.TruncatedMAML(loss, step_size=0.1, num_steps=2, strength=1.0),
    "FirstOrderMAML": lambda loss: il.meta.FirstOrderMAML(loss, gradient_descent()),
    "Reptile": lambda loss: il.meta.Reptile(loss, gradient_descent()),
}


def mean_over_tasks(params: Any, batch: Any) -> torch.Tensor:
    return task_loss(params, batch).mean()


def one_per_point(params: Any, batch: Any) -> torch.Tensor:
    x, y = batch
    return (params["w"].unsqueeze(-1) * x + params["b"].unsqueeze(-1) - y).square()


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize(("loss", "shape"), [(mean_over_tasks, "()"), (one_per_point, "(4, 5)")])
def test_a_loss_that_is_not_one_number_per_task_is_refused(method: str, loss: Any, shape: str) -> None:
    support, query = Lines(0).sample(4)
    expected = f"task_loss returned shape {shape} for 4 tasks and must return one loss for each, [4]"
    with pytest.raises(ValueError, match=re.escape(expected)):
        METHODS[method](loss)(theta(), support, query)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("number", [1, 3])
def test_a_query_of_other_tasks_than_the_support_is_refused(method: str, number: int) -> None:
    (support, _), (_, query) = Lines(0).sample(2), Lines(0).sample(number)
    with pytest.raises(ValueError, match=rf"support is of 2 tasks, the query of {number}"):
        METHODS[method](task_loss)(theta(), support, query)


def test_a_loss_that_is_no_tensor_is_refused() -> None:
    support, query = Lines(0).sample(4)
    with pytest.raises(TypeError, match=re.escape("task_loss returned a float and must return a tensor [4]")):
        METHODS["MAML"](lambda params, batch: 1.0)(theta(), support, query)


METRICS: dict[str, tuple[Any, type[Exception], str]] = {
    "a mean": (lambda phi, query: hit_rate(phi, query).mean(), ValueError, "metric returned shape () for 4 tasks"),
    "points": (lambda phi, query: one_per_point(phi, query), ValueError, "metric returned shape (4, 5) for 4 tasks"),
    "a number": (lambda phi, query: 0.5, TypeError, "metric returned a float and must return a tensor [4]"),
}


@pytest.mark.parametrize("name", list(METRICS))
def test_a_metric_that_is_not_one_number_per_task_is_refused(name: str) -> None:
    metric, kind, message = METRICS[name]
    with pytest.raises(kind, match=re.escape(message)):
        make_trainer(None, metric=metric, validation=(), max_steps=1).fit()
    with pytest.raises(kind, match=re.escape(message)):
        il.meta.evaluate(METHODS["MAML"](task_loss), theta(), [Lines(0).sample(4)], metric)


@pytest.mark.parametrize("tasks_per_chunk", [0, -1, 1.5])
def test_evaluation_in_chunks_of_no_task_is_refused(tasks_per_chunk: Any) -> None:
    with pytest.raises(ValueError, match=f"tasks_per_chunk={tasks_per_chunk} must be an integer of at least 1"):
        il.meta.evaluate(
            METHODS["MAML"](task_loss), theta(), [Lines(0).sample(4)], hit_rate, tasks_per_chunk=tasks_per_chunk
        )


def test_an_array_in_a_batch_is_refused_because_it_could_not_be_split() -> None:
    (x, y), query = Lines(0).sample(4)
    method = METHODS["MAML"](lambda params, batch: task_loss(params, (batch[0], torch.as_tensor(batch[1]))))
    with pytest.raises(TypeError, match=re.escape("a NumPy array of shape (4, 5)") + ".*torch.from_numpy"):
        method(theta(), (x, y.numpy()), query)


def test_what_is_no_tensor_in_a_batch_is_the_same_for_all_tasks() -> None:
    def weighted(params: Any, batch: Any) -> torch.Tensor:
        return batch["weight"] * task_loss(params, batch["points"])

    support, query = ({"points": points, "weight": 2.0} for points in Lines(0).sample(4))
    method = METHODS["MAML"](weighted)
    with torch.no_grad():
        expected = method(theta(), support, query)
    result = il.meta.evaluate(method, theta(), [(support, query)], weighted, tasks_per_chunk=1)
    # the values of an Evaluation are float32
    torch.testing.assert_close(result.values, expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"w": torch.zeros(()), "b": torch.tensor(3)}, "theta['b'] has dtype torch.int64"),
        ({"w": torch.zeros(()), "b": 0.5}, "theta['b'] is a float"),
        (torch.nn.Linear(1, 1), "theta is a Linear"),
    ],
)
def test_meta_parameters_that_are_no_floating_tensors_are_refused_by_name(method: str, bad: Any, message: str) -> None:
    support, query = Lines(0).sample(4)
    with pytest.raises(TypeError, match=re.escape(message)):
        METHODS[method](task_loss)(bad, support, query)


def test_a_run_that_could_learn_nothing_is_refused() -> None:
    fixed = {name: leaf.detach() for name, leaf in theta().items()}
    with pytest.raises(ValueError, match=r"no tensor of theta requires a gradient.*requires_grad_"):
        il.meta.Trainer(METHODS["MAML"](task_loss), fixed, Lines(0), torch.optim.SGD([torch.zeros(1)]), max_steps=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1}, "max_steps=-1 must be an integer of at least 0"),
        ({"max_steps": 1.5}, "max_steps=1.5 must be an integer of at least 0"),
        ({"max_minutes": -0.5}, "max_minutes=-0.5 must be a number of at least 0"),
        ({"max_minutes": float("nan")}, "max_minutes=nan must be a number of at least 0"),
        ({"tasks_per_step": 2.5}, "tasks_per_step=2.5 must be an integer of at least 1"),
        ({"tasks_per_chunk": 1.5}, "tasks_per_chunk=1.5 must be an integer of at least 1"),
        ({"report_steps": 0}, "report_steps=0 must be an integer of at least 1"),
        ({"num_validations": -1}, "num_validations=-1 must be an integer of at least 0"),
        ({"checkpoint_steps": 0}, "checkpoint_steps=0 must be an integer of at least 1"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds=-1.0 must be a number of at least 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer(None, **settings)


def test_a_budget_of_no_steps_is_used_up_at_once() -> None:
    assert make_trainer(None, max_steps=0, max_minutes=1.0).fit() == []


@pytest.mark.parametrize("until", [-0.1, 1.5, float("nan")])
def test_fit_goes_on_until_a_share_of_the_budget(until: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"until={until} must lie in 0...1")):
        make_trainer(None, max_steps=1).fit(until=until)


def test_validation_that_can_be_read_only_once_is_refused() -> None:
    with pytest.raises(TypeError, match="validation is a generator and must be a list"):
        make_trainer(None, validation=(Lines(1).sample(3) for _ in range(2)))


def test_batches_of_a_few_shot_sampler_are_episodes() -> None:
    images = torch.randint(0, 255, (5, 4, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sampler = il.fewshot.EpisodeSampler(
        il.fewshot.ImageClasses(images, list("abcde")), num_ways=2, num_shots=1, num_query=1
    )

    def loss(params: Any, batch: Any) -> torch.Tensor:
        pictures, labels = batch
        return (params["w"].unsqueeze(1) * pictures.mean((2, 3, 4)) - labels).square().mean(1)

    method, start = il.meta.MAML(loss, step_size=0.1, num_steps=1), {"w": torch.zeros(())}
    batches = list(sampler.fixed(5, batch_size=3))
    pairs = [il.meta.as_support_query(batch) for batch in batches]
    found = il.meta.evaluate(method, start, batches, loss).values
    assert torch.equal(found, il.meta.evaluate(method, start, pairs, loss).values) and found.shape == (5,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 2.0}, "num_steps=2.0 must be an integer of at least 0"),
        ({"num_steps": 2, "momentum": [0.5]}, "momentum=[0.5] must be one number"),
        ({"num_steps": 2, "momentum": None}, "momentum=None must be one number"),
    ],
)
def test_settings_of_maml_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        il.meta.MAML(task_loss, step_size=0.1, **settings)


@pytest.mark.parametrize("strength", [torch.zeros(()), {"w": 0.0, "b": torch.zeros(())}])
def test_truncation_without_any_strength_is_refused_in_every_form(strength: Any) -> None:
    with pytest.raises(ValueError, match="must be positive: without a proximal term"):
        il.meta.TruncatedMAML(task_loss, step_size=0.1, num_steps=2, strength=strength)


def test_truncated_steps_are_counted_in_whole_numbers() -> None:
    with pytest.raises(ValueError, match=re.escape("num_backward_steps=1.5 must be an integer in 1...num_steps=2")):
        il.meta.TruncatedMAML(task_loss, step_size=0.1, num_steps=2, strength=1.0, num_backward_steps=1.5)  # type: ignore[arg-type]


def test_a_tensor_learned_in_two_places_is_listed_once() -> None:
    shared = il.LearnedStrength(0.1)
    method = il.meta.MAML(task_loss, step_size={"w": shared.raw[0], "b": shared.raw[0]}, num_steps=1, strength=shared)
    assert [id(tensor) for tensor in method.parameters()] == [id(shared.raw[0])]


@pytest.mark.parametrize("method", list(METHODS))
def test_adaptation_in_inference_mode_is_that_without_gradients(method: str) -> None:
    support, query = Lines(0).sample(4)
    with torch.no_grad():
        expected = METHODS[method](task_loss)(theta(), support, query)
    with torch.inference_mode():
        support, query = Lines(0).sample(4)  # tensors made in inference mode
        found = METHODS[method](task_loss)(theta(), support, query)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_no_tensor_to_the_garbage_collector(method: str) -> None:
    """What is in a reference cycle stays alive until Python looks for cycles: on a GPU, until memory is full."""
    start = theta()
    trainer = il.meta.Trainer(
        METHODS[method](task_loss),
        start,
        Lines(0),
        torch.optim.Adam(start.values(), lr=1e-3),
        max_steps=20,
        metric=hit_rate,
        show_progress=False,
        validation=[Lines(1).sample(3)],
        report_steps=2,
    )
    trainer.fit(until=0.5)
    gc.collect()
    gc.disable()
    try:
        before = count_tensors()
        trainer.fit()
        assert count_tensors() == before
    finally:
        gc.enable()


def count_tensors() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
