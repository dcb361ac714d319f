"""Put an optimizer inside a PyTorch model: differentiable argmin layers around any solver, and implicit MAML."""

import importlib
import typing

from implicitlayer import fewshot as fewshot
from implicitlayer import meta as meta
from implicitlayer import solvers as solvers
from implicitlayer._errors import (
    ClosureError,
    ConvergenceWarning,
    ImplicitLayerError,
    ImplicitLayerWarning,
    IndefiniteError,
    LinearSolveError,
    NonFiniteError,
    NotConvergedError,
    NotRecordedError,
    ObjectiveError,
    SingularError,
    SolverOutputError,
    StationarityError,
    StationarityWarning,
    UnsupportedTransformError,
)
from implicitlayer._records import BackwardRecord, ForwardRecord, GradientError, diagnostics
from implicitlayer._solution import LinearSolution, RecordingSolver, SolverResult
from implicitlayer._status import Status
from implicitlayer.implicit import (
    ArgminLayer,
    Assumptions,
    Composite,
    FixedPointLayer,
    GradientExplanation,
    ImplicitArgmin,
    ImplicitLayer,
    Proximal,
    RootLayer,
    argmin,
    composite,
    explain_gradient,
    fixed_point,
    least_squares,
    proximal,
    root,
)
from implicitlayer.linear import (
    Bicgstab,
    ConjugateGradient,
    Dense,
    FlatOperator,
    Gmres,
    HessianOperator,
    Jacobi,
    LinearSolver,
    Minres,
    Neumann,
    NormalEquations,
    Nystrom,
    WarmStart,
    hessian_operator,
    hvp,
    linear_solve,
)

if typing.TYPE_CHECKING:
    from implicitlayer import testing as testing

__version__ = "0.1.0"

__all__ = [
    "ArgminLayer",
    "Assumptions",
    "BackwardRecord",
    "Bicgstab",
    "ClosureError",
    "Composite",
    "ConjugateGradient",
    "ConvergenceWarning",
    "Dense",
    "FixedPointLayer",
    "FlatOperator",
    "ForwardRecord",
    "Gmres",
    "GradientError",
    "GradientExplanation",
    "HessianOperator",
    "ImplicitArgmin",
    "ImplicitLayer",
    "ImplicitLayerError",
    "ImplicitLayerWarning",
    "IndefiniteError",
    "Jacobi",
    "LinearSolution",
    "LinearSolveError",
    "LinearSolver",
    "Minres",
    "Neumann",
    "NonFiniteError",
    "NormalEquations",
    "NotConvergedError",
    "NotRecordedError",
    "Nystrom",
    "ObjectiveError",
    "Proximal",
    "RecordingSolver",
    "RootLayer",
    "SingularError",
    "SolverOutputError",
    "SolverResult",
    "StationarityError",
    "StationarityWarning",
    "Status",
    "UnsupportedTransformError",
    "WarmStart",
    "argmin",
    "composite",
    "diagnostics",
    "explain_gradient",
    "fewshot",
    "fixed_point",
    "hessian_operator",
    "hvp",
    "least_squares",
    "linear_solve",
    "meta",
    "proximal",
    "root",
    "solvers",
    "testing",
]


def __getattr__(name: str) -> object:
    if name == "testing":  # imported when first used: it needs Hypothesis, an extra
        return importlib.import_module("implicitlayer.testing")
    raise AttributeError(f"module 'implicitlayer' has no attribute {name!r}")
