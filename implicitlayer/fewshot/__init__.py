"""Few-shot data and networks."""

from implicitlayer.fewshot._dataset import DatasetError, ImageClasses
from implicitlayer.fewshot._episodes import EpisodeBatch, EpisodeSampler
from implicitlayer.fewshot._glyphs import Glyphs
from implicitlayer.fewshot._networks import Conv4, conv4, task_accuracy, task_cross_entropy
from implicitlayer.fewshot._omniglot import Omniglot

__all__ = [
    "Conv4",
    "DatasetError",
    "EpisodeBatch",
    "EpisodeSampler",
    "Glyphs",
    "ImageClasses",
    "Omniglot",
    "conv4",
    "task_accuracy",
    "task_cross_entropy",
]
