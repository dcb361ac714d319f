"""Deblurring with total variation, its weight learned on one picture and used on another.

The restored picture minimises 1/2 |blur(x) - y|^2 + weight * sum sqrt(|grad x|^2 + 0.01^2). The weight is learned by
il.bilevel on a pair of pictures whose sharp version is known. On another picture it does better than weights three
times as large or small.

    python examples/gallery/total_variation.py            # half a minute; picture in runs/gallery/total_variation.png
    python examples/gallery/total_variation.py --smoke    # smaller pictures
"""

# %%
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import implicitlayer as il

SMOKE = "--smoke" in sys.argv
FIGURE = Path("runs/gallery/total_variation.png")
SIDE, NOISE = 16 if SMOKE else 32, 0.05
float64 = {"dtype": torch.float64}
generator = torch.Generator().manual_seed(0)
row, column = torch.meshgrid(
    torch.linspace(-1, 1, SIDE, **float64), torch.linspace(-1, 1, SIDE, **float64), indexing="ij"
)

# %% Two pictures of simple shapes
first = ((row.abs() < 0.6) & (column.abs() < 0.35)).double() + 0.5 * ((row**2 + column**2) < 0.25).double()
second = ((row - 0.2) ** 2 + (column + 0.2) ** 2 < 0.3).double() + 0.7 * ((row + column).abs() < 0.25).double()

# %% Blur, and what is seen
line = torch.exp(-0.5 * torch.linspace(-2, 2, 5, **float64) ** 2)
kernel = (line[:, None] * line / line.sum() ** 2)[None, None]
blur = lambda x: torch.nn.functional.conv2d(x[None, None], kernel, padding=2)[0, 0]  # noqa: E731
seen = [blur(x) + NOISE * torch.randn(SIDE, SIDE, **float64, generator=generator) for x in (first, second)]


# %% The layer: theta is the picture seen and the weight's logarithm
def objective(x: torch.Tensor, y: torch.Tensor, log_weight: torch.Tensor) -> torch.Tensor:
    down, right = x.diff(dim=0)[:, :-1], x.diff(dim=1)[:-1]
    variation = (down**2 + right**2 + 1e-4).sqrt().sum()
    return 0.5 * ((blur(x) - y) ** 2).sum() + log_weight.exp() * variation


solver = il.solvers.LBFGS(max_steps=2000, rtol=1e-5)
decibels = lambda x, truth: float(-10 * ((x - truth) ** 2).mean().log10())  # noqa: E731
result = il.bilevel(
    lambda x, log_weight: ((x - first) ** 2).mean(),
    il.argmin(lambda x, log_weight: objective(x, seen[0], log_weight), solver),
    torch.tensor(-6.0, **float64),
    init=seen[0],
    optimizer=partial(torch.optim.Adam, lr=0.3),
    max_steps=20 if SMOKE else 30,
    rtol=3e-2,
)
print(result.explain())
weight = float(result.theta.exp())

# %% On the other picture
restored = {
    f: solver(objective, seen[1], seen[1], result.theta + torch.tensor(f, **float64).log()) for f in (1 / 3, 1, 3)
}
scores = {f: decibels(x, second) for f, x in restored.items()}
print(f"weight {weight:.4f}; the other picture, in decibels: blurred {decibels(seen[1], second):.2f}, restored")
print(", ".join(f"{score:.2f} with {f:.2g} times that weight" for f, score in scores.items()))

# %% The picture
fig, axes = plt.subplots(1, 4, figsize=(11, 3.3), layout="constrained")
shown = {"blurred": seen[1], "weight / 3": restored[1 / 3], "learned weight": restored[1], "weight × 3": restored[3]}
for axis, (name, x) in zip(axes, shown.items(), strict=True):
    axis.imshow(x, cmap="gray", vmin=-0.2, vmax=1.7)
    axis.set(title=f"{name}, {decibels(x, second):.1f} dB", xticks=[], yticks=[])
FIGURE.parent.mkdir(parents=True, exist_ok=True)
fig.savefig(FIGURE, dpi=110)
print(f"picture: {FIGURE}")

# %%
assert scores[1] > decibels(seen[1], second) + 2
assert scores[1] > max(scores[1 / 3], scores[3])
