"""Points flow to a ring: Sinkhorn's iteration as a fixed point, and the gradient of the transport cost through it.

The plan P of entropic optimal transport comes from a potential f that is the fixed point of Sinkhorn's iteration. The
"sharp" cost <P, C> has no envelope theorem: its gradient in the points needs df/dpoints, which il.fixed_point takes
from one linear solve. The same gradient by back-propagation through 2,000 iterations is the check.

    python examples/gallery/optimal_transport.py            # 15 seconds; picture in runs/gallery/optimal_transport.png
    python examples/gallery/optimal_transport.py --smoke    # fewer steps
"""

# %%
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import implicitlayer as il

SMOKE = "--smoke" in sys.argv
FIGURE = Path("runs/gallery/optimal_transport.png")
POINTS, EPSILON = 40, 0.1
STEPS, RATE = 10 if SMOKE else 25, 4.0  # of the flow
float64 = {"dtype": torch.float64}
generator = torch.Generator().manual_seed(0)

# %% Two clouds with equal masses
source = 0.3 * torch.randn(POINTS, 2, **float64, generator=generator)
angle = torch.arange(POINTS, **float64) * (2 * math.pi / POINTS)
target = torch.stack([angle.cos(), angle.sin()], 1)


# %% One round of Sinkhorn's iteration on f; a constant in f changes nothing, so it is taken out
def potentials(f: torch.Tensor, C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    g = -EPSILON * ((f[:, None] - C) / EPSILON - math.log(POINTS)).logsumexp(0)
    return -EPSILON * ((g - C) / EPSILON - math.log(POINTS)).logsumexp(1), g


def sinkhorn(f: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    f = potentials(f, C)[0]
    return f - f.mean()


layer = il.fixed_point(sinkhorn, il.solvers.AndersonAcceleration(rtol=1e-10, max_steps=2000))


def transport_cost(points: torch.Tensor, f: torch.Tensor | None = None) -> torch.Tensor:
    C = ((points[:, None] - target) ** 2).sum(-1)
    f = layer(torch.zeros(POINTS, **float64), C) if f is None else f
    f, g = potentials(f, C)
    plan = ((f[:, None] + g - C) / EPSILON).exp() / POINTS**2
    return (plan * C).sum()


# %% The gradient, against back-propagation through the iteration
points = source.clone().requires_grad_()
(gradient,) = torch.autograd.grad(transport_cost(points), points)
f = torch.zeros(POINTS, **float64)
for _ in range(200 if SMOKE else 2000):
    f = sinkhorn(f, ((points[:, None] - target) ** 2).sum(-1))
(unrolled,) = torch.autograd.grad(transport_cost(points, f), points)
error = float((gradient - unrolled).norm() / unrolled.norm())
print(f"gradient of the cost against back-propagation through the iteration: {error:.1e}, relative")

# %% The flow
trail, costs = [source], []
for _ in range(STEPS):
    points = trail[-1].clone().requires_grad_()
    cost = transport_cost(points)
    (gradient,) = torch.autograd.grad(cost, points)
    costs.append(float(cost.detach()))
    trail.append(points.detach() - RATE * gradient)
print(f"transport cost {costs[0]:.3f} at the start, {costs[-1]:.4f} after {STEPS} steps")

# %% The picture
path = torch.stack(trail)
fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.6), layout="constrained")
left.plot(path[:, :, 0], path[:, :, 1], color="0.8", lw=0.8)
left.plot(*source.T, "o", ms=4, color="C0", label="start")
left.plot(*target.T, "x", ms=5, color="k", label="target")
left.plot(*trail[-1].T, "o", ms=4, color="C3", label="end")
left.set(aspect="equal", title="points move along the gradient")
left.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
right.semilogy(costs, color="C3")
right.set(xlabel="steps", title="transport cost")
FIGURE.parent.mkdir(parents=True, exist_ok=True)
fig.savefig(FIGURE, dpi=110)
print(f"picture: {FIGURE}")

# %%
assert error < 1e-6
assert costs[-1] < (0.5 if SMOKE else 0.15) * costs[0]
