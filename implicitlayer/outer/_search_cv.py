"""``il.ImplicitSearchCV``: penalties of scikit-learn's linear models by gradients of the cross-validation loss."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from implicitlayer._errors import extra
from implicitlayer.outer._search_models import (
    ElasticNetModel,
    Fold,
    LassoModel,
    LogisticModel,
    RidgeModel,
    Tensors,
)

with extra("sklearn", "il.ImplicitSearchCV needs scikit-learn"):
    import scipy.optimize
    from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier
    from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
    from sklearn.model_selection import check_cv
    from sklearn.preprocessing import LabelEncoder
    from sklearn.utils import get_tags
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

_MODELS: dict[type, Any] = {
    Ridge: RidgeModel,
    Lasso: LassoModel,
    ElasticNet: ElasticNetModel,
    LogisticRegression: LogisticModel,
}
_DECADE = np.log(10.0)  # the unit of the search
_RANGE = 6.0  # how far from the start
_APART = 0.75  # the penalties that are tried first


def _by_the_best(name: str) -> Any:
    """A method of the best estimator, where the estimator has it."""

    def method(self: Any, X: Any) -> Any:
        X = self._asked(X)
        return getattr(self.best_estimator_, name)(X)

    method.__name__, method.__doc__ = name, "By the best estimator."
    return available_if(lambda self: hasattr(getattr(self, "best_estimator_", self.estimator), name))(method)


class ImplicitSearchCV(MetaEstimatorMixin, BaseEstimator):  # type: ignore[misc]
    """Find the penalties of a linear model of scikit-learn by descent on its cross-validation loss.

    In place of a grid: every fold is fitted by the estimator itself, its derivative in the penalties comes from the
    implicit function theorem, and L-BFGS-B goes to where the mean held-out loss (squared error, or log loss) is
    smallest. The number of fits does not grow with the number of parameters, so there may be one penalty per feature.
    The loss may have several minima; the one found is local, next to the best of three first values.

    Args:
        estimator: ``Ridge``, ``Lasso``, ``ElasticNet`` or ``LogisticRegression`` (penalty l2, any solver but
            liblinear), without class weights or signs asked for.
        params: names to search; None: ``alpha``, ``C``, and ``l1_ratio`` of ``ElasticNet``.
        per_feature: one penalty for each feature; columns are then scaled by ``scale_`` before the estimator. Not for
            ``ElasticNet``.
        cv: as in scikit-learn's ``GridSearchCV``.
        max_steps: limit of steps of the search, at least 1; each fits every fold once or twice.
        tol: the search ends where a step lowers the loss by less than this share, or by the bounds: 1e6 either way
            from a start in the scale of the data.

    Attributes:
        best_params_, best_score_, best_index_: as in ``GridSearchCV``; the score is the negative mean held-out loss of
            fits to a ``tol`` of their own, as derivatives need: an estimator of looser ``tol`` has another by
            ``cross_val_score``. With ``per_feature`` the parameter is an array.
        best_estimator_: the estimator with these, fitted to all data (columns times ``scale_``).
        scale_: of the columns, ones without ``per_feature``.
        cv_results_: what was tried, in order: ``params``, ``mean_test_score``, ``split<k>_test_score``,
            ``mean_gradient_norm``.
        n_fits_: fits of the estimator, the last one on all data not counted.
        n_splits_, n_features_in_, classes_: as in ``GridSearchCV``.

    Raises:
        TypeError, ValueError: another estimator, an unknown parameter, settings with another objective.
        ImportError: without scikit-learn, ``pip install "implicitlayer[sklearn]"``.

    Example:
        >>> import implicitlayer as il
        >>> from sklearn.datasets import load_diabetes
        >>> from sklearn.linear_model import Ridge
        >>> search = il.ImplicitSearchCV(Ridge()).fit(*load_diabetes(return_X_y=True))
        >>> sorted(search.best_params_), search.n_fits_ < 100
        (['alpha'], True)
    """

    def __init__(
        self,
        estimator: Any,
        params: list[str] | None = None,
        *,
        per_feature: bool = False,
        cv: Any = None,
        max_steps: int = 30,
        tol: float = 1e-5,
    ) -> None:
        self.estimator, self.params, self.per_feature = estimator, params, per_feature
        self.cv, self.max_steps, self.tol = cv, max_steps, tol

    def fit(self, X: Any, y: Any, groups: Any = None) -> ImplicitSearchCV:
        """Search, then fit to all data; ``groups=`` goes to the splitter."""
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        classifier, target = is_classifier(self.estimator), y
        if classifier:
            check_classification_targets(y)
            encoder = LabelEncoder().fit(y)
            self.classes_, target = encoder.classes_, encoder.transform(y)
            if len(self.classes_) < 2:
                raise ValueError(f"y has only one class, {self.classes_[0]!r}; a classifier needs two.")
        else:
            target = column_or_1d(y, warn=True).astype(np.float64)
        model = self._model(len(self.classes_) if classifier else 0)
        splits = list(check_cv(self.cv, target, classifier=classifier).split(X, target, groups))
        for k, (train, _) in enumerate(splits):
            if classifier and len(np.unique(target[train])) < len(self.classes_):
                raise ValueError(f"the training rows of split {k} lack a class. Give fewer splits, or a stratified cv.")
        data = torch.from_numpy(np.array(X)), torch.from_numpy(np.array(target))
        search = _Search(model, [model.prepare(*data, *split) for split in splits], self._names(model), X.shape[1])
        theta = search.run(self.per_feature, self.max_steps, self.tol)
        self.n_splits_, self.n_fits_, self.cv_results_ = len(splits), search.num_fits, search.results()
        self.best_index_ = int(np.argmax(self.cv_results_["mean_test_score"]))
        self.best_score_ = float(self.cv_results_["mean_test_score"][self.best_index_])
        self.best_params_ = self.cv_results_["params"][self.best_index_]
        self.scale_ = model.scale(theta).numpy() if self.per_feature else np.ones(X.shape[1])
        started = time.perf_counter()
        given = dict.fromkeys(self.best_params_, 1.0) if self.per_feature else self.best_params_
        self.best_estimator_ = clone(self.estimator).set_params(**given).fit(X * self.scale_, y)
        self.refit_time_ = time.perf_counter() - started
        return self

    def _model(self, num_classes: int) -> Any:
        kind = _MODELS.get(type(self.estimator))
        if kind is None:
            raise TypeError(
                f"estimator must be one of {', '.join(sorted(known.__name__ for known in _MODELS))}, got "
                f"{type(self.estimator).__name__}: its objective must be known to be differentiated. For others write "
                "it down and use il.argmin with the estimator as the solver, see docs/any_solver.md."
            )
        if self.max_steps < 1 or not self.tol >= 0:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1, and tol={self.tol} must be non-negative.")
        if self.per_feature and kind is ElasticNetModel:
            raise ValueError("per_feature=True: the two norms of ElasticNet scale differently. Use Ridge or Lasso.")
        return kind(self.estimator, num_classes)

    def _names(self, model: Any) -> list[str]:
        names = list(model.searched if self.params is None else self.params)
        unknown = [name for name in names if name not in model.searched]
        if unknown or not names:
            raise ValueError(
                f"params={names} must name some of {list(model.searched)}, what {type(self.estimator).__name__} is "
                "differentiated in. Search the others by GridSearchCV around this."
            )
        return names

    def _asked(self, X: Any) -> Any:
        check_is_fitted(self, "best_estimator_")
        return validate_data(self, X, dtype=np.float64, reset=False) * self.scale_

    predict = _by_the_best("predict")
    predict_proba = _by_the_best("predict_proba")
    predict_log_proba = _by_the_best("predict_log_proba")
    decision_function = _by_the_best("decision_function")

    def score(self, X: Any, y: Any) -> float:
        """The best estimator's own score: R^2, or accuracy."""
        X = self._asked(X)
        return float(self.best_estimator_.score(X, y))

    def __sklearn_tags__(self) -> Any:
        tags, own = super().__sklearn_tags__(), get_tags(self.estimator)
        tags.estimator_type, tags.classifier_tags = own.estimator_type, own.classifier_tags
        tags.regressor_tags, tags.target_tags.required = own.regressor_tags, True
        return tags


