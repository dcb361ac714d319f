"""The figures that conjugate gradients must hold on random quadratics, and several systems side by side."""

import math
import statistics

import pytest
import torch
from references import F64, generator, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status

NUM_PROBLEMS = 200


def problem(seed: int) -> tuple[Tensor, Tensor, float]:
    """Matrix with n <= 60 and condition <= 1e6, a random vector, and the condition number."""
    draw = generator(seed)
    n = int(torch.randint(1, 61, (), generator=draw))
    log10_cond = 6 * float(torch.rand((), generator=draw))
    return spd_matrix(n, log10_cond, seed), randn(n, seed=seed + 1), 10**log10_cond


@pytest.mark.parametrize(("hard", "worst_allowed"), [(False, 1e-8), (True, 1e-5)], ids=["random b", "b = A z"])
def test_random_quadratics_in_float64_hold_their_figures(hard: bool, worst_allowed: float) -> None:
    errors, products_per_unknown = [], []
    for seed in range(NUM_PROBLEMS):
        matrix, z, _ = problem(seed)
        b = matrix @ z if hard else z
        solution = il.ConjugateGradient(rtol=1e-10)(matrix, b)
        assert solution.status is Status.CONVERGED
        assert float((b - matrix @ solution.value).norm() / b.norm()) <= 1e-9  # 10 rtol
        # condition 1e6: the dense reference itself is good to 1e-10
        errors.append(relative_error(solution.value, torch.linalg.solve(matrix, b)))
        products_per_unknown.append(solution.num_steps / len(b))
    assert max(errors) <= worst_allowed
    assert statistics.median(products_per_unknown) <= 2


def test_random_quadratics_in_float32_hold_their_figures() -> None:
    errors = []
    for seed in range(NUM_PROBLEMS):
        matrix, z, _ = problem(seed)
        matrix, b = matrix.float(), z.float()
        solution = il.ConjugateGradient(rtol=1e-5)(matrix, b)
        errors.append(relative_error(solution.value.double(), torch.linalg.solve(matrix.double(), b.double())))
    assert statistics.median(errors) <= 1e-5 and max(errors) <= 3e-2


@pytest.mark.parametrize("hard", [False, True], ids=["random b", "b = A z"])
def test_float32_never_says_converged_above_ten_times_the_tolerance(hard: bool) -> None:
    num_reported = 0
    for seed in range(NUM_PROBLEMS):
        matrix, z, cond = problem(seed)
        matrix, b = matrix.float(), (matrix @ z if hard else z).float()
        solution = il.ConjugateGradient(rtol=1e-5)(matrix, b)
        residual = b.double() - matrix.double() @ solution.value.double()
        relative = float(residual.norm() / b.double().norm())
        assert relative <= 1e-4 or not solution.status.ok
        num_reported += not solution.status.ok
        if solution.status.ok:  # error <= condition times residual: rounding of the matrix moves the condition a little
            expected = torch.linalg.solve(matrix.double(), b.double())
            assert relative_error(solution.value.double(), expected) <= 2 * cond * max(relative, 1e-7)
    assert num_reported < NUM_PROBLEMS / 2  # reporting everything would pass the first half


# -------------------------------------------------------------------------------------------------------------- lanes


def mixed_batch(num_lanes: int = 12, n: int = 20) -> tuple[Tensor, Tensor]:
    """Conditions from 1 to 1e6 in one batch."""
    matrices = torch.stack([spd_matrix(n, 6 * i / (num_lanes - 1), seed=i) for i in range(num_lanes)])
    return matrices, randn(num_lanes, n, seed=99)


def test_batched_equals_looped_with_mixed_conditioning() -> None:
    matrices, b = mixed_batch()
    batched = il.ConjugateGradient(rtol=1e-10)(matrices, b)
    assert batched.codes.shape == (12,) and batched.status is Status.CONVERGED
    for i in range(12):
        single = il.ConjugateGradient(rtol=1e-10)(matrices[i], b[i])
        # each is within rtol * condition of the solution; b is random, so the error is near rtol (see the figures)
        assert relative_error(batched.value[i], single.value) < 1e-8
        assert relative_error(batched.value[i], torch.linalg.solve(matrices[i], b[i])) < 1e-8


