"""The pictures of a run folder: learning curves, and one test episode with what the adapted network says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from implicitlayer.meta import plot_episode, plot_learning_curves

_MOST = 5  # query pictures of each class that are drawn


def draw(
    folder: Path,
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    episode: tuple[Any, Any],
    logits: torch.Tensor,
) -> list[str]:
    """Write ``curves.png`` and ``episode.png``.

    Args:
        folder: where.
        histories: the history of a trainer for each name.
        episode: (support, query) of one task, without a leading number of tasks.
        logits: [Q, N], of the query pictures.

    Returns:
        The names of the files; none where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    num_ways = logits.shape[1]
    figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
    plot_learning_curves(axes, histories, chance=1 / num_ways)
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)

    (support, _), (query, labels) = episode
    kept = torch.cat([(labels == way).nonzero().flatten()[:_MOST] for way in range(num_ways)])
    figure, axes = plt.subplots(figsize=(7, 1 + 0.85 * num_ways), layout="constrained")
    pictures = (_ink(support).cpu(), _ink(query[kept]).cpu())
    plot_episode(axes, *pictures, labels[kept].cpu(), logits[kept].softmax(-1).cpu())
    figure.savefig(folder / "episode.png", dpi=120)
    plt.close(figure)
    return ["curves.png", "episode.png"]


def _ink(images: torch.Tensor) -> torch.Tensor:
    """Pictures [K, 1, H, W] with ink high: colour pictures become grey, the bright parts paper."""
    return images if images.shape[1] == 1 else 1 - images.mean(1, keepdim=True)
