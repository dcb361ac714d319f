"""Layers whose tensors lie on several processes: the numbers of one process, or an error that says what to do."""

import os
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch.distributed as dist

from implicitlayer import _torch

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not hasattr(os, "fork"), reason="needs gloo and fork"
)
SCRIPT = Path(__file__).with_name("sharded_run.py")
DOCS = Path(__file__).parents[2] / "docs" / "distributed.md"

# Both runs stop at 1e-12 of a Hessian between 2 I and 3 I and differ otherwise by sums in another order, a few ulp
# (1e-15) of numbers near 10.
TOLERANCE = 1e-11


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One start of torchrun with four processes and one with two for all cases; all of them have found the same."""
    folder = tmp_path_factory.mktemp("sharded")
    found: dict[str, Any] = {}
    for size in (4, 2):
        process = processes.torchrun(size, [str(SCRIPT), str(folder)], timeout=900)  # about 170 s of CPU together
        assert process.returncode == 0, process.stderr
        first, *others = processes.results(folder, size)
        assert all(other.keys() == first.keys() for other in others)
        largest = {name: max(one[name] for one in (first, *others)) for name in first}
        found |= {name: largest[name] if isinstance(first[name], float) else first[name] for name in first}
    return found


@pytest.mark.parametrize("inner", ["GradientDescent", "NewtonCG", "LBFGS"])
@pytest.mark.parametrize("linear", ["ConjugateGradient", "Minres", "Gmres", "Dense"])
def test_the_gradient_of_sharded_weights_is_that_of_one_process(found: dict[str, Any], inner: str, linear: str) -> None:
    assert found[f"{inner} {linear}"] < TOLERANCE


@pytest.mark.parametrize("placed", ["Shard(0)", "Shard(1)", "Replicate"])
def test_every_placement_of_the_unknowns_gives_the_same_gradient(found: dict[str, Any], placed: str) -> None:
    assert found[f"rows ConjugateGradient {placed}"] < TOLERANCE


@pytest.mark.parametrize("linear", ["ConjugateGradient", "Gmres", "Dense"])
def test_rows_of_the_data_on_several_processes_are_summed(found: dict[str, Any], linear: str) -> None:
    assert found[f"rows {linear} Shard(0)"] < TOLERANCE


WORKS = [
    *("root", "fixed_point", "batch_dims", "closed over", "tied", "second order", "own solver", "plain value"),
    *("plain theta", "iMAML", "DDP", "tensor parallel", "FSDP2 around", "checkpoint", "example", "modules"),
    *("MAML", "TruncatedMAML", "FirstOrderMAML", "Reptile", "ANIL", "ProtoNet", "layer decay"),
    *("constrained_argmin", "qp", "value"),
    *("Box 0", "Box 1", "Box, a bound for each entry", "Box, a tree of bounds", "NonNegative", "Ball", "Simplex"),
    *("L1", "L1, a strength for each column", "ElasticNet", "GroupL1", "Prox"),
    *("batch_dims, a set", "AcceleratedGradient", "GradientDescent, searched steps"),
    *("TorchOptimizer", "SciPyMinimize", "LBFGS, bounds", "Broyden"),
    *(f"WarmStart {linear}, {call} call" for linear in ("ConjugateGradient", "Gmres") for call in ("first", "second")),
    *("linear_solve", "linear_solve of a function", "hvp 0", "hvp whole", "explain_gradient"),
    *("hessian_operator 0", "hessian_operator whole", "hessian_operator Dense"),
    *("an outer LBFGS", "batch_dims, mask", "iMAML LBFGS Gmres"),
    *("root Newton Gmres", "root, Partial", "a callback", "DeepEquilibrium"),
    *("root, a plain leaf", "root, second order", "fixed_point, mask"),
    "2 x 2 fixed_point AndersonAcceleration Bicgstab",
    *("iMAML, a strength for each tensor", "iMAML gauss_newton", "LevenbergMarquardt, batch_dims"),
    *("gauss_newton, closed over, second order", "negative_curvature gauss_newton"),
    *(f"gauss_newton {what} {dim}" for what in ("product", "linear_solve") for dim in (0, 1)),
    *(f"fixed_point AndersonAcceleration {linear}" for linear in ("Bicgstab", "Neumann", "NormalEquations")),
]


@pytest.mark.parametrize("name", WORKS)
def test_what_else_works_with_dtensors_has_the_answer_of_one_process(found: dict[str, Any], name: str) -> None:
    if name in ("tensor parallel", "modules", "plain value") and not _torch.SHARDS_HAVE_SECOND_DERIVATIVES:
        pytest.skip("torch itself has no second derivative of to_local before 2.13, and the layer says so")
    assert found[name] < TOLERANCE


OF_SLICES = [f"{name}, of each column{cut}" for name in ("Simplex", "GroupL1") for cut in ("", ", cut")]
SETS = [f"{mesh}{name}" for mesh in ("", "four ", "2 x 2 ") for name in OF_SLICES]
SETS += ["a set for each leaf" + how for how in ("", ", one whole", ", one free", ", second order")]
SETS += ["GroupL1, of each row", "batch_dims, GroupL1", "a set of one's own"]
SETS += ["Simplex, NaN in a column", "GroupL1, NaN in a column"]


@pytest.mark.parametrize("name", SETS)
def test_sets_of_slices_and_of_leaves_have_the_answer_of_one_process(found: dict[str, Any], name: str) -> None:
    # numbers below 10 in well-conditioned problems, whose sums are made in another order
    assert found[name] < 1e-12


MODELS = ["gauss_newton ConjugateGradient", "LevenbergMarquardt", "LevenbergMarquardt gauss_newton"]
PLACES = ["Shard(0)", "Shard(1)", "Replicate", "Shard(0), whole data"]
WITH_MODELS = [*(f"{name} {placed}" for name in MODELS for placed in PLACES)]
WITH_MODELS += ["gauss_newton Dense Shard(1)", "gauss_newton Dense Shard(0), whole data"]
WITH_MODELS += [f"{mesh} {name}" for mesh in ("four", "2 x 2") for name in MODELS[::2]]


@pytest.mark.parametrize("name", WITH_MODELS)
def test_an_objective_that_tells_its_model_has_the_gradient_of_one_process(found: dict[str, Any], name: str) -> None:
    # numbers below 10, whose sums are made in another order; both runs stop at the same step
    assert found[name] < 1e-12


@pytest.mark.parametrize("solvers", ["NewtonCG ConjugateGradient", "LBFGS ConjugateGradient", "NewtonCG Gmres"])
@pytest.mark.parametrize("placed", ["four {} Shard(0)", "four {} Shard(1)", "2 x 2 {}"])
def test_four_processes_give_the_gradient_of_one(found: dict[str, Any], solvers: str, placed: str) -> None:
    assert found[placed.format(solvers)] < TOLERANCE


IN_PARTS = [
    *("GradientDescent ConjugateGradient", "NewtonCG Minres", "LBFGS Gmres", "iMAML"),
    *("root Newton Gmres", "fixed_point AndersonAcceleration Bicgstab"),
    *("linear_solve of a function", "hvp", "hessian_operator", "Box", "L1", "Ball", "gauss_newton"),
    *("Simplex", "Simplex, of each row", "Simplex, of each column, cut", "GroupL1, of each column, cut"),
    "a set for each leaf",
]


@pytest.mark.parametrize("solvers", IN_PARTS)
def test_no_process_makes_a_vector_of_all_unknowns(found: dict[str, Any], solvers: str) -> None:
    assert found[f"memory {solvers}"] == "1 / 4 of the unknowns"


MAPPED = ("vmap", "vmap of a plain theta", "jvp")
REFUSED = {
    "FSDP2 inside": (
        "RuntimeError",
        "got mixed torch.Tensor and DTensor",
        "x a dict with ['0.weight']",
        "a module under fully_shard (FSDP2)",
    ),
    "unannounced rows": ("ObjectiveError", "has another value on every process", "distribute_tensor(data, mesh"),
    "root, unannounced rows": ("ObjectiveError", "has another value in leaf 0 of x", "distribute_tensor(data, mesh"),
    "a maximum": ("IndefiniteError", "at a maximum of the objective"),
    "a maximum within a set": ("IndefiniteError", "bends down along a direction that the constraint leaves free"),
    "outside of a set": ("InfeasibleError", "does not satisfy the constraint: its distance is 1.5"),
    "outside of a set, in parts": ("InfeasibleError", "does not satisfy the constraint: its distance is 1.5"),
    "a set with NaN on one process": ("ValueError", "lower=nan (an entry of it) must be a number"),
    "an empty box on one process": ("ValueError", "must not be above", "the box is empty"),
    "an old torch": ("ImplicitLayerWarning", "has no second derivatives of DTensor.to_local() and full_tensor()"),
    "iMAML, a matrix as its strength": ("ValueError", "weighs all entries of phi together", "a strength for each"),
    "MatrixStrength of a DTensor": ("ValueError", "weighs all entries of phi together", "a strength for each"),
    "a kink": ("KinkError", "1 of its entries are at a border of the regularizer"),
    "root, too few equations": ("ObjectiveError", "expected shapes [(3, 4), (4, 2)], got [(3, 4)]"),
    "summed by hand": ("ObjectiveError", "has another gradient in leaf", ".to_local()"),
    **dict.fromkeys(MAPPED, ("UnsupportedTransformError", "vmap over a layer that is given DTensors", "batch_dims=")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_possible_with_dtensors_is_refused_with_a_remedy(found: dict[str, Any], name: str) -> None:
    error, *words = REFUSED[name]
    words = words[:1] if name == "FSDP2 inside" and sys.version_info < (3, 11) else words  # an error without notes
    assert found[name].startswith(f"{error}: ") and all(word in found[name] for word in words), found[name]


def test_negative_curvature_is_told_with_its_numbers(found: dict[str, Any]) -> None:
    # the Hessian is -2 I
    assert (
        found["negative curvature"].startswith("IndefiniteError")
        and "p'Ap/p'p = -2 <= 0" in found["negative curvature"]
    )


def test_the_page_lists_what_was_found(found: dict[str, Any]) -> None:
    page = DOCS.read_text(encoding="utf-8").split("## Training")[0]
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    told = {line.split("|")[1].strip(" `"): line.split("|")[3].strip() for line in rows}
    assert told.keys() == found.keys(), told.keys() ^ found.keys()
    for name, value in found.items():
        if "collectives" in str(value) and not _torch.SHARDS_HAVE_SECOND_DERIVATIVES:
            continue  # an older torch redistributes once more
        right = "same" if isinstance(value, float) else value if value[0].isdigit() else f"`{value.split(':')[0]}`"
        assert told[name].startswith(right), (name, value)
