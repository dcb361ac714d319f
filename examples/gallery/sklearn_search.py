"""Penalties of scikit-learn's estimators by gradients, against a grid: how many fits to an equal held-out loss?

il.ImplicitSearchCV descends on the cross-validation loss. The grids have 5, 9, 17, ... values over eight decades (for
ElasticNet times as many ratios), on the same folds. Counted are the fits until the held-out loss is within 0.2 % of the
best that either found; what a grid of 65 does not reach counts as all of its fits.

    python examples/gallery/sklearn_search.py            # a minute; picture and numbers in runs/gallery/
    python examples/gallery/sklearn_search.py --smoke    # one data set
"""

# %%
import argparse
import json
from pathlib import Path

import numpy as np
import sklearn
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler

import implicitlayer as il

CASES = (  # the first one is run in the smoke setting
    ("breast cancer, logistic regression", load_breast_cancer, LogisticRegression(solver="newton-cholesky", tol=1e-8)),
    ("wine, logistic regression", load_wine, LogisticRegression(solver="newton-cholesky", tol=1e-8)),
    ("diabetes, ridge", load_diabetes, Ridge()),
    ("diabetes, lasso", load_diabetes, Lasso(max_iter=10_000)),
    ("diabetes, elastic net", load_diabetes, ElasticNet(max_iter=10_000)),
)
MOST_RATIOS = 17  # of ElasticNet: 1,445 fits
SIZES = (5, 9, 17, 33, 65)  # values of a penalty on a grid
WITHIN = 2e-3  # of the loss


# %%
def grids(estimator, X: np.ndarray, y: np.ndarray) -> list[tuple[int, float]]:
    """Fits and best held-out loss of each grid."""
    scoring = "neg_log_loss" if isinstance(estimator, LogisticRegression) else "neg_mean_squared_error"
    found = []
    for size in SIZES:
        grid = {"C" if scoring == "neg_log_loss" else "alpha": np.logspace(-4, 4, size)}
        if type(estimator) is ElasticNet:  # Lasso is a subclass
            if size > MOST_RATIOS:
                break
            grid["l1_ratio"] = np.linspace(0.05, 1.0, size)
        search = GridSearchCV(estimator, grid, scoring=scoring).fit(X, y)
        found.append((len(search.cv_results_["params"]) * search.n_splits_, -float(search.best_score_)))
    return found


def first_within(tried: list[tuple[int, float]], best: float) -> tuple[int, float]:
    """Where the loss first is within 0.2 % of the best; the last if it never is."""
    return next((entry for entry in tried if entry[1] <= best * (1 + WITHIN)), tried[-1])


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one data set")
    parser.add_argument("--figure", type=Path, default=Path("runs/gallery/sklearn_search.png"))
    options = parser.parse_known_args()[0]  # a notebook has arguments of its own

    rows, trails = [], []
    for name, load, estimator in CASES[:1] if options.smoke else CASES:
        X, y = load(return_X_y=True)
        X = StandardScaler().fit_transform(X)
        search = il.ImplicitSearchCV(estimator).fit(X, y)
        losses = np.minimum.accumulate(-search.cv_results_["mean_test_score"])
        descent = [((k + 1) * search.n_splits_, float(loss)) for k, loss in enumerate(losses)]
        grid = grids(estimator, X, y)
        best = min(descent[-1][1], *(loss for _, loss in grid))
        (fits, loss), (grid_fits, grid_loss) = first_within(descent, best), first_within(grid, best)
        rows.append({"case": name, "fits": fits, "loss": loss, "grid_fits": grid_fits, "grid_loss": grid_loss})
        trails.append((name, losses / best))
        reached = "" if grid_loss <= best * (1 + WITHIN) else ", not reached"
        print(f"{name:36s} {fits:3d} fits (loss {loss:.4f}), grid {grid_fits:4d} ({grid_loss:.4f}{reached})")

    draw_figure(options.figure, rows, trails)
    about = {"scikit-learn": sklearn.__version__, "smoke": options.smoke, "within": WITHIN, "grids": SIZES}
    options.figure.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    assert all(row["fits"] < row["grid_fits"] for row in rows)


# %%
def draw_figure(figure: Path, rows, trails) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for name, losses in trails:
        left.plot(np.minimum.accumulate(losses), "o-", ms=3, label=name)
    left.set(xlabel="values tried", ylabel="held-out loss, over the best", title="descent")
    left.legend(frameon=False, fontsize=8)
    places = np.arange(len(rows))
    right.barh(places - 0.2, [row["fits"] for row in rows], 0.4, color="C3", label="gradients")
    right.barh(places + 0.2, [row["grid_fits"] for row in rows], 0.4, color="0.6", label="grid")
    right.set_yticks(places, [row["case"] for row in rows])
    right.set(xscale="log", xlabel="fits to an equal held-out loss", title="against a grid")
    right.legend(frameon=False)
    figure.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(figure, dpi=110)
    print(f"picture: {figure}")


if __name__ == "__main__":
    main()
