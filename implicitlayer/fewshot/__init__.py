"""Few-shot data and networks."""

from implicitlayer.fewshot._classification import ClassificationLoss, inductive_logits
from implicitlayer.fewshot._dataset import DatasetError, ImageClasses
from implicitlayer.fewshot._episodes import EpisodeBatch, EpisodeSampler, Sinusoids
from implicitlayer.fewshot._glyphs import Glyphs
from implicitlayer.fewshot._mini_imagenet import MiniImageNet
from implicitlayer.fewshot._networks import Conv4, conv4, task_accuracy, task_cross_entropy, task_mean_squared_error
from implicitlayer.fewshot._omniglot import Omniglot
from implicitlayer.fewshot._parameters import MLP, mlp

__all__ = [
    "MLP", "ClassificationLoss", "Conv4", "DatasetError", "EpisodeBatch", "EpisodeSampler", "Glyphs",
    "ImageClasses", "MiniImageNet", "Omniglot", "Sinusoids", "conv4", "inductive_logits", "mlp", "task_accuracy",
    "task_cross_entropy", "task_mean_squared_error",
]  # fmt: skip
