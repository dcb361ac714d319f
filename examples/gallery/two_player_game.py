"""A game of two players as a root: a tax chosen by the gradient through their equilibrium.

Two firms sell quantities q1 and q2 of one good at the price exp(-(q1 + q2)), each at a cost per unit and a tax per
unit, and each chooses what is best for itself. In equilibrium neither gains by moving alone: d profit_1/dq1 =
d profit_2/dq2 = 0. That is no minimum of anything (its Jacobian is not symmetric), but a root. The state wants the tax
at which the harm of the good, 0.35 for each unit, is balanced against what buyers and firms gain, and goes there by the
gradient through the equilibrium.

    python examples/gallery/two_player_game.py            # 10 seconds; picture in runs/gallery/two_player_game.png
    python examples/gallery/two_player_game.py --smoke    # fewer steps
"""

# %%
import argparse
from pathlib import Path

import torch

import implicitlayer as il

COSTS = (0.10, 0.15)
HARM = 0.35  # of each unit, for everybody
STEPS, RATE = 60, 0.2
float64 = {"dtype": torch.float64}


# %%
def profits(q1: torch.Tensor, q2: torch.Tensor, tax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    price = torch.exp(-(q1 + q2))
    return (price - COSTS[0] - tax) * q1, (price - COSTS[1] - tax) * q2


def stationarity(q: torch.Tensor, tax: torch.Tensor) -> torch.Tensor:
    """Each firm's profit, differentiated in its own quantity."""
    first = torch.func.grad(lambda own: profits(own, q[1], tax)[0])(q[0])
    second = torch.func.grad(lambda own: profits(q[0], own, tax)[1])(q[1])
    return torch.stack([first, second])


def welfare(q: torch.Tensor) -> torch.Tensor:
    """What all units are worth to their buyers (the area under the price) less costs and harm; the tax is no loss."""
    return 1 - torch.exp(-q.sum()) - COSTS[0] * q[0] - COSTS[1] * q[1] - HARM * q.sum()


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="fewer steps")
    parser.add_argument("--figure", type=Path, default=Path("runs/gallery/two_player_game.png"))
    options = parser.parse_known_args()[0]  # a notebook has arguments of its own
    steps = 25 if options.smoke else STEPS

    game = il.root(stationarity, il.solvers.Newton(rtol=1e-12))
    start = torch.full((2,), 0.5, **float64)
    equilibrium = lambda tax: game(start, tax)  # noqa: E731

    zero, h = torch.tensor(0.0, **float64), 1e-6
    slope = torch.func.jacrev(equilibrium)(zero)
    difference = (equilibrium(zero + h) - equilibrium(zero - h)) / (2 * h)
    print(f"dq/dtax at no tax: {slope.tolist()}, by differences {difference.tolist()}")

    tax = zero.clone().requires_grad_()
    trail = []
    for _ in range(steps):
        value = welfare(equilibrium(tax))
        (gradient,) = torch.autograd.grad(value, tax)
        trail.append((tax.item(), value.item(), gradient.item()))
        with torch.no_grad():
            tax += RATE * gradient
    q = equilibrium(tax.detach())
    print(
        f"welfare {trail[0][1]:.5f} without a tax, {trail[-1][1]:.5f} at the tax {trail[-1][0]:.4f}, "
        f"where its slope is {trail[-1][2]:.1e}"
    )
    rivals = torch.linspace(0, 3, 301, **float64)  # what each firm could do instead, alone
    alone = profits(rivals, q[1], tax.detach())[0].max(), profits(q[0], rivals, tax.detach())[1].max()
    gains = [float(best - own) for best, own in zip(alone, profits(q[0], q[1], tax.detach()), strict=True)]
    print(f"what a firm would gain by another quantity, alone: {gains[0]:.1e}, {gains[1]:.1e}")

    draw_figure(options.figure, equilibrium, trail)
    # a central difference errs by h^2/6 times a third derivative (below 1e3: 2e-10) and by rounding, 10 eps / h = 2e-9
    assert torch.allclose(slope, difference, rtol=1e-8, atol=1e-8)
    assert max(gains) <= 1e-12 and trail[-1][1] > trail[0][1]
    assert abs(trail[-1][2]) < (1e-2 if options.smoke else 1e-4) * abs(trail[0][2])


# %%
def draw_figure(figure: Path, equilibrium, trail) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    others = torch.linspace(0, 1.2, 60, **float64)
    for tax, alpha in ((trail[0][0], 0.35), (trail[-1][0], 1.0)):
        tax = torch.tensor(tax, **float64)
        answers = [best_answers(others, cost, tax) for cost in COSTS]
        label = "no tax" if alpha < 1 else f"tax {float(tax):.3f}"
        left.plot(answers[0], others, color="C0", alpha=alpha, label=f"best q1, {label}")
        left.plot(others, answers[1], color="C1", alpha=alpha, label=f"best q2, {label}")
        left.plot(*equilibrium(tax).tolist(), "ko", ms=5, alpha=alpha)
    left.set(xlabel="q1", ylabel="q2", xlim=(0, 1.2), ylim=(0, 1.2), title="best answers, and where they meet")
    left.legend(frameon=False, fontsize=8, loc="upper right")
    taxes = torch.linspace(-0.02, 0.4, 60, **float64)
    right.plot(taxes, torch.func.vmap(lambda t: welfare(equilibrium(t)))(taxes), color="0.4")
    right.plot([t for t, _, _ in trail], [w for _, w, _ in trail], "o", color="C3", ms=4)
    right.set(xlabel="tax per unit", ylabel="welfare", title="gradient steps through the equilibrium")
    figure.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(figure, dpi=110)
    print(f"picture: {figure}")


def best_answers(others: torch.Tensor, cost: float, tax: torch.Tensor) -> torch.Tensor:
    """What one firm does for each quantity of the other: a root again, all of them at once."""
    answer = il.root(lambda own, other: (1 - own) * torch.exp(-own - other) - cost - tax, il.solvers.Newton(rtol=1e-12))
    return torch.func.vmap(lambda other: answer(torch.full((), 0.5, **float64), other))(others)


# %%
if __name__ == "__main__":
    main()
