"""What does the controller believe? A pendulum's parameters from the moves of an optimal controller.

The controller swings a pendulum up by the torques that minimise a cost over 25 steps, under its model (gravity over
length, friction). We see its torques only. The optimal torques are a layer, differentiable in the model's parameters,
so these are found by the gradient of the difference from the torques seen.

    python examples/gallery/trajectory_optimisation.py            # half a minute; picture in runs/gallery/
    python examples/gallery/trajectory_optimisation.py --smoke    # fewer steps
"""

# %%
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import implicitlayer as il

SMOKE = "--smoke" in sys.argv
FIGURE = Path("runs/gallery/trajectory_optimisation.png")
HORIZON, DT = 25, 0.1
STARTS = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [2.0, -1.0]], dtype=torch.float64)  # angle from upright, speed
TRUTH = torch.tensor([1.5, 0.3], dtype=torch.float64)  # gravity over length, friction
GUESS = torch.tensor([0.7, 0.1], dtype=torch.float64)


# %% Rollout and cost, all starts at once
def rollout(torques: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Angles [starts, steps]."""
    angle, speed, angles = STARTS[:, 0], STARTS[:, 1], []
    for t in range(HORIZON):
        speed = speed + DT * (model[0] * torch.sin(angle) - model[1] * speed + torques[:, t])
        angle = angle + DT * speed
        angles.append(angle)
    return torch.stack(angles, 1)


def cost(torques: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """One value for each start."""
    return (rollout(torques, model) ** 2).mean(1) + 0.05 * (torques**2).mean(1)


plan = il.argmin(cost, il.solvers.LBFGS(max_steps=500), batch_dims=1)
idle = torch.zeros(len(STARTS), HORIZON, dtype=torch.float64)
tight = il.argmin(cost, il.solvers.LBFGS(max_steps=500, rtol=1e-9), batch_dims=1)
with torch.no_grad():
    seen = tight(idle, TRUTH)

# %% The model that explains them
result = il.bilevel(
    lambda torques, model: ((torques - seen) ** 2).mean(),
    plan,
    GUESS,
    init=idle,
    optimizer=partial(torch.optim.Adam, lr=0.1),
    max_steps=25 if SMOKE else 150,
    rtol=1e-3,
)
error = (result.theta - TRUTH).abs()
print(result.explain())
print(f"model {[round(v, 4) for v in result.theta.tolist()]}, in truth {TRUTH.tolist()}")

# %% The picture
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
time = DT * torch.arange(1, HORIZON + 1)
with torch.no_grad():
    guessed = tight(idle, GUESS)
for k in range(len(STARTS)):
    left.plot(time, seen[k], color=f"C{k}", lw=2.5, alpha=0.4)
    left.plot(time, guessed[k], color=f"C{k}", ls=":")
    left.plot(time, result.x[k], color=f"C{k}", lw=1)
    middle.plot(time, rollout(result.x, TRUTH)[k], color=f"C{k}")
left.set(title="torques: seen, guessed (dots), learned", xlabel="time")
middle.set(title="angle from upright", xlabel="time")
right.semilogy([record["value"] for record in result.history], color="C3")
right.set(title="squared difference of torques", xlabel="steps")
FIGURE.parent.mkdir(parents=True, exist_ok=True)
fig.savefig(FIGURE, dpi=110)
print(f"picture: {FIGURE}")

# %%
assert float(error.max()) < (0.3 if SMOKE else 0.02)
assert float((GUESS - TRUTH).abs().max()) > 0.5
