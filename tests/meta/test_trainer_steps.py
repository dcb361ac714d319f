"""One meta-step: chunks and the memory budget, outer optimizers, schedulers."""

from typing import Any

import pytest
import torch
from meta.lines import Lines, comparable, hit_rate, make_trainer, tensors
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

import implicitlayer as il
from implicitlayer.meta._tasks import largest_chunk

# B: tasks of a meta-step


@pytest.mark.parametrize("tasks_per_chunk", [1, 3, 7, 100])
def test_chunks_add_up_to_the_meta_gradient_of_all_tasks(tasks_per_chunk: int) -> None:
    trainer = make_trainer(None, tasks_per_step=7, tasks_per_chunk=tasks_per_chunk, max_steps=1, learning_rate=None)
    theta = {name: leaf.detach().clone().requires_grad_() for name, leaf in trainer.theta.items()}
    reference = make_trainer(None)
    (strength,) = reference.method.parameters()
    support, query = Lines(1).sample(7)
    losses = reference.method(theta, support, query)
    expected = torch.autograd.grad(losses.mean(), [*theta.values(), strength])
    (record,) = trainer.fit()
    found = [leaf.grad for leaf in [*trainer.theta.values(), *trainer.method.parameters()]]
    # sums of 7 terms in another order: a few ulp of 2e-16
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-14, atol=1e-15)
    assert record["loss"] == pytest.approx(float(losses.detach().mean()), rel=1e-14)
    assert record["accuracy"] == pytest.approx(
        float(hit_rate(reference.method.adapt(theta, support), query).mean()), rel=1e-14
    )
    whole = make_trainer(None, tasks_per_step=7, max_steps=1).fit()[0]
    for name in ("inner_before", "inner_after", "inner_diverged", "negative_curvature", "cg_residual"):
        assert record[name] == pytest.approx(whole[name], rel=1e-12)


def peak_of(num_tasks: int) -> int:
    """Bytes of one meta-gradient as the trainer makes it, with its look at the inner problem."""
    trainer = make_trainer(None, tasks_per_step=num_tasks, learning_rate=None)
    batch = trainer.sampler.sample(num_tasks)
    trainer._gradient(batch, look=True)
    return il.meta.peak_memory(lambda: trainer._gradient(batch, look=True))


def test_the_memory_budget_gives_the_largest_chunk_that_fits() -> None:
    trainer = make_trainer(None, tasks_per_step=12, memory_budget=peak_of(5), max_steps=1)
    trainer.fit()
    chosen = trainer.state_dict()["chunk"]["tasks"]
    # the reference counts the few numbers of the record as well: one chunk more or less
    assert 4 <= chosen <= 5
    assert peak_of(chosen) <= trainer.memory_budget < peak_of(chosen + 2)
    plenty = make_trainer(None, tasks_per_step=12, memory_budget=2**40, max_steps=1)
    plenty.fit()
    assert plenty.state_dict()["chunk"]["tasks"] == 12


def test_measuring_memory_changes_no_number_of_the_run() -> None:
    with_budget = make_trainer(None, max_steps=5, memory_budget=2**40)
    without = make_trainer(None, max_steps=5, tasks_per_chunk=4)  # the same chunks, evaluation included
    with_budget.method = without.method = il.meta.MAML(noisy_loss, step_size=0.1, num_steps=2)
    for trainer in (with_budget, without):
        torch.manual_seed(5)
        trainer.fit()
    assert comparable(with_budget.history) == comparable(without.history)


