"""What scikit-learn's linear models minimise, in torch: the objective, its regulariser, and how a fit is read."""

# With one penalty a_j per feature, the estimator is fitted with a penalty of 1 to the columns times s_j, and finds
# v_j = w_j / s_j: its penalty is |v_j| = a_j |w_j| for s_j = 1 / a_j (L1), v_j^2 = a_j w_j^2 for s_j = a_j^(-1/2).

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from implicitlayer.api._argmin import argmin
from implicitlayer.layer._layer import ImplicitLayer
from implicitlayer.sets._regularizers import ElasticNet

Tensors = dict[str, torch.Tensor]
Settings = dict[str, tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Fold:
    """Training and held-out rows; the training columns are centred where the model has an intercept."""

    X: torch.Tensor
    y: torch.Tensor
    X_held_out: torch.Tensor
    y_held_out: torch.Tensor


class Model:
    """One kind of estimator: ``searched`` are its parameters that can be found, ``fixed`` what it must be set to."""

    searched: tuple[str, ...] = ("alpha",)
    fixed: ClassVar[Settings]
    power = 0.5  # of the penalty in the scale of a column
    tight: ClassVar[dict[str, Any]] = {}  # what the fits of a search need to be differentiated

    def __init__(self, estimator: Any, num_classes: int) -> None:
        self.estimator, self.num_classes = estimator, num_classes
        self.intercept = bool(estimator.fit_intercept)
        for name, allowed in self.fixed.items():
            if getattr(estimator, name, allowed[0]) not in allowed:
                raise ValueError(
                    f"{type(estimator).__name__}({name}={getattr(estimator, name)!r}) minimises another objective than "
                    f"the one that is differentiated here; {name} must be one of {allowed}. Search it by GridSearchCV."
                )

    def parameters(self, theta: Tensors) -> dict[str, float]:
        """The estimator's own parameters, where there is one penalty for all features."""
        return {name: float(self.value(name, value.detach())) for name, value in theta.items()}

    @staticmethod
    def value(name: str, unbounded: torch.Tensor) -> torch.Tensor:
        """Penalties are optimised by their logarithm, the ratio of ElasticNet by its logit."""
        return torch.sigmoid(unbounded) if name == "l1_ratio" else unbounded.exp()

    def scale(self, theta: Tensors) -> torch.Tensor:
        """Of the columns, where there is one penalty for each."""
        (value,) = theta.values()
        return (-self.power * self.sign * value.detach()).exp()

    sign = 1.0  # C is the inverse of a penalty


class Squares(Model):
    """Ridge, Lasso, ElasticNet: the intercept is eliminated by centred columns."""

    fixed: ClassVar[Settings] = {"positive": (False,)}

    def prepare(self, X: torch.Tensor, y: torch.Tensor, train: np.ndarray, test: np.ndarray) -> Fold:
        centre, mean = (X[train].mean(0), y[train].mean()) if self.intercept else (torch.zeros(()), torch.zeros(()))
        return Fold(X[train] - centre, y[train] - mean, X[test] - centre, y[test] - mean)

    def init(self, fold: Fold) -> Any:
        return fold.X.new_zeros(fold.X.shape[1])

    def read(self, fitted: Any, scale: torch.Tensor | None) -> Any:
        """The unknowns from a fitted estimator."""
        w = torch.as_tensor(np.asarray(fitted.coef_, dtype=np.float64)).reshape(-1)
        return w if scale is None else w * scale

    def held_out_loss(self, w: Any, fold: Fold) -> torch.Tensor:
        """Mean squared error."""
        error: torch.Tensor = fold.X_held_out @ w - fold.y_held_out
        return (error**2).mean()


class RidgeModel(Squares):
    """``||y - Xw||^2 + alpha ||w||^2``."""

    def layer(self, solver: Any) -> ImplicitLayer:
        """(init, theta, fold) -> w."""
        return argmin(lambda w, t, fold: ((fold.X @ w - fold.y) ** 2).sum() + (t["alpha"].exp() * w**2).sum(), solver)

    def start(self, folds: list[Fold]) -> Tensors:
        """A hundredth of the mean eigenvalue of X'X."""
        return {"alpha": (0.01 * torch.stack([(f.X**2).sum(0).mean() for f in folds]).mean()).log()}


class LassoModel(Squares):
    """``||y - Xw||^2 / (2 n) + alpha (l1_ratio ||w||_1 + (1 - l1_ratio) / 2 ||w||^2)``."""

    power = 1.0
    tight: ClassVar[dict[str, Any]] = {"tol": 1e-9, "max_iter": 100_000, "selection": "cyclic"}

    def layer(self, solver: Any) -> ImplicitLayer:
        """(init, theta, fold) -> w."""

        def penalty(t: Tensors, fold: Any) -> ElasticNet:
            alpha, ratio = t["alpha"].exp(), self.ratio(t)
            return ElasticNet(alpha * ratio, alpha * (1 - ratio))

        return argmin(lambda w, t, fold: ((fold.X @ w - fold.y) ** 2).mean() / 2, solver, regularizer=penalty, polish=1)

    def ratio(self, t: Tensors) -> torch.Tensor:
        """The share of the L1 norm."""
        if "l1_ratio" in t:
            return torch.sigmoid(t["l1_ratio"])
        return torch.tensor(float(getattr(self.estimator, "l1_ratio", 1.0)), dtype=torch.float64)

    def start(self, folds: list[Fold]) -> Tensors:
        """A tenth of the penalty from which on all of w is zero, in the fold where that is smallest; ratio 1/2."""
        ratio = max(float(getattr(self.estimator, "l1_ratio", 1.0)), 0.01)
        most = torch.stack([(f.X.T @ f.y).abs().max() / len(f.y) for f in folds]).min() / ratio
        return {"alpha": (0.1 * most).log(), "l1_ratio": torch.zeros((), dtype=torch.float64)}


class ElasticNetModel(LassoModel):
    """The same, with the ratio searched as well."""

    searched = ("alpha", "l1_ratio")


class LogisticModel(Model):
    """``C sum of log losses + ||w||^2 / 2``, the intercept free; one row of weights for two classes."""

    searched = ("C",)
    sign = -1.0
    fixed: ClassVar[Settings] = {
        "class_weight": (None,),
        "penalty": ("deprecated", "l2"),
        "l1_ratio": (None, 0.0, 0),
        "dual": (False,),
        "solver": ("lbfgs", "newton-cg", "newton-cholesky", "sag", "saga"),
    }
    tight: ClassVar[dict[str, Any]] = {"tol": 1e-8, "max_iter": 10_000}

    def prepare(self, X: torch.Tensor, y: torch.Tensor, train: np.ndarray, test: np.ndarray) -> Fold:
        return Fold(X[train], y[train], X[test], y[test])

    def init(self, fold: Fold) -> Any:
        rows = 1 if self.num_classes == 2 else self.num_classes
        weights = {"coef": fold.X.new_zeros(rows, fold.X.shape[1])}
        return weights | ({"intercept": fold.X.new_zeros(rows)} if self.intercept else {})

    def read(self, fitted: Any, scale: torch.Tensor | None) -> Any:
        w = torch.as_tensor(np.array(fitted.coef_, dtype=np.float64))
        weights = {"coef": w if scale is None else w * scale}
        if self.intercept:
            intercept = torch.as_tensor(np.array(fitted.intercept_))
            weights["intercept"] = intercept - (intercept.mean() if self.num_classes > 2 else 0.0)
        return weights

    def _losses(self, w: Any, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = X @ w["coef"].T + (w["intercept"] if self.intercept else 0.0)
        if self.num_classes == 2:
            return torch.nn.functional.softplus((1 - 2 * y.to(scores.dtype)) * scores[:, 0])
        return torch.logsumexp(scores, 1) - scores.gather(1, y[:, None])[:, 0]

    def held_out_loss(self, w: Any, fold: Fold) -> torch.Tensor:
        """Mean log loss."""
        return self._losses(w, fold.X_held_out, fold.y_held_out).mean()

    def layer(self, solver: Any) -> ImplicitLayer:
        """(init, theta, fold) -> weights."""

        def objective(w: Any, t: Tensors, fold: Fold) -> torch.Tensor:
            value: torch.Tensor = self._losses(w, fold.X, fold.y).sum() + (w["coef"] ** 2 / t["C"].exp()).sum() / 2
            # more than two classes: one number added to all intercepts changes nothing, so their mean is held at zero
            if self.intercept and self.num_classes > 2:
                value = value + w["intercept"].sum() ** 2 / 2
            return value

        return argmin(objective, solver, polish=3)

    def start(self, folds: list[Fold]) -> Tensors:
        """The inverse of a hundredth of the mean eigenvalue of X'X / 4, the Hessian of the losses at zero."""
        return {"C": -(0.01 * torch.stack([(f.X**2).sum(0).mean() / 4 for f in folds]).mean()).log()}
