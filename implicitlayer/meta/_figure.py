"""Two pictures of a meta-learning run: learning curves over training time, and one episode with its predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

INK, PAPER, GRID = "#1f2328", "#ffffff", "#d8dee4"
SERIES = ("#1a6fb5", "#d1622b", "#5b8c3e", "#8250a8")  # told apart by lightness too
RIGHT, WRONG = "#2e7d32", "#c62828"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def plot_learning_curves(
    axes: Any, histories: Mapping[str, Sequence[Mapping[str, Any]]], *, chance: float | None = None, window: int = 100
) -> None:
    """Draw query accuracy over minutes of training: training tasks thin (running mean), validation tasks as dots.

    Args:
        axes: matplotlib axes.
        histories: the history of a :class:`Trainer` for each name in the legend.
        chance: accuracy of guessing, drawn as a dotted line.
        window: steps in the running mean.
    """
    latest = 0.0
    for (name, history), colour in zip(histories.items(), SERIES, strict=False):
        records = [record for record in history if "accuracy" in record]
        minutes = torch.tensor([record["seconds"] / 60 for record in records])
        accuracy = torch.tensor([record["accuracy"] for record in records])
        total = torch.cat([torch.zeros(1), accuracy.cumsum(0)])
        last = torch.arange(1, len(records) + 1)
        first = (last - window).clamp_min(0)
        mean = (total[last] - total[first]) / (last - first)
        skip = min(10, max(0, len(records) - 2))  # the first means are over a handful of tasks
        axes.plot(minutes[skip:].numpy(), 100 * mean[skip:].numpy(), color=colour, linewidth=1, alpha=0.55)
        points = [record for record in history if "validation" in record]
        axes.errorbar(
            [record["seconds"] / 60 for record in points],
            [100 * record["validation"] for record in points],
            yerr=[100 * record["validation_interval"] for record in points],
            label=name,
            clip_on=False,  # a point on the border is a whole one
            color=colour,
            marker="o",
            markersize=4,
            linewidth=1.8,
            capsize=2,
        )
        latest = max([latest, *minutes.tolist(), *(record["seconds"] / 60 for record in points)])
    if chance is not None:
        axes.axhline(100 * chance, color=INK, linewidth=1, linestyle=":")
        across = axes.get_yaxis_transform()  # at the left, where no legend is
        axes.text(0.005, 100 * chance + 1, "chance", color=INK, fontsize=8, transform=across)
    axes.set(xlabel="minutes of training", ylabel="accuracy on the query set, %", ylim=(0, 100))
    axes.set_xlim(0, 1.05 * latest or 1)
    title = "Learning curves: validation classes (dots, ± 95 %), training classes (thin)"
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center right", frameon=False)


def plot_episode(
    axes: Any, support: torch.Tensor, query: torch.Tensor, labels: torch.Tensor, probabilities: torch.Tensor
) -> None:
    """Draw one episode: a row per class, its support images left, its query images with their predictions right.

    Args:
        axes: matplotlib axes.
        support: images [N·K, 1, H, W], in the order of the classes.
        query, labels: images [Q, 1, H, W] and their classes [Q].
        probabilities: [Q, N] of the adapted classifier.
    """
    num_ways = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    num_shots = support.shape[0] // num_ways
    size, gap, split = support.shape[-1], 8, 20
    axes.set_title("One test episode: predicted class, probability", fontsize=10, loc="left")
    num_columns = math.ceil(len(labels) / num_ways)
    for row in range(num_ways):
        top = row * (size + 2 * gap)
        for column in range(num_shots):
            left = column * (size + gap)
            _image(axes, support[row * num_shots + column, 0], left, top, INK)
        axes.text(-gap, top + size / 2, LETTERS[row % 26], ha="right", va="center", color=INK)
        for column, index in enumerate((labels == row).nonzero().flatten().tolist()):
            left = num_shots * (size + gap) + split + column * (size + gap)
            colour = RIGHT if predicted[index] == row else WRONG
            _image(axes, query[index, 0], left, top, colour)
            word = f"{LETTERS[int(predicted[index]) % 26]} {probabilities[index].max():.0%}"
            axes.text(left + size / 2, top + size + 1, word, ha="center", va="top", fontsize=8, color=colour)
    width = num_shots * (size + gap) + split + num_columns * (size + gap)
    height = num_ways * (size + 2 * gap)
    axes.text((num_shots * (size + gap) - gap) / 2, -5, "support", ha="center", fontsize=8, color=INK)
    axes.text(width / 2 + (num_shots * (size + gap) + split) / 2, -5, "query", ha="center", fontsize=8, color=INK)
    axes.set(xlim=(-3 * gap, width), ylim=(height, -2 * gap), aspect="equal")
    axes.axis("off")


def _image(axes: Any, image: torch.Tensor, left: float, top: float, colour: str) -> None:
    height, width = image.shape
    right, bottom = left + width, top + height
    picture = (1 - image.float()).numpy()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(left, right, bottom, top), zorder=1)
    frame = [left, right, right, left, left], [top, top, bottom, bottom, top]
    axes.plot(*frame, color=colour, linewidth=1.2, zorder=2)