def test_truncated_lanes_equal_truncated_loops() -> None:
    matrices, b = mixed_batch()
    batched = il.ConjugateGradient(max_steps=4)(matrices, b)
    for i in range(12):
        single = il.ConjugateGradient(max_steps=4)(matrices[i], b[i])
        assert relative_error(batched.value[i], single.value) < 1e-12  # four steps of the same arithmetic
        assert int(batched.steps[i]) == single.num_steps


def test_two_levels_of_lanes_are_independent_systems() -> None:
    matrices, b = mixed_batch()
    flat = il.ConjugateGradient()(matrices, b)
    nested = il.ConjugateGradient()(matrices.reshape(3, 4, 20, 20), b.reshape(3, 4, 20))
    assert nested.codes.shape == (3, 4) and torch.equal(nested.value.reshape(12, 20), flat.value)


@pytest.mark.parametrize("trouble", ["nan matrix", "nan rhs", "inf rhs", "indefinite", "singular", "zero rhs"])
@pytest.mark.parametrize("solver", [il.ConjugateGradient(), il.ConjugateGradient(max_steps=5)], ids=["rtol", "steps"])
def test_a_lane_in_trouble_changes_no_bit_of_the_others(trouble: str, solver: il.ConjugateGradient) -> None:
    matrices, b = mixed_batch()
    clean = solver(matrices, b)
    matrices, b = matrices.clone(), b.clone()
    if trouble == "nan matrix":
        matrices[5] = math.nan
    elif trouble == "indefinite":
        matrices[5] = -matrices[5]
    elif trouble == "singular":
        matrices[5] = 0
    else:
        b[5] = {"nan rhs": math.nan, "inf rhs": math.inf, "zero rhs": 0.0}[trouble]
    solution = solver(matrices, b)
    others = [i for i in range(12) if i != 5]
    assert torch.equal(solution.value[others], clean.value[others])
    assert torch.equal(solution.codes[others], clean.codes[others])
    assert torch.equal(solution.residual_norm[others], clean.residual_norm[others])
    expected = {"indefinite": Status.INDEFINITE, "singular": Status.SINGULAR, "zero rhs": Status.CONVERGED}
    assert Status(int(solution.codes[5])) is expected.get(trouble, Status.NONFINITE)
    if trouble == "zero rhs":
        assert torch.equal(solution.value[5], torch.zeros(20, dtype=F64))
    else:
        assert "in lane 5 of (12,)" in solution.describe()


def test_the_message_names_the_lane_of_a_nested_batch() -> None:
    matrices = torch.eye(3, dtype=F64).repeat(2, 2, 1, 1)
    matrices[1, 0] *= -1
    with pytest.raises(il.IndefiniteError, match=r"in lane \(1, 0\) of \(2, 2\) after 1 steps"):
        il.ConjugateGradient()(matrices, torch.ones(2, 2, 3, dtype=F64)).enforce("warn")


def test_lanes_of_very_different_scale_keep_their_own_accuracy() -> None:
    matrices = torch.stack([spd_matrix(15, 2, seed=3)] * 3)
    b = randn(15, seed=4) * torch.tensor([[2.0**-664], [1.0], [2.0**664]], dtype=F64)  # 1e-200, 1, 1e200
    solution = il.ConjugateGradient()(matrices, b)
    assert solution.status is Status.CONVERGED
    # powers of two round nothing, so neither may the solve
    assert torch.equal(solution.value[0] * 2.0**664, solution.value[1])
    assert torch.equal(solution.value[2] * 2.0**-664, solution.value[1])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_no_lanes_and_no_unknowns_are_no_trouble(shape: tuple[int, int]) -> None:
    operator = il.FlatOperator(lambda v: v)
    solution = il.ConjugateGradient()(operator, torch.zeros(shape, dtype=F64))
    assert solution.status is Status.CONVERGED and solution.value.shape == shape and solution.num_steps == 0


def test_every_lane_stops_at_its_own_step() -> None:
    # lane i has i + 1 distinct eigenvalues, so exact arithmetic needs i + 1 steps
    matrices = torch.stack(
        [torch.diag(torch.tensor([1.0 + (j % (i + 1)) for j in range(6)], dtype=F64)) for i in range(4)]
    )
    solution = il.ConjugateGradient()(matrices, randn(4, 6, seed=8))
    assert solution.steps.tolist() == [1, 2, 3, 4] and solution.num_steps == 4