def noisy_loss(params: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = batch
    noise = 0.1 * torch.randn((), dtype=torch.float64)  # from the global generator, as dropout would
    return ((params["w"].unsqueeze(-1) + noise) * x + params["b"].unsqueeze(-1) - y).square().mean(-1)


def test_the_largest_chunk_is_found_from_two_measurements_and_confirmed() -> None:
    asked = []

    def linear(size: int) -> int:
        asked.append(size)
        return 100 + 10 * size

    assert largest_chunk(linear, 165, 32) == 6  # 160 bytes; 7 would be 170
    assert asked == [1, 2, 6]
    assert largest_chunk(linear, 10_000, 32) == 32
    assert largest_chunk(linear, 110, 32) == 1
    assert largest_chunk(lambda size: 100 + 10 * size + 4 * max(size - 3, 0), 165, 32) == 5  # bends upwards: 158
    assert largest_chunk(lambda size: 7, 10, 4) == 4
    with pytest.raises(ValueError, match="memory_budget=109 bytes is less than the 110 bytes"):
        largest_chunk(linear, 109, 32)


def test_a_task_that_does_not_fit_is_an_error_with_its_remedy() -> None:
    with pytest.raises(ValueError, match=r"meta-gradient of a single task takes\. Give at least that"):
        make_trainer(None, memory_budget=100).fit()


def test_peak_memory_counts_what_is_alive() -> None:
    x = torch.zeros(1000)

    def two_then_one() -> torch.Tensor:
        a, b = x + 1, x + 2  # 8000 bytes
        del a
        return b + 1  # 8000 again

    assert il.meta.peak_memory(two_then_one) == 8000
    assert il.meta.peak_memory(lambda: x.view(10, 100)) == 0


OPTIMIZERS = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.LBFGS]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_outer_optimizer_learns_and_resumes_bit_for_bit(optimizer: Any, tmp_path: Any) -> None:
    settings: dict[str, Any] = {"optimizer": optimizer, "learning_rate": None, "max_steps": 12, "report_steps": 5}
    straight = make_trainer(None, **settings)
    straight.fit()
    assert straight.history[-1]["loss"] < straight.history[0]["loss"]
    part = make_trainer(tmp_path, **settings)
    part.fit(until=0.5)
    resumed = make_trainer(tmp_path, **settings)
    assert resumed.resume() and resumed.step == 6
    resumed.fit()
    assert comparable(resumed.history) == comparable(straight.history)
    assert torch.equal(tensors(resumed), tensors(straight))


def test_lbfgs_evaluates_the_tasks_of_its_own_step() -> None:
    trainer = make_trainer(None, optimizer=torch.optim.LBFGS, learning_rate=None, max_steps=1)
    reference = make_trainer(None, optimizer=torch.optim.LBFGS, learning_rate=None)
    support, query = Lines(1).sample(4)

    def closure() -> float:
        reference.optimizer.zero_grad()
        loss = reference.method(reference.theta, support, query).mean()
        loss.backward()
        return float(loss.detach())

    reference.optimizer.step(closure)
    trainer.fit()
    torch.testing.assert_close(tensors(trainer), tensors(reference), rtol=1e-12, atol=1e-12)


