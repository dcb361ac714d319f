"""Evaluation says its protocol, and the protocol is what it says: does a query image see the other query images?"""

from typing import Any

import pytest
import torch
from meta.lines import Lines, hit_rate, make_trainer

import implicitlayer as il

# B: tasks, S: support images, Q: query images
inductive_logits = il.fewshot.inductive_logits
NETWORK = il.fewshot.conv4(3, num_filters=4, image_size=14)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, 1, 14, 14, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def params(batch: int | None = None) -> dict[str, torch.Tensor]:
    one = NETWORK.init(torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.Generator().manual_seed(1)
    if batch is None:
        return one
    return {k: v + 0.1 * torch.randn(batch, *v.shape, generator=noise, dtype=v.dtype) for k, v in one.items()}


def test_inductive_logits_of_an_image_do_not_depend_on_the_other_query_images() -> None:
    support, query = images(2, 3), images(2, 5, seed=1)
    other = torch.cat([query[:, :1], images(2, 4, seed=2)], 1)
    inductive = [inductive_logits(NETWORK, params(2), support, batch) for batch in (query, other)]
    assert inductive[0].shape == (2, 5, 3)
    assert torch.equal(inductive[0][:, 0], inductive[1][:, 0])
    transductive = [NETWORK(params(2), batch) for batch in (query, other)]
    assert (transductive[0][:, 0] - transductive[1][:, 0]).abs().max() > 1e-2


def test_inductive_logits_are_those_of_the_image_beside_the_support() -> None:
    support, query = images(3), images(4, seed=1)
    logits = inductive_logits(NETWORK, params(), support, query)
    for index in range(4):
        alone = NETWORK(params(), torch.cat([support, query[index : index + 1]]))[-1]
        torch.testing.assert_close(logits[index], alone, rtol=1e-12, atol=1e-12)
    batched = inductive_logits(NETWORK, params(), support.expand(2, *support.shape), query.expand(2, *query.shape))
    torch.testing.assert_close(batched, logits.expand(2, 4, 3), rtol=1e-10, atol=1e-10)


def test_pictures_that_do_not_go_together_are_refused() -> None:
    for support, query in [
        (images(3), images(2, 4)),
        (images(2, 3), images(3, 4)),
        (images(0), images(4)),
        (images(3)[..., :13], images(4)),
        (images(), images(4)),
    ]:
        with pytest.raises(ValueError, match="with the same tasks and picture size, and S at least 1"):
            inductive_logits(NETWORK, params(), support, query)


def few_shot(transductive: bool | None) -> tuple[il.meta.Trainer, Any]:
    pictures = torch.randint(256, (6, 6, 14, 14), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    classes = il.fewshot.ImageClasses(pictures, list("abcdef"))
    sampler = il.fewshot.EpisodeSampler(classes, num_ways=3, num_query=2, seed=4)
    theta = {name: leaf.float().requires_grad_() for name, leaf in params().items()}

    def task_loss(phi: Any, batch: Any) -> torch.Tensor:
        return il.fewshot.task_cross_entropy(NETWORK(phi, batch[0]), batch[1])

    def seen_together(phi: Any, query: Any) -> torch.Tensor:
        return il.fewshot.task_accuracy(NETWORK(phi, query[0]), query[1])

    def seen_alone(phi: Any, query: Any, support: Any) -> torch.Tensor:
        return il.fewshot.task_accuracy(inductive_logits(NETWORK, phi, support[0], query[0]), query[1])

    method = il.meta.FirstOrderMAML(task_loss, il.solvers.GradientDescent(step_size=0.1, max_steps=2))
    trainer = il.meta.Trainer(
        method,
        theta,
        sampler,
        torch.optim.SGD(theta.values(), lr=0.1),
        max_steps=2,
        metric=seen_alone if transductive is False else seen_together,
        transductive=transductive,
        show_progress=False,
    )
    return trainer, [il.meta.as_support_query(batch) for batch in sampler.fixed(6, batch_size=4)]


@pytest.mark.parametrize("transductive", [None, True, False])
def test_an_evaluation_carries_its_protocol(transductive: bool | None) -> None:
    trainer, episodes = few_shot(transductive)
    assert all("accuracy" in record for record in trainer.fit())
    result = trainer.evaluate(episodes)
    assert result.transductive is transductive and result.num_tasks == 6
    words = {None: "%", True: "% (transductive)", False: "% (not transductive)"}[transductive]
    assert str(result).endswith(words)
    numbers = {"mean": result.mean, "interval": result.interval, "num_tasks": 6, "transductive": transductive}
    assert result.as_dict() == numbers


def test_evaluation_in_chunks_is_the_same() -> None:
    trainer = make_trainer(None)
    episodes = [Lines(3).sample(7), Lines(4).sample(2)]
    whole = il.meta.evaluate(trainer.method, trainer.theta, episodes, hit_rate)
    parts = il.meta.evaluate(trainer.method, trainer.theta, episodes, hit_rate, tasks_per_chunk=3)
    assert whole.values.shape == (9,) and torch.equal(whole.values, parts.values)
    expected = torch.cat([hit_rate(trainer.method.adapt(trainer.theta, s), q) for s, q in episodes])
    assert torch.equal(whole.values, expected.float())


def test_a_trainer_without_a_metric_has_nothing_to_evaluate() -> None:
    with pytest.raises(ValueError, match="give the trainer a metric"):
        make_trainer(None, metric=None).evaluate([Lines(3).sample(2)])
