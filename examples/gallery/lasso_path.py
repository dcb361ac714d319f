"""The path of a lasso, its exact slope everywhere, and the strength tuned by gradients on held-out data.

Sixty lassos, one per strength, are solved and differentiated in one call (vmap). The slope of the path is known in
closed form: with S the entries that are not zero, dw_S/dstrength = -(X_S'X_S / n)^-1 sign(w_S), and zero elsewhere.

    python examples/gallery/lasso_path.py            # seconds on one core; picture in runs/gallery/lasso_path.png
    python examples/gallery/lasso_path.py --smoke    # fewer strengths and steps
"""

# %%
import argparse
from pathlib import Path

import torch

import implicitlayer as il

NUM_FEATURES, NUM_RELEVANT = 10, 3
NUM_TRAINING, NUM_HELD_OUT = 40, 200
NOISE = 1.0
STRENGTHS, STEPS = 60, 60  # points of the path, steps of the outer optimizer
float64 = {"dtype": torch.float64}


# %%
def draw(num: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    X = torch.randn(num, NUM_FEATURES, **float64, generator=generator)
    weights = torch.zeros(NUM_FEATURES, **float64)
    weights[:NUM_RELEVANT] = torch.tensor([2.0, -1.5, 1.0], **float64)
    return X, X @ weights + NOISE * torch.randn(num, **float64, generator=generator)


def closed_form_slope(w: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    slope, support = torch.zeros_like(w), w != 0
    gram = X[:, support].T @ X[:, support] / len(X)
    slope[support] = -torch.linalg.solve(gram, w[support].sign())
    return slope


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="fewer strengths and steps")
    parser.add_argument("--figure", type=Path, default=Path("runs/gallery/lasso_path.png"))
    options = parser.parse_known_args()[0]  # a notebook has arguments of its own
    num_strengths, steps = (12, 15) if options.smoke else (STRENGTHS, STEPS)

    generator = torch.Generator().manual_seed(0)
    (X, y), (X_held_out, y_held_out) = draw(NUM_TRAINING, generator), draw(NUM_HELD_OUT, generator)
    lasso = il.argmin(
        lambda w, strength: 0.5 * ((X @ w - y) ** 2).mean(),
        il.solvers.ProximalGradient(rtol=1e-12),
        regularizer=lambda strength: il.L1(strength),
    )
    fit = lambda strength: lasso(torch.zeros(NUM_FEATURES, **float64), strength)  # noqa: E731
    held_out_error = lambda w: ((X_held_out @ w - y_held_out) ** 2).mean()  # noqa: E731

    strengths = torch.logspace(-3, 0.5, num_strengths, **float64)
    path = torch.func.vmap(fit)(strengths)  # [strengths, features]
    slopes = torch.func.vmap(torch.func.jacrev(fit))(strengths)
    expected = torch.stack([closed_form_slope(w, X) for w in path])
    worst = float((slopes - expected).norm(dim=1).max() / expected.norm(dim=1).max())
    print(f"{num_strengths} slopes of the path against the closed form: largest difference {worst:.1e}, relative")
    errors = torch.stack([held_out_error(w) for w in path])

    log_strength = torch.tensor(0.0, **float64, requires_grad=True)  # far from the best
    optimizer = torch.optim.Adam([log_strength], lr=0.2)
    trail = []
    for _ in range(steps):
        optimizer.zero_grad()
        error = held_out_error(fit(log_strength.exp()))
        error.backward()
        trail.append((log_strength.exp().item(), error.item()))
        optimizer.step()
    print(
        f"held-out error: {trail[0][1]:.3f} at strength {trail[0][0]:.2f}, {trail[-1][1]:.3f} at {trail[-1][0]:.3f} ",
        end="",
    )
    print(f"after {steps} steps; best of the path {errors.min():.3f}")

    draw_figure(options.figure, strengths, path, slopes, errors, trail)
    assert worst < 1e-8  # the linear solve stops at a residual of 1e-10, and the condition number is below 100
    assert trail[-1][1] < errors.min() * (1.1 if options.smoke else 1.01)  # as good as the best of the grid


# %%
def draw_figure(figure: Path, strengths, path, slopes, errors, trail) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for j in range(NUM_FEATURES):
        colour = f"C{j}" if j < NUM_RELEVANT else "0.75"
        left.semilogx(strengths, path[:, j], color=colour, lw=1.6)
        for i in range(3, len(strengths), 8):  # tangents: dw/dlog strength = strength dw/dstrength
            if path[i, j] != 0:
                step = torch.tensor([-0.25, 0.25], **float64)
                left.plot(strengths[i] * step.exp(), path[i, j] + slopes[i, j] * strengths[i] * step, "k", lw=1.1)
    left.set(
        xlabel="strength of the L1 norm", ylabel="weights", title="path and slopes (grey: features without effect)"
    )
    right.loglog(strengths, errors, color="0.4", label="along the path")
    right.plot(*zip(*trail, strict=True), "o-", color="C3", ms=3, lw=0.8, label="gradient steps")
    right.set(xlabel="strength of the L1 norm", ylabel="error on held-out data", title="tuned by its gradient")
    right.legend(frameon=False)
    figure.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(figure, dpi=110)
    print(f"picture: {figure}")


# %%
if __name__ == "__main__":
    main()
