"""il.ImplicitSearchCV: gradients against differences of scikit-learn's own cross-validation, and its conventions."""

from typing import Any

import numpy as np
import pytest

import implicitlayer as il

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge, SGDClassifier
from sklearn.model_selection import GroupKFold, KFold, cross_val_score
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator


def data(load: Any, rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    X, y = load(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))[:rows]
    return StandardScaler().fit_transform(X[order]), y[order]


NEWTON = LogisticRegression(solver="newton-cholesky", tol=1e-10)  # others stop far from the minimum here
CASES: dict[str, tuple[Any, Any, str]] = {
    "Ridge": (load_diabetes, Ridge(), "neg_mean_squared_error"),
    "Lasso": (load_diabetes, Lasso(tol=1e-10, max_iter=10**5), "neg_mean_squared_error"),
    "ElasticNet": (load_diabetes, ElasticNet(tol=1e-10, max_iter=10**5), "neg_mean_squared_error"),
    "LogisticRegression": (load_breast_cancer, NEWTON, "neg_log_loss"),
    "three classes": (load_iris, NEWTON, "neg_log_loss"),
    "no intercept": (load_diabetes, Ridge(fit_intercept=False), "neg_mean_squared_error"),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_and_gradients_are_those_of_scikit_learns_cross_validation(name: str) -> None:
    load, estimator, scoring = CASES[name]
    X, y = data(load)
    search = il.ImplicitSearchCV(estimator, cv=3, max_steps=4).fit(X, y)

    def score(params: dict[str, float]) -> float:
        return float(cross_val_score(clone(estimator).set_params(**params), X, y, cv=3, scoring=scoring).mean())

    results = search.cv_results_
    for k in (0, len(results["params"]) - 1):
        assert score(results["params"][k]) == pytest.approx(results["mean_test_score"][k], rel=1e-6)
    # the norm of the gradient in the logarithms (the logit of l1_ratio), by central differences with a step of 1e-4:
    # truncation 1e-8, and fits to 1e-9 over that step 1e-5
    params, slopes = results["params"][0], []
    for key, value in params.items():
        if key == "l1_ratio":
            moved = [1 / (1 + (1 / value - 1) * np.exp(-h)) for h in (1e-4, -1e-4)]
        else:
            moved = [value * np.exp(h) for h in (1e-4, -1e-4)]
        up, down = (score(params | {key: float(m)}) for m in moved)
        slopes.append((up - down) / 2e-4)
    assert np.linalg.norm(slopes) == pytest.approx(results["mean_gradient_norm"][0], rel=1e-3)


def test_it_ends_at_the_best_value_of_a_fine_grid() -> None:
    X, y = data(load_breast_cancer)
    search = il.ImplicitSearchCV(LogisticRegression(), cv=3).fit(X, y)
    grid = np.logspace(-3, 2, 101)
    scores = [cross_val_score(clone(NEWTON).set_params(C=C), X, y, cv=3, scoring="neg_log_loss").mean() for C in grid]
    assert search.best_score_ >= max(scores) * (1 + 1e-3)  # scores are negative
    assert search.n_fits_ < 3 * 101 / 4


@pytest.mark.parametrize("estimator", [Ridge(), Lasso(max_iter=10**5)])
def test_it_does_not_stop_beside_its_start_where_the_loss_is_flat(estimator: Any) -> None:
    """On the columns as they are the start lies where a decade changes the loss by 2e-4 of it, or less."""
    X, y = load_diabetes(return_X_y=True)
    cv, scoring = KFold(3), "neg_mean_squared_error"
    search = il.ImplicitSearchCV(estimator, cv=cv).fit(X, y)
    grid = np.logspace(-10, 10, 81)
    scores = [cross_val_score(clone(estimator).set_params(alpha=a), X, y, cv=cv, scoring=scoring).mean() for a in grid]
    assert search.best_score_ >= max(scores) * (1 + 1e-5)  # scores are negative; tol=1e-5 is the default
    assert search.n_fits_ < 3 * len(grid) / 4


# scikit-learn's own word where the search tries C = 10^5.7 for a feature, and the fit goes on with L-BFGS
@pytest.mark.filterwarnings("ignore:The inner solver of NewtonCholeskySolver detected")
@pytest.mark.parametrize("estimator", [Ridge(), Lasso(max_iter=10**5), NEWTON])
def test_a_penalty_for_every_feature_is_at_least_as_good_as_one_for_all(estimator: Any) -> None:
    X, y = data(load_breast_cancer if isinstance(estimator, LogisticRegression) else load_diabetes)
    one = il.ImplicitSearchCV(estimator, cv=3).fit(X, y)
    each = il.ImplicitSearchCV(estimator, cv=3, per_feature=True).fit(X, y)
    assert each.best_score_ > one.best_score_
    assert each.scale_.shape == (X.shape[1],) and each.n_fits_ < 3 * 60
    # its score is that of the estimator on scaled columns
    (name,) = each.best_params_
    unit = clone(estimator).set_params(**{name: 1.0, **({} if isinstance(estimator, Ridge) else {"tol": 1e-9})})
    scoring = "neg_log_loss" if name == "C" else "neg_mean_squared_error"
    expected = cross_val_score(unit, X * each.scale_, y, cv=3, scoring=scoring).mean()
    assert each.best_score_ == pytest.approx(expected, rel=1e-5)
    assert np.array_equal(each.predict(X), each.best_estimator_.predict(X * each.scale_))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [Ridge(), LogisticRegression()])
