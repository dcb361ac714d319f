"""Methods that adapt a linear head only, on features that the tasks share: ANIL and prototypical networks."""

# B: tasks, K: support examples of a task, N: ways, d: features

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from implicitlayer.base._tree import check_integer
from implicitlayer.base._types import PyTree
from implicitlayer.meta._method import MetaMethod, check_one_per_task, learned_tensors, num_tasks, one_per_task
from implicitlayer.meta._unrolled import MAML
from implicitlayer.solvers._leaves import StepSize, check_step_size

Features = Callable[[PyTree, Any], torch.Tensor]
"""``features(params, inputs) -> [B, K, d]``; ``params`` and ``inputs`` carry a leading B."""


@dataclass(frozen=True, eq=False)
class _LinearHead(MetaMethod):
    """A linear head ``features W' + b`` whose W ``[N, d]`` and b ``[N]`` are two leaves of the dict theta."""

    features: Features
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    _: KW_ONLY
    head: tuple[str, str] = ("head.weight", "head.bias")

    @classmethod
    def examples(cls, *given: Any) -> list[Any]:
        """On the features of the task loss that is given."""
        return [cls(given[0].features, given[0].loss)]

    def task_loss(self, params: PyTree, batch: PyTree) -> torch.Tensor:  # type: ignore[override]
        """The loss [B] of the whole network on ``batch = (inputs, targets)``."""
        inputs, targets = batch
        return self._head_loss(params, (self.features(params, inputs), targets))

    def _head_loss(self, params: PyTree, batch: PyTree) -> torch.Tensor:
        features, targets = batch
        weight, bias = (params[name] for name in self.head)
        logits = torch.baddbmm(bias.unsqueeze(1), features, weight.mT)
        return check_one_per_task("loss", self.loss(logits, targets), len(features))

    def _start(self, theta: PyTree, support: PyTree) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Theta once for each task, the support's features, and its targets."""
        if not isinstance(theta, dict) or not set(self.head) <= set(theta):
            found = ", ".join(map(str, theta)) if isinstance(theta, dict) else type(theta).__name__
            raise ValueError(
                f"theta must be a dict with the leaves {' and '.join(map(repr, self.head))} of the linear head, and "
                f"has {found}. Name them with head=(weight, bias)."
            )
        inputs, targets = support
        phi = one_per_task(theta, num_tasks(support))
        features = self.features(phi, inputs)
        width = theta[self.head[0]].shape[1]
        if features.ndim != 3 or features.shape[::2] != (num_tasks(support), width):
            raise ValueError(
                f"features returned shape {tuple(features.shape)} and must return [{num_tasks(support)}, K, {width}]: "
                f"one vector of the head's {width} inputs for each example of each task."
            )
        return phi, features, targets


@dataclass(frozen=True, eq=False)
class ANIL(_LinearHead):
    """ANIL (almost no inner loop): MAML whose inner steps move the linear head only.

    The features of the support set are computed once, so a meta-gradient takes little more than one gradient of the
    network, whatever the number of inner steps.

    Args:
        features: ``features(params, inputs) -> [B, K, d]``, such as ``network.features`` of ``il.fewshot.conv4``.
        loss: ``loss(logits, targets) -> [B]`` of logits ``[B, K, N]``, such as ``il.fewshot.task_cross_entropy``.
        head: names in theta of the head's weight ``[N, d]`` and bias ``[N]``.
        step_size, num_steps: of the inner gradient descent, as in :class:`MAML`.

    Raises:
        ValueError: a number outside its range, a head that theta does not have, or features of another shape.

    Source: Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse?", ICLR 2020, section 4.

    Example:
        >>> import torch, implicitlayer as il
        >>> network = il.fewshot.conv4(num_ways=5, num_filters=4)
        >>> theta = network.init(torch.Generator().manual_seed(0))
        >>> method = il.meta.ANIL(network.features, il.fewshot.task_cross_entropy, step_size=0.1, num_steps=5)
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).expand(2, 5)  # two tasks, one shot
        >>> phi = method.adapt(theta, (images, labels))
        >>> [name for name in theta if not torch.equal(phi[name][0], theta[name])]
        ['head.weight', 'head.bias']
    """

    _: KW_ONLY
    step_size: StepSize
    num_steps: int

    @classmethod
    def examples(cls, *given: Any) -> list[ANIL]:
        """Three steps of the head."""
        return [cls(given[0].features, given[0].loss, step_size=0.3, num_steps=3)]

    def __post_init__(self) -> None:
        check_integer("num_steps", self.num_steps, 0)
        check_step_size(self.step_size)

    def adapt(self, theta: PyTree, support: PyTree) -> PyTree:
        """Theta with an adapted head, with the graph of every inner step."""
        phi, features, targets = self._start(theta, support)
        steps = MAML(self._head_loss, step_size=self.step_size, num_steps=self.num_steps)
        return phi | steps.adapt({name: theta[name] for name in self.head}, (features, targets))

    def parameters(self) -> list[torch.Tensor]:
        """The tensors of a learned step size."""
        return learned_tensors(self.step_size)


@dataclass(frozen=True, eq=False)
class ProtoNet(_LinearHead):
    """Prototypical network: an example belongs to the class whose mean support feature is nearest. No inner steps.

    Softmax over ``-||f - c_k||²`` is softmax over ``2 c_k'f - ||c_k||²``, because ``||f||²`` is the same for every
    class. So adaptation writes ``W_k = 2 c_k`` and ``b_k = -||c_k||²`` into the linear head, and the adapted network is
    used like that of every other method. The head of theta is read for its shape only, and gets no gradient.

    Args:
        features, head: as in :class:`ANIL`.
        loss: ``loss(logits, labels) -> [B]``; the paper's is ``il.fewshot.task_cross_entropy``. Labels are integers.

    Raises:
        ValueError: a class without a support example, a head that theta does not have, or features of another shape.

    Source: Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning", NeurIPS 2017, section 2.4.

    Example:
        >>> import torch, implicitlayer as il
        >>> features = lambda params, inputs: inputs * params["scale"].unsqueeze(1)
        >>> theta = {"scale": torch.ones(1), "head.weight": torch.zeros(2, 1), "head.bias": torch.zeros(2)}
        >>> method = il.meta.ProtoNet(features, il.fewshot.task_cross_entropy)
        >>> phi = method.adapt(theta, (torch.tensor([[[1.0], [3.0], [-1.0]]]), torch.tensor([[0, 0, 1]])))
        >>> phi["head.weight"].flatten(), phi["head.bias"].flatten()  # the class means are 2 and -1
        (tensor([ 4., -2.]), tensor([-4., -1.]))
    """

    def adapt(self, theta: PyTree, support: PyTree) -> PyTree:
        """Theta with the head that classifies by the nearest class mean."""
        phi, features, labels = self._start(theta, support)
        weight, bias = self.head
        members = torch.nn.functional.one_hot(labels, len(theta[weight])).mT.to(features.dtype)  # [B, N, K]
        counts = members.sum(-1, keepdim=True)
        if not counts.all():
            task, way = (counts.squeeze(-1) == 0).nonzero()[0].tolist()
            raise ValueError(
                f"Class {way} of task {task} has no support example, so it has no prototype: sample tasks in which "
                "every class has one."
            )
        prototypes = members @ features / counts
        return phi | {weight: 2 * prototypes, bias: -prototypes.square().sum(-1)}
