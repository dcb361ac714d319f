"""A deep equilibrium model, and what Jacobian regularisation buys: an easier equilibrium, and an accuracy that holds.

z = tanh(W z + u(x)) is solved by Anderson's acceleration for each point, and trained through il.DeepEquilibrium
(memory of one evaluation, whatever the steps). Two models, the same seed; one is also asked for a small Jacobian at its
equilibrium.

    python examples/gallery/deq_training.py            # half a minute; picture in runs/gallery/deq_training.png
    python examples/gallery/deq_training.py --smoke    # fewer steps
"""

# %%
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import implicitlayer as il

SMOKE = "--smoke" in sys.argv
FIGURE = Path("runs/gallery/deq_training.png")
POINTS, WIDTH, STEPS = 240, 24, 25 if SMOKE else 100
REGULARISATION = 20.0  # of the squared Frobenius norm of the Jacobian, per unit

# %% Three spirals
generator = torch.Generator().manual_seed(0)
label = torch.arange(POINTS) % 3
radius = 0.2 + 0.8 * torch.rand(POINTS, generator=generator)
angle = 2 * math.pi * label / 3 + 3 * radius + 0.1 * torch.randn(POINTS, generator=generator)
data = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


# %% The model
class Cell(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(z) + u)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inject, self.cell, self.read = torch.nn.Linear(2, WIDTH), Cell(), torch.nn.Linear(WIDTH, 3)
        solver = il.solvers.AndersonAcceleration(rtol=1e-4, max_steps=30)
        # "ignore": without regularisation some points have no equilibrium that the solver finds, which is to be shown
        self.equilibrium = il.DeepEquilibrium(
            self.cell, solver=solver, linear_solver=il.Gmres(rtol=1e-3, max_steps=30), on_failure="ignore"
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and an estimate of |J|^2 / width at the equilibrium."""
        u = self.inject(4 * x)
        z = self.equilibrium(u)
        return self.read(z), self.equilibrium.jacobian_norm(z, u)


# %% Training; now and then, how far from the equilibrium ten steps of the solver end
@torch.no_grad()
def rest(model: Model) -> float:
    """Median over the points of |f(z) - z| / |z|."""
    u = model.inject(4 * data)
    z = il.solvers.AndersonAcceleration(max_steps=10, batch_dims=1)(model.cell, torch.zeros_like(u), u)
    return float(((model.cell(z, u) - z).norm(dim=1) / z.norm(dim=1)).median())


histories, models = {}, {}
for weight in (0.0, REGULARISATION):
    torch.manual_seed(0)
    model = models[weight] = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history = histories[weight] = []
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        logits, jacobian = model(data)
        if step % 5 == 0:
            history.append((step, rest(model), float((logits.argmax(1) == label).double().mean())))
        (torch.nn.functional.cross_entropy(logits, label) + weight * jacobian).backward()
        optimizer.step()
    _, residual, accuracy = history[-1]
    print(f"weight {weight:4.1f}: residual after ten steps of the solver {residual:.1e}, accuracy {accuracy:.3f}")

# %% The picture
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for (weight, history), colour in zip(histories.items(), ("0.5", "C3"), strict=True):
    steps, residuals, _ = zip(*history, strict=True)
    left.semilogy(steps, residuals, color=colour, label=f"weight of the Jacobian {weight:g}")
left.set(xlabel="training steps", title="residual after ten steps of the solver")
left.legend(frameon=False)
a, b = torch.meshgrid(torch.linspace(-1.1, 1.1, 60), torch.linspace(-1.1, 1.1, 60), indexing="ij")
guess = models[REGULARISATION](torch.stack([a, b], -1).reshape(-1, 2))[0].argmax(1).reshape(a.shape)
right.contourf(a, b, guess, levels=[-0.5, 0.5, 1.5, 2.5], colors=["C0", "C1", "C2"], alpha=0.3)
right.scatter(*data.T, c=[f"C{k}" for k in label.tolist()], s=8)
right.set(aspect="equal", xticks=[], yticks=[], title="classes of the regularised model")
FIGURE.parent.mkdir(parents=True, exist_ok=True)
fig.savefig(FIGURE, dpi=110)
print(f"picture: {FIGURE}")

# %%
(_, plain, plain_accuracy), (_, residual, accuracy) = (history[-1] for history in histories.values())
assert residual < (0.8 if SMOKE else 0.3) * plain
assert accuracy > (0.5 if SMOKE else 0.95)
