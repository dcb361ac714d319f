"""One episode of implicit MAML: a sine from ten points, before and after meta-learning.

A small network is meta-learned on random sines: adaptation minimises the loss of ten points plus a pull to theta, and
the meta-gradient comes from the adapted weights alone (Rajeswaran et al. 2019). A new sine is then learned from ten
points.

    python examples/gallery/imaml_episode.py            # half a minute; picture in runs/gallery/imaml_episode.png
    python examples/gallery/imaml_episode.py --smoke    # fewer meta-steps
"""

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import implicitlayer as il

SMOKE = "--smoke" in sys.argv
FIGURE = Path("runs/gallery/imaml_episode.png")
WIDTH, STRENGTH, TASKS, META_STEPS = 40, 0.5, 8, 20 if SMOKE else 250
torch.manual_seed(0)


# %% The network: weights of all tasks at once, [tasks, ...]
def predict(phi: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    hidden = torch.tanh(x @ phi["w1"] + phi["b1"][:, None])
    hidden = torch.tanh(hidden @ phi["w2"] + phi["b2"][:, None])
    return hidden @ phi["w3"] + phi["b3"][:, None]


def task_loss(phi: dict[str, torch.Tensor], points: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = points
    return ((predict(phi, x) - y) ** 2).mean((1, 2))


sizes = {"w1": (1, WIDTH), "b1": (WIDTH,), "w2": (WIDTH, WIDTH), "b2": (WIDTH,), "w3": (WIDTH, 1), "b3": (1,)}
theta = {
    name: (
        torch.randn(size) / (size[0] ** 0.5 if len(size) > 1 else 1.0) * (1.0 if name != "b3" else 0.0)
    ).requires_grad_()
    for name, size in sizes.items()
}
untrained = {name: weight.detach().clone() for name, weight in theta.items()}

# %% Meta-training
method = il.meta.iMAML(task_loss, il.solvers.GradientDescent(step_size=0.03, max_steps=16), strength=STRENGTH)
sines = il.fewshot.Sinusoids(num_shots=10, num_query=20, seed=0)
optimizer = torch.optim.Adam(theta.values(), lr=3e-3)
losses = []
for _ in range(META_STEPS):
    optimizer.zero_grad()
    loss = method(theta, *sines.sample(TASKS)).mean()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))

# %% New sines
support, query = il.fewshot.Sinusoids(num_shots=10, num_query=50, seed=1).sample(100)
errors = {
    name: float(task_loss(method.adapt(start, support), query).mean().detach())
    for name, start in (("untrained", untrained), ("meta-learned", theta))
}
print(f"squared error on 100 new sines after adaptation: {errors}")

# %% The picture
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
left.plot(losses, color="C3")
left.set(xlabel="meta-steps", ylabel="query loss", title="meta-training")
grid = torch.linspace(-5, 5, 200)[None, :, None].expand(len(support[0]), -1, -1)
order = query[0][0, :, 0].argsort()
right.plot(query[0][0, order, 0], query[1][0, order, 0], color="k", lw=3, alpha=0.25, label="the sine")
for (name, start), colour in zip((("untrained", untrained), ("meta-learned", theta)), ("0.5", "C3"), strict=True):
    right.plot(grid[0, :, 0], predict(method.adapt(start, support), grid)[0, :, 0].detach(), color=colour, label=name)
right.plot(support[0][0, :, 0], support[1][0, :, 0], "ko", ms=4, label="ten points")
right.set(title="a new sine after adaptation")
right.legend(frameon=False, fontsize=8)
FIGURE.parent.mkdir(parents=True, exist_ok=True)
fig.savefig(FIGURE, dpi=110)
print(f"picture: {FIGURE}")

# %%
assert errors["meta-learned"] < (1.0 if SMOKE else 0.4) * errors["untrained"]
