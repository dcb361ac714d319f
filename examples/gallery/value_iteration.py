"""Rewards from behaviour: a soft value iteration as a fixed point, inverted by its gradient.

An agent on a 5 x 5 grid moves by a softmax of its action values, Q = r + 0.9 E[V(next)], V = log sum exp Q. V is the
fixed point of a contraction; Anderson acceleration finds it, and il.fixed_point differentiates it. From 400 observed
moves alone the rewards are learned by maximum likelihood.

    python examples/gallery/value_iteration.py            # 10 seconds; picture in runs/gallery/value_iteration.png
    python examples/gallery/value_iteration.py --smoke    # fewer steps
"""

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import implicitlayer as il

SMOKE = "--smoke" in sys.argv
FIGURE = Path("runs/gallery/value_iteration.png")
SIDE, DISCOUNT, SLIP = 5, 0.9, 0.1  # cells a side; a move goes astray with this probability
MOVES, STEPS = 400, 40 if SMOKE else 120
float64 = {"dtype": torch.float64}
generator = torch.Generator().manual_seed(0)

# %% The world: P[action, cell, next cell]; walls keep the agent where it is
cells = [(row, column) for row in range(SIDE) for column in range(SIDE)]
place = lambda r, c: min(max(r, 0), SIDE - 1) * SIDE + min(max(c, 0), SIDE - 1)  # noqa: E731
certain = torch.zeros(4, len(cells), len(cells), **float64)
for action, (down, right) in enumerate([(-1, 0), (1, 0), (0, -1), (0, 1)]):
    for cell, (r, c) in enumerate(cells):
        certain[action, cell, place(r + down, c + right)] = 1.0
P = (1 - SLIP) * certain + SLIP * certain.mean(0)


# %% The layer: V = T(V, rewards)
def action_values(V: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    return rewards + DISCOUNT * P @ V  # [actions, cells]


values = il.fixed_point(
    lambda V, rewards: action_values(V, rewards).logsumexp(0), il.solvers.AndersonAcceleration(rtol=1e-10)
)
log_policy = lambda rewards: action_values(values(torch.zeros(len(cells), **float64), rewards), rewards).log_softmax(0)  # noqa: E731

# %% The gradient against central differences: truncation h^2, rounding 1e-10 / h
true_rewards = torch.zeros(len(cells), **float64)
true_rewards[place(0, 4)], true_rewards[place(2, 2)], true_rewards[place(4, 0)] = 2.0, -3.0, 1.0
leaf = true_rewards.clone().requires_grad_()
(slope,) = torch.autograd.grad(log_policy(leaf)[0, 7], leaf)
h = 1e-4 * torch.eye(len(cells), **float64)
difference = torch.stack([(log_policy(leaf + e)[0, 7] - log_policy(leaf - e)[0, 7]).detach() / 2e-4 for e in h])
error = float((slope - difference).norm() / slope.norm())
print(f"gradient through the fixed point against differences: {error:.1e}, relative")

# %% Observed moves, and the rewards that explain them best
with torch.no_grad():
    expert = log_policy(true_rewards).exp()
where = torch.randint(len(cells), (MOVES,), generator=generator)
moves = torch.multinomial(expert.T[where], 1, generator=generator)[:, 0]

rewards = torch.zeros(len(cells), **float64, requires_grad=True)
optimizer = torch.optim.Adam([rewards], lr=0.1)
curve = []
for _ in range(STEPS):
    optimizer.zero_grad()
    log_pi = log_policy(rewards)
    loss = -log_pi[moves, where].mean() + 0.01 * (rewards**2).mean()
    loss.backward()
    optimizer.step()
    divergence = (expert * (expert.log() - log_pi.detach())).sum(0).mean()
    curve.append(float(divergence))
print(f"divergence from the expert's policy: {curve[0]:.4f} at no rewards, {curve[-1]:.4f} after {STEPS} steps")

# %% The picture
fig, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for axis, (title, shown) in zip(axes, [("true rewards", true_rewards), ("learned", rewards.detach())], strict=False):
    centred = (shown - shown.mean()).reshape(SIDE, SIDE)
    axis.imshow(centred, cmap="RdBu", vmin=-2.5, vmax=2.5)
    axis.set(title=title, xticks=[], yticks=[])
policy = log_policy(rewards.detach()).exp()
for axis, pi in zip(axes, (expert, policy), strict=False):
    for cell, (r, c) in enumerate(cells):
        up, down, left, right = pi[:, cell].tolist()
        axis.arrow(c, r, 0.4 * (right - left), 0.4 * (down - up), head_width=0.12, color="k", lw=0.8)
axes[2].semilogy(curve, color="C3")
axes[2].set(xlabel="steps", title="divergence from the expert's policy")
FIGURE.parent.mkdir(parents=True, exist_ok=True)
fig.savefig(FIGURE, dpi=110)
print(f"picture: {FIGURE}")

# %%
assert error < 1e-5
assert curve[-1] < (0.6 if SMOKE else 0.15) * curve[0]