def test_it_keeps_the_conventions_of_scikit_learn(estimator: Any) -> None:
    """All that apply; two are skipped by scikit-learn itself (other array types than NumPy's)."""
    results = check_estimator(il.ImplicitSearchCV(estimator, cv=3), on_skip=None)
    assert sum(result["status"] == "passed" for result in results) >= 50


def test_it_predicts_and_scores_by_the_best_estimator() -> None:
    X, y = data(load_iris, 150)
    names = np.array(["a", "b", "c"])[y]
    search = il.ImplicitSearchCV(LogisticRegression(), cv=3).fit(X, names)
    assert list(search.classes_) == ["a", "b", "c"] and search.n_splits_ == 3
    assert np.array_equal(search.predict(X), search.best_estimator_.predict(X))
    assert search.predict_proba(X).shape == (150, 3) and search.score(X, names) > 0.95
    assert search.best_params_["C"] == search.best_estimator_.C
    assert not hasattr(il.ImplicitSearchCV(Ridge()), "predict_proba")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"estimator": SGDClassifier()}, TypeError, "estimator must be one of ElasticNet, .* got SGDClassifier"),
        ({"estimator": Ridge(positive=True)}, ValueError, r"Ridge\(positive=True\) minimises another objective"),
        ({"estimator": LogisticRegression(class_weight="balanced")}, ValueError, "class_weight='balanced'"),
        ({"estimator": LogisticRegression(solver="liblinear")}, ValueError, "solver='liblinear'"),
        ({"estimator": Ridge(), "params": ["C"]}, ValueError, r"params=\['C'\] must name some of \['alpha'\]"),
        ({"estimator": ElasticNet(), "per_feature": True}, ValueError, "per_feature=True"),
        ({"estimator": Ridge(), "max_steps": 0}, ValueError, "max_steps=0 must be at least 1"),
    ],
)
def test_what_is_not_differentiated_is_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    X, y = data(load_breast_cancer, 60)
    with pytest.raises(error, match=message):
        il.ImplicitSearchCV(**settings).fit(X, y)


def test_groups_go_to_the_splitter_and_other_data_of_fit_are_refused_by_name() -> None:
    X, y = data(load_diabetes, 60)
    groups = np.arange(60) % 3
    search = il.ImplicitSearchCV(Ridge(), cv=GroupKFold(3)).fit(X, y, groups=groups)
    folds = [(np.flatnonzero(groups != k), np.flatnonzero(groups == k)) for k in range(3)]
    given = il.ImplicitSearchCV(Ridge(), cv=folds).fit(X, y)  # the mean over folds has no order
    assert search.n_splits_ == 3 and np.isclose(search.best_score_, given.best_score_, rtol=1e-6)
    other_data: dict[str, Any] = {"sample_weight": np.ones(60)}
    with pytest.raises(TypeError, match="sample_weight"):
        il.ImplicitSearchCV(Ridge()).fit(X, y, **other_data)


def test_a_split_that_lacks_a_class_is_named() -> None:
    X, y = data(load_iris, 150)
    order = np.argsort(y)
    with pytest.raises(ValueError, match="the training rows of split 0 lack a class"):
        il.ImplicitSearchCV(LogisticRegression(), cv=KFold(3)).fit(X[order], y[order])
