"""A material's conductivity from five sensors: a physics-informed fit as the inner problem.

-k u'' + u^3 = f on [0, 1], u = 0 at both ends, f known and k not. The inner problem fits u, a sum of 8 sines, to the
equation at 60 points (a physics-informed loss); the outer one chooses k so that u agrees with the sensors. So the
physics is solved, not traded against the data by a weight.

    python examples/gallery/physics_informed.py            # seconds; picture in runs/gallery/physics_informed.png
    python examples/gallery/physics_informed.py --smoke    # the same
"""

# %%
import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import implicitlayer as il

FIGURE = Path("runs/gallery/physics_informed.png")
TRUTH, MODES = 0.5, 8
float64 = {"dtype": torch.float64}
points = torch.linspace(0, 1, 62, **float64)[1:-1]
frequency = math.pi * torch.arange(1, MODES + 1, **float64)
sines = torch.sin(points[:, None] * frequency)  # [points, modes]
exact = lambda x: torch.sin(math.pi * x) + 0.3 * torch.sin(3 * math.pi * x)  # noqa: E731
curvature = -(math.pi**2) * (torch.sin(math.pi * points) + 2.7 * torch.sin(3 * math.pi * points))
forcing = -TRUTH * curvature + exact(points) ** 3  # so that exact() solves the equation for the true k


# %%
def physics(weights: torch.Tensor, log_k: torch.Tensor) -> torch.Tensor:
    """Mean squared residual of the equation; the boundary holds by itself."""
    u, u_xx = sines @ weights, -sines @ (frequency**2 * weights)
    return ((-log_k.exp() * u_xx + u**3 - forcing) ** 2).mean()


sensors = torch.tensor([0.13, 0.31, 0.52, 0.68, 0.9], **float64)
measured = exact(sensors)
at_sensors = torch.sin(sensors[:, None] * frequency)
solve = il.argmin(physics, il.solvers.NewtonCG())
result = il.bilevel(
    lambda weights, log_k: ((at_sensors @ weights - measured) ** 2).mean(),
    solve,
    torch.tensor(0.7, **float64),  # k = 2
    init=torch.zeros(MODES, **float64),
    optimizer=partial(torch.optim.Adam, lr=0.1),
    rtol=1e-4,
)
k = float(result.theta.exp())
print(result.explain())
print(f"k = {k:.5f}, in truth {TRUTH}")

# %% The picture
with torch.no_grad():
    before = sines @ solve(torch.zeros(MODES, **float64), torch.tensor(0.7, **float64))
fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3), layout="constrained")
left.plot(points, exact(points), color="k", lw=3, alpha=0.25, label="truth")
left.plot(points, before, color="C0", ls=":", label="physics with k = 2")
left.plot(points, sines @ result.x, color="C3", label=f"k = {k:.3f}")
left.plot(sensors, measured, "ko", ms=5, label="sensors")
left.legend(frameon=False)
left.set(xlabel="place", ylabel="u")
right.semilogy([record["gradient_norm"] for record in result.history], color="C3")
right.set(xlabel="steps", title="norm of the gradient in log k")
FIGURE.parent.mkdir(parents=True, exist_ok=True)
fig.savefig(FIGURE, dpi=110)
print(f"picture: {FIGURE}")

# %%
assert result.status is il.Status.CONVERGED
assert abs(k - TRUTH) < 1e-3
