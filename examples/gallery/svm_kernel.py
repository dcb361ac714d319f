"""A support vector machine as a quadratic program, and its kernel tuned by the gradient through it.

The dual of the machine is il.qp. The loss on held-out data is differentiated through its solution in the width of the
kernel and in C, both at once, and ends at least as low as a grid of 49 machines.

    python examples/gallery/svm_kernel.py            # 15 seconds; picture in runs/gallery/svm_kernel.png
    python examples/gallery/svm_kernel.py --smoke    # fewer steps, a smaller grid
"""

# %%
import math
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import softplus

import implicitlayer as il

SMOKE = "--smoke" in sys.argv
FIGURE = Path("runs/gallery/svm_kernel.png")
TRAINING, HELD_OUT, NOISE = 40, 200, 0.25
STEPS, GRID = (15, 3) if SMOKE else (60, 7)
float64 = {"dtype": torch.float64}
generator = torch.Generator().manual_seed(0)
# where a support vector comes or goes, the slope is that of one side: good enough for a descent
warnings.filterwarnings("ignore", category=il.KinkWarning)


# %% Two moons
def moons(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = math.pi * torch.rand(num, **float64, generator=generator)
    y = torch.sign(torch.arange(num, **float64) % 2 - 0.5)
    X = torch.stack([y * angle.cos() + 0.5 * (1 - y), y * angle.sin() + 0.25 * (1 - y)], 1)
    return X + NOISE * torch.randn(num, 2, **float64, generator=generator), y


(X, y), (X_held_out, y_held_out) = moons(TRAINING), moons(HELD_OUT)


# %% The machine: min 1/2 a'Qa - 1'a with 0 <= a <= C, y'a = 0; the offset comes from the support vectors
def kernel(A: torch.Tensor, B: torch.Tensor, log_width: torch.Tensor) -> torch.Tensor:
    return torch.exp(-((A[:, None] - B) ** 2).sum(-1) / (2 * (2 * log_width).exp()))


def machine(theta: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Decision values at ``points``; theta: logarithms of the width and of C."""
    K, C = kernel(X, X, theta[0]), theta[1].exp()
    eye, ones = torch.eye(TRAINING, **float64), torch.ones(TRAINING, **float64)
    Q = y[:, None] * K * y + 1e-6 * eye
    G, h = torch.cat([-eye, eye]), torch.cat([0 * ones, C * ones])
    a = il.qp(Q, -ones, y[None], torch.zeros(1, **float64), G, h)
    free = (a > 1e-4 * C) & (a < (1 - 1e-4) * C)  # on the margin: y_i (f(x_i) + b) = 1
    offset = (y - K @ (a * y))[free].mean() if bool(free.any()) else torch.zeros((), **float64)
    return kernel(points, X, theta[0]) @ (a * y) + offset


loss = lambda theta: softplus(-2 * y_held_out * machine(theta, X_held_out)).mean()  # noqa: E731

# %% The grid, and the descent
widths, strengths = torch.linspace(-2.5, 1.5, GRID, **float64), torch.linspace(-2, 4, GRID, **float64)
with torch.no_grad():
    grid = torch.stack([torch.stack([loss(torch.stack([w, c])) for w in widths]) for c in strengths])
theta = torch.tensor([1.0, 0.0], **float64, requires_grad=True)
optimizer = torch.optim.Adam([theta], lr=0.1)
trail = []
for _ in range(STEPS):
    optimizer.zero_grad()
    value = loss(theta)
    value.backward()
    trail.append((*theta.tolist(), float(value.detach())))
    optimizer.step()
best = min(trail, key=lambda entry: entry[2])
print(f"held-out loss {trail[0][2]:.4f} at the start, {best[2]:.4f} by gradients; ", end="")
print(f"best of {GRID**2} machines {grid.min():.4f}")

# %% The picture
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
shown = left.pcolormesh(widths, strengths, grid.log(), cmap="viridis_r", shading="nearest")
fig.colorbar(shown, label="log of the held-out loss")
left.plot([w for w, _, _ in trail], [c for _, c, _ in trail], "o-", color="C3", ms=3, lw=0.8)
left.set(xlabel="log width of the kernel", ylabel="log C", title="gradient steps over the grid")
a, b = torch.meshgrid(torch.linspace(-2, 3, 60, **float64), torch.linspace(-1.5, 2, 50, **float64), indexing="ij")
with torch.no_grad():
    f = machine(torch.tensor(best[:2], **float64), torch.stack([a, b], -1).reshape(-1, 2)).reshape(a.shape)
right.contourf(a, b, f, levels=[-10, 0, 10], colors=["C0", "C1"], alpha=0.25)
right.contour(a, b, f, levels=[-1, 0, 1], colors="k", linewidths=[0.6, 1.2, 0.6])
right.scatter(*X.T, c=["C1" if label > 0 else "C0" for label in y], s=14)
right.set(title="the machine found", xticks=[], yticks=[])
FIGURE.parent.mkdir(parents=True, exist_ok=True)
fig.savefig(FIGURE, dpi=110)
print(f"picture: {FIGURE}")

# %%
assert best[2] < (0.95 if SMOKE else 0.9) * trail[0][2]
assert best[2] < (1.1 if SMOKE else 1.01) * float(grid.min())
