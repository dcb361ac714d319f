"""A portfolio inside a network: trained on the decision, not on the forecast.

A linear network forecasts the returns of five assets, and a layer (a quadratic program) makes the portfolio of them:
weights on the simplex that maximise forecast'x - risk/2 x'Sx. The true returns are no linear function of the features,
so no forecast of this network is right everywhere. Trained on its squared error it is right on average; trained through
the layer, on what the portfolio is worth, it errs where that costs little.

    python examples/gallery/portfolio_network.py            # 10 seconds; picture in runs/gallery/portfolio_network.png
    python examples/gallery/portfolio_network.py --smoke    # few steps
"""

# %%
import argparse
from pathlib import Path

import torch

import implicitlayer as il

ASSETS, FEATURES = 5, 4
RISK = 2.0
BATCH, STEPS, LEARNING_RATE = 64, 300, 0.02
float64 = {"dtype": torch.float64}


# %%
class Market:
    """Features, and the mean returns that they imply: linear, with a bend."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.linear = torch.randn(FEATURES, ASSETS, **float64, generator=self.generator)
        self.bend = torch.randn(FEATURES, ASSETS, **float64, generator=self.generator)
        factor = torch.randn(ASSETS, ASSETS, **float64, generator=self.generator)
        self.covariance = 0.5 * factor @ factor.T / ASSETS + 0.5 * torch.eye(ASSETS, **float64)

    def sample(self, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.randn(num, FEATURES, **float64, generator=self.generator)
        return features, features @ self.linear * 0.3 + (features**2 - 1) @ self.bend * 0.5


def portfolio(forecast: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Weights [B, assets] on the simplex: one quadratic program for each row."""
    ones = torch.ones(1, ASSETS, **float64)
    return il.qp(
        RISK * covariance, -forecast, ones, ones[0, :1], -torch.eye(ASSETS, **float64), torch.zeros(ASSETS, **float64)
    )


def worth(x: torch.Tensor, returns: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """What the portfolios are worth under the true mean returns, on average."""
    return ((returns * x).sum(-1) - 0.5 * RISK * (x @ covariance * x).sum(-1)).mean()


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few steps")
    parser.add_argument("--figure", type=Path, default=Path("runs/gallery/portfolio_network.png"))
    options = parser.parse_known_args()[0]  # a notebook has arguments of its own
    steps = 60 if options.smoke else STEPS

    market = Market(seed=0)
    S = market.covariance
    features, returns = market.sample(1000)  # to be judged on
    best = float(worth(portfolio(returns, S), returns, S))

    curves = {}
    for name in ("squared error of the forecast", "worth of the portfolio"):
        torch.manual_seed(0)
        network = torch.nn.Linear(FEATURES, ASSETS, **float64)
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
        curve = []
        for step in range(steps + 1):
            if step % 20 == 0:
                with torch.no_grad():
                    curve.append((step, float(worth(portfolio(network(features), S), returns, S))))
            seen, seen_returns = market.sample(BATCH)
            if name.startswith("squared"):
                loss = ((network(seen) - seen_returns) ** 2).mean()
            else:
                loss = -worth(portfolio(network(seen), S), seen_returns, S)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curves[name] = curve
        print(f"trained on the {name:30s} worth {curve[-1][1]:.4f} of at most {best:.4f} (returns known beforehand)")

    draw_figure(options.figure, curves, best)
    on_forecast, on_decision = (curve[-1][1] for curve in curves.values())
    assert on_forecast < on_decision < best


# %%
def draw_figure(figure: Path, curves, best: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for (name, curve), colour in zip(curves.items(), ("0.5", "C3"), strict=True):
        axes.plot(*zip(*curve, strict=True), color=colour, label=f"trained on the {name}")
    axes.axhline(best, color="k", lw=0.8, ls=":", label="returns known beforehand")
    axes.set(xlabel=f"steps of {BATCH} days", ylabel="worth of the portfolio, 1000 new days")
    axes.legend(frameon=False, loc="lower right")
    figure.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(figure, dpi=110)
    print(f"picture: {figure}")


# %%
if __name__ == "__main__":
    main()
