"""A solver, a set or a method of one's own is found by its class, and a wrong one fails its checks."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from solver_claims import INNER, LINEAR, classes_of
from test_docs import ROOT, python_blocks

import implicitlayer as il
from implicitlayer import testing

OWN = [
    pair for base in (il.sets.ConvexSet, il.meta.MetaMethod) for pair in testing.extension_checks(base, "implicitlayer")
]
TERMS = [il.L1(0.3), il.ElasticNet(0.3, 0.2), il.GroupL1(0.4), il.Prox(lambda y, step, *theta: y / (1 + step))]
OWN += [pair for term in TERMS for pair in testing.extension_checks(term)]


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in OWN])
def test_the_sets_and_methods_of_the_package_conform(check: Callable[[], None]) -> None:
    check()


def test_no_solver_of_the_package_is_without_checks() -> None:
    checked = classes_of([*LINEAR, *INNER])
    for base in (il.LinearSolver, il.RecordingSolver):
        assert set(testing.extensions(base, "implicitlayer")) <= checked


# ------------------------------------------------------------------- one of each kind, as docs/extending.md writes them


@pytest.fixture(scope="module")
def strangers() -> dict[str, Any]:
    """The classes of the page, defined outside of the package."""
    namespace: dict[str, Any] = {"__name__": "strangers"}
    for _, source in python_blocks(ROOT / "docs" / "extending.md")[:-1]:
        exec(source, namespace)
    return namespace


KINDS = [
    (il.LinearSolver, "Elimination"),
    (il.RecordingSolver, "HeavyBall"),
    (il.sets.ConvexSet, "HalfSpace"),
    (il.meta.MetaMethod, "OneStep"),
]


@pytest.mark.parametrize(("base", "name"), KINDS)
def test_a_class_from_outside_is_found_by_its_base(base: Any, name: str, strangers: dict[str, Any]) -> None:
    assert testing.extensions(base, "strangers") == [strangers[name]]
    assert strangers[name] in testing.extensions(base)
    assert strangers[name] not in testing.extensions(base, "implicitlayer")
    assert len(dict(testing.extension_checks(base, "strangers"))) >= 5


def test_each_kind_takes_less_than_sixty_lines() -> None:
    for _, source in python_blocks(ROOT / "docs" / "extending.md"):
        assert len(source.splitlines()) < 60


def fails(kind: Any, message: str) -> None:
    """Some check of the class raises, and says so."""
    said = []
    for _, check in testing.extension_checks(kind):
        try:
            check()
        except AssertionError as error:
            said.append(str(error))
        except il.ImplicitLayerWarning:  # a layer tells of a rough answer on its own
            pass
    assert any(re.search(message, text) for text in said), said


def test_a_false_residual_fails(strangers: dict[str, Any]) -> None:
    class Flatterer(strangers["Elimination"]):  # type: ignore[misc]
        def solve(self, operator: Any, rhs: torch.Tensor) -> il.LinearSolution:
            value = super().solve(operator, rhs) * (1 + 1e-6)
            zero = torch.zeros(rhs.shape[:-1], dtype=torch.float64)
            return il.LinearSolution(value, zero.long(), zero.long(), zero, zero, zero + math.inf, True, "no method")

    fails(Flatterer, r"Flatterer says CONVERGED at a relative residual of 1\.00e-06, 1\.0e-09 is promised")


def test_a_bare_answer_of_a_linear_solver_gets_its_true_residual(strangers: dict[str, Any]) -> None:
    class Rough(strangers["Elimination"]):  # type: ignore[misc]
        def solve(self, operator: Any, rhs: torch.Tensor) -> Any:
            return super().solve(operator, rhs) * 1.001

    matrix, rhs = torch.diag(torch.tensor([2.0, 3.0]).double()), torch.ones(2).double()
    solution = Rough()(matrix, rhs)
    assert solution.status is il.Status.STAGNATED and solution.method == "Rough"
    # b - A (1.001 u) = -0.001 b, exactly but for rounding of 1e-16 over 1e-3
    torch.testing.assert_close(solution.relative_residual, torch.tensor(1e-3, dtype=torch.float64), rtol=1e-12, atol=0)
    assert Rough()(lambda v: matrix @ v, rhs).status is il.Status.STAGNATED


def test_a_solver_for_symmetric_systems_is_refused_where_there_are_none(strangers: dict[str, Any]) -> None:
    class Half(strangers["Elimination"]):  # type: ignore[misc]
        systems = "symmetric"

    for solver in (Half(), il.WarmStart(il.ConjugateGradient())):
        with pytest.raises(ValueError, match=r"is for symmetric systems; that of a layer with a constraint is not"):
            il.argmin(lambda x: x.sum(), lambda f, x: x, constraint=il.sets.Box(0, 1), linear_solver=solver)


@pytest.mark.parametrize("systems", ["general", "symmetric"])
def test_a_linear_solve_asks_for_the_transpose_unless_the_solver_is_for_symmetric_systems(
    systems: str, strangers: dict[str, Any]
) -> None:
    asked = []

    class Asked(strangers["Elimination"]):  # type: ignore[misc]
        def solve(self, operator: Any, rhs: torch.Tensor) -> Any:
            asked.append(operator.symmetric)
            return super().solve(operator, rhs)

    Asked.systems = systems
    matrix = torch.diag(torch.tensor([2.0, 3.0]).double()).requires_grad_()
    il.linear_solve(matrix, torch.ones(2).double(), Asked()).sum().backward()
    assert asked == [systems == "symmetric"] * 2


def test_an_inner_solver_that_stops_early_fails(strangers: dict[str, Any]) -> None:
    class Hasty(strangers["HeavyBall"]):  # type: ignore[misc]
        @classmethod
        def examples(cls, *given: Any) -> list[Any]:
            return [cls(max_steps=10)]

    fails(Hasty, r"Hasty ended .* away from the minimiser, 1\.0e-06 is promised")


class Shortened(il.sets.ConvexSet):
    """The ball, reached by taking the largest entry down: a point of the set, not the nearest one."""

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        return y / torch.clamp_min(y.abs().amax(-1, keepdim=True), 1.0)


class Hollow(il.sets.ConvexSet):
    """The sphere, which is not convex."""

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        return y / y.norm(dim=-1, keepdim=True)


class Forgetful(il.sets.ConvexSet):
    """The half-line, whose projection is cut off from autograd."""

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        return y + (torch.relu(y) - y).detach()


class AllTogether(il.sets.ConvexSet):
    """Vectors of sum 0, where one problem is alone; with lanes, of sum 0 over all lanes."""

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        return y - y.mean()


class Patcher(il.sets.ConvexSet):
    """The half-line; what is NaN becomes 0."""

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        return torch.where(y > 0, y, 0.0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Shortened, r"has a point nearer to y than P\(y\)"),
        (Hollow, r"has a point nearer to y than P\(y\)|is no proximal operator"),
        (Forgetful, "has an autograd derivative that is off by"),
        (AllTogether, "treats lane 0 otherwise than alone"),
        (Patcher, "made finite numbers of NaN"),
    ],
)
def test_a_wrong_set_fails(kind: Any, message: str) -> None:
    fails(kind, message)


def test_a_diagonal_that_is_not_the_derivative_fails(strangers: dict[str, Any]) -> None:
    class Claimed(strangers["HalfSpace"]):  # type: ignore[misc]
        def diagonal(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
            return torch.ones_like(y)

    fails(Claimed, "says a diagonal derivative that is off by")


def test_a_wrong_method_fails(strangers: dict[str, Any]) -> None:
    class Detached(strangers["OneStep"]):  # type: ignore[misc]
        def adapt(self, theta: Any, support: Any) -> Any:
            phi = super().adapt(theta, support)
            return {name: theta[name] + (leaf - theta[name]).detach() for name, leaf in phi.items()}

    class Longer(strangers["OneStep"]):  # type: ignore[misc]
        def adapt(self, theta: Any, support: Any) -> Any:
            return {name: leaf + 1e-3 * (leaf - leaf.detach()) for name, leaf in super().adapt(theta, support).items()}

    class Upwards(strangers["OneStep"]):  # type: ignore[misc]
        def __init__(self, task_loss: Any) -> None:
            super().__init__(task_loss, step_size=-0.1)

    class Averaged(strangers["OneStep"]):  # type: ignore[misc]
        def adapt(self, theta: Any, support: Any) -> Any:
            phi = super().adapt(theta, support)
            return {name: leaf.mean(0, keepdim=True).expand_as(leaf) for name, leaf in phi.items()}

    fails(Detached, "has a meta-gradient that is off by .* exact = False says it is another direction")
    Detached.exact = False  # first-order MAML: another direction, which it says, and one that helps
    for _, check in testing.extension_checks(Detached):
        check()
    fails(Longer, "has a meta-gradient that is off by")
    fails(Upwards, "adapts from")
    fails(Averaged, "treats task 0 otherwise than alone: losses are")


def test_what_cannot_be_made_or_is_no_extension_is_told(strangers: dict[str, Any]) -> None:
    class Needy(strangers["HalfSpace"]):  # type: ignore[misc]
        def __init__(self, total: float) -> None:
            super().__init__(total)

    with pytest.raises(
        TypeError, match=r"Needy could not be made for its checks .* Give it a classmethod examples\(\)"
    ):
        list(testing.extension_checks(Needy))
    with pytest.raises(TypeError, match=r"base=<class 'int'> must be il\.LinearSolver, il\.RecordingSolver"):
        testing.extensions(int)  # type: ignore[arg-type]