SCHEDULERS = {
    "cosine": lambda outer: CosineAnnealingLR(outer, 12),
    "lambda": lambda outer: LambdaLR(outer, lambda step: 0.9**step),
    "one cycle": lambda outer: OneCycleLR(outer, max_lr=0.1, total_steps=12),
    "sequence": lambda outer: SequentialLR(outer, [LinearLR(outer, 0.1, total_iters=4), StepLR(outer, 3)], [4]),
    "plateau": lambda outer: ReduceLROnPlateau(outer, mode="max", patience=0, threshold=0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_stepped_and_resumes_bit_for_bit(name: str, tmp_path: Any) -> None:
    settings: dict[str, Any] = {"scheduler": SCHEDULERS[name], "max_steps": 12, "num_validations": 6}
    straight = make_trainer(None, **settings)
    before = [group["lr"] for group in straight.optimizer.param_groups]
    straight.fit()
    rates = [group["lr"] for group in straight.optimizer.param_groups]
    assert rates != before
    make_trainer(tmp_path, **settings).fit(until=0.5)
    resumed = make_trainer(tmp_path, **settings)
    assert resumed.resume() and resumed.step == 6
    resumed.fit()
    assert [group["lr"] for group in resumed.optimizer.param_groups] == rates
    assert comparable(resumed.history) == comparable(straight.history)
    assert torch.equal(tensors(resumed), tensors(straight))


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Any) -> None:
    def trainer(make: Any) -> il.meta.Trainer:
        return make_trainer(tmp_path, scheduler=make, max_steps=4)

    trainer(lambda outer: StepLR(outer, 3, gamma=0.5)).fit()
    for other, difference in (
        (lambda outer: StepLR(outer, 3, gamma=0.9), r"outer\.scheduler\.gamma: 0\.5 there, 0\.9 here"),
        (lambda outer: StepLR(outer, 2, gamma=0.5), r"outer\.scheduler\.step_size: 3 there, 2 here"),
        (lambda outer: LambdaLR(outer, lambda step: 1.0), r"outer\.scheduler\.class: 'StepLR' there, 'LambdaLR' here"),
        (None, r"outer\.scheduler: 'absent' there, 'NoneType' here"),
    ):
        with pytest.raises(il.meta.CheckpointError, match=difference):
            trainer(other).resume()
    assert trainer(lambda outer: StepLR(outer, 3, gamma=0.5)).resume()


def test_a_scheduler_is_stepped_once_for_every_meta_step() -> None:
    trainer = make_trainer(None, scheduler=lambda outer: LambdaLR(outer, lambda step: 0.5**step), max_steps=5)
    trainer.fit()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.05 / 32, 0.01 / 32]


def test_settings_that_contradict_each_other_are_refused() -> None:
    def step_lr(outer: torch.optim.Optimizer) -> StepLR:
        return StepLR(outer, 3)

    with pytest.raises(ValueError, match="learning_rate and scheduler both set"):
        make_trainer(None, scheduler=step_lr, learning_rate=il.meta.cosine_decay)
    with pytest.raises(ValueError, match="scheduler steers another optimizer"):
        make_trainer(None, scheduler=lambda outer: step_lr(torch.optim.SGD([torch.zeros(1)], lr=0.1)))
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau\(mode='min'\) and better='higher' contradict"):
        make_trainer(None, scheduler=ReduceLROnPlateau)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau\(mode='max'\) and better='lower' contradict"):
        make_trainer(None, scheduler=SCHEDULERS["plateau"], better="lower")
    with pytest.raises(ValueError, match="give metric and validation"):
        make_trainer(None, scheduler=SCHEDULERS["plateau"], validation=())
    with pytest.raises(ValueError, match="tasks_per_chunk and memory_budget both set"):
        make_trainer(None, tasks_per_chunk=2, memory_budget=10**9)
    with pytest.raises(ValueError, match="tasks_per_chunk=0 must be an integer of at least 1"):
        make_trainer(None, tasks_per_chunk=0)
    with pytest.raises(ValueError, match="memory_budget=-1 must be an integer of at least 1"):
        make_trainer(None, memory_budget=-1)
    with pytest.raises(ValueError, match=r"max_gradient_norm=0\.0 must be positive"):
        make_trainer(None, max_gradient_norm=0.0)
    with pytest.raises(ValueError, match="max_gradient_norm cannot go with LBFGS"):
        make_trainer(None, optimizer=torch.optim.LBFGS, max_gradient_norm=1.0)
    with pytest.raises(ValueError, match="better='best' must be"):
        make_trainer(None, better="best")


def test_the_meta_gradient_is_clipped_over_all_its_tensors() -> None:
    trainer = make_trainer(None, optimizer=torch.optim.SGD, max_gradient_norm=0.1, max_steps=1, tasks_per_chunk=1)
    (record,) = trainer.fit()
    assert record["gradient_norm"] > 0.1  # what is recorded is the norm before
    gradients = torch.stack([p.grad for p in trainer._outer.leaves if p.grad is not None])
    # torch divides by the norm plus 1e-6
    assert float(gradients.norm()) == pytest.approx(0.1, rel=1e-5)