class _Search:
    """The loss and its gradient in the parameters, fold by fold, and what was tried."""

    def __init__(self, model: Any, folds: list[Fold], names: list[str], num_features: int) -> None:
        self.model, self.folds, self.names, self.num_features = model, folds, names, num_features
        settings = {name: value for name, value in model.tight.items() if name in model.estimator.get_params()}
        if "warm_start" in model.estimator.get_params():
            settings["warm_start"] = True
        self.estimators = [clone(model.estimator).set_params(**settings) for _ in folds]
        self.layers = [model.layer(self._solver(k)) for k in range(len(folds))]
        self.tried: list[tuple[Tensors, list[float], float]] = []
        self.num_fits = 0

    def _solver(self, k: int) -> Any:
        """The fold's estimator as the solver of its layer; the data are those that the layer was given."""

        def solver(objective: Any, init: Any, theta: Tensors, fold: Fold) -> Any:
            scale = self.model.scale(theta) if self.per_feature else None
            given = dict.fromkeys(theta, 1.0) if scale is not None else self.model.parameters(theta)
            estimator = self.estimators[k].set_params(**given)
            X = fold.X if scale is None else fold.X * scale
            self.num_fits += 1
            return self.model.read(estimator.fit(X.numpy(), fold.y.numpy()), scale)

        return solver

    def run(self, per_feature: bool, max_steps: int, tol: float) -> Tensors:
        """The best parameters met by L-BFGS-B."""
        self.per_feature = per_feature
        start = self.model.start(self.folds)
        shape = (self.num_features,) if per_feature else ()
        first = torch.cat([start[name].expand(shape).reshape(-1) for name in self.names]).numpy() / _DECADE

        def loss_at(flat: np.ndarray) -> tuple[float, np.ndarray]:
            parts = np.split(flat * _DECADE, len(self.names))
            theta = {n: torch.tensor(p).reshape(shape) for n, p in zip(self.names, parts, strict=True)}
            return self._loss(theta)

        # The loss may have several minima: the search begins at the best of three penalties. They are less than
        # a decade apart, which from a start of Lasso's would be where w begins to be zero.
        penalties = np.repeat([float(name != "l1_ratio") for name in self.names], len(first) // len(self.names))
        tried = [(loss_at(first + shift * penalties), first + shift * penalties) for shift in (0.0, _APART, -_APART)]
        begun, first = min(tried, key=lambda entry: entry[0][0])
        # Between bounds the first step of L-BFGS-B is minus the gradient g, as short as that may be. In y = z / s it is
        # -s g, which in z is -s^2 g: with s^2 = 1 / (2 ||g||) it is half a decade long, short of what has been tried.
        known, slope = [begun], float(np.linalg.norm(begun[1]))
        unit = (0.5 / slope) ** 0.5 if slope > 0 else 1.0

        def loss(moved: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = known.pop() if known else loss_at(first + unit * moved)
            return value, unit * gradient

        bounds = [(-_RANGE / unit, _RANGE / unit)] * len(first)
        options = {"maxiter": max_steps, "ftol": tol, "gtol": 0.0}
        scipy.optimize.minimize(loss, np.zeros_like(first), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return min(self.tried, key=lambda entry: float(np.mean(entry[1])))[0]

    def _loss(self, theta: Tensors) -> tuple[float, np.ndarray]:
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        losses = [
            self.model.held_out_loss(layer(self.model.init(fold), leaves, fold), fold)
            for layer, fold in zip(self.layers, self.folds, strict=True)
        ]
        mean = torch.stack(losses).mean()
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(mean, list(leaves.values()))])
        self.tried.append((theta, [float(value.detach()) for value in losses], float(gradient.norm())))
        unit = float(np.mean(self.tried[0][1])) or 1.0  # so that tol is relative
        return float(mean.detach()) / unit, gradient.numpy() * _DECADE / unit

    def results(self) -> dict[str, Any]:
        scores = -np.array([losses for _, losses, _ in self.tried])
        params = [
            {n: v.exp().numpy() for n, v in theta.items()} if self.per_feature else self.model.parameters(theta)
            for theta, _, _ in self.tried
        ]
        found: dict[str, Any] = {"params": params, "mean_test_score": scores.mean(1)}
        found |= {f"split{k}_test_score": scores[:, k] for k in range(scores.shape[1])}
        return found | {"mean_gradient_norm": np.array([norm for _, _, norm in self.tried])}
