"""Put an optimizer inside a PyTorch model: differentiable argmin layers around any solver, and implicit MAML."""

import importlib
import typing

from implicitlayer import fewshot as fewshot
from implicitlayer import meta as meta
from implicitlayer import sets as sets
from implicitlayer import solvers as solvers
from implicitlayer._active_set import ActiveSet
from implicitlayer._errors import (
    ClosureError,
    ConvergenceWarning,
    ImplicitLayerError,
    ImplicitLayerWarning,
    IndefiniteError,
    InfeasibleError,
    KinkError,
    KinkWarning,
    LinearSolveError,
    NonFiniteError,
    NotConvergedError,
    NotRecordedError,
    ObjectiveError,
    SingularError,
    SolverOutputError,
    StationarityError,
    StationarityWarning,
    UnboundedError,
    UnsupportedTransformError,
)
from implicitlayer._records import BackwardRecord, ForwardRecord, GradientError, diagnostics
from implicitlayer._solution import LinearSolution, RecordingSolver, SolverResult
from implicitlayer._status import Status
from implicitlayer.implicit import (
    ActiveConstraints,
    ArgminLayer,
    Assumptions,
    Bregman,
    Composite,
    ConstrainedLayer,
    FixedPointLayer,
    GradientExplanation,
    ImplicitArgmin,
    ImplicitLayer,
    LearnedStrength,
    MatrixStrength,
    Multipliers,
    OperatorStrength,
    Proximal,
    RootLayer,
    argmin,
    bregman,
    composite,
    constrained_argmin,
    explain_gradient,
    fixed_point,
    least_squares,
    proximal,
    qp,
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
from implicitlayer.sets._regularizers import L1, ElasticNet, GroupL1
from implicitlayer.sets._user import Prox

if typing.TYPE_CHECKING:
    from implicitlayer import testing as testing

__version__ = "0.1.0"

__all__ = [
    "L1",
    "ActiveConstraints",
    "ActiveSet",
    "ArgminLayer",
    "Assumptions",
    "BackwardRecord",
    "Bicgstab",
    "Bregman",
    "ClosureError",
    "Composite",
    "ConjugateGradient",
    "ConstrainedLayer",
    "ConvergenceWarning",
    "Dense",
    "ElasticNet",
    "FixedPointLayer",
    "FlatOperator",
    "ForwardRecord",
    "Gmres",
    "GradientError",
    "GradientExplanation",
    "GroupL1",
    "HessianOperator",
    "ImplicitArgmin",
    "ImplicitLayer",
    "ImplicitLayerError",
    "ImplicitLayerWarning",
    "IndefiniteError",
    "InfeasibleError",
    "Jacobi",
    "KinkError",
    "KinkWarning",
    "LearnedStrength",
    "LinearSolution",
    "LinearSolveError",
    "LinearSolver",
    "MatrixStrength",
    "Minres",
    "Multipliers",
    "Neumann",
    "NonFiniteError",
    "NormalEquations",
    "NotConvergedError",
    "NotRecordedError",
    "Nystrom",
    "ObjectiveError",
    "OperatorStrength",
    "Prox",
    "Proximal",
    "RecordingSolver",
    "RootLayer",
    "SingularError",
    "SolverOutputError",
    "SolverResult",
    "StationarityError",
    "StationarityWarning",
    "Status",
    "UnboundedError",
    "UnsupportedTransformError",
    "WarmStart",
    "argmin",
    "bregman",
    "composite",
    "constrained_argmin",
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
    "qp",
    "root",
    "sets",
    "solvers",
    "testing",
]


def __getattr__(name: str) -> object:
    if name in ("testing", "experiments"):  # imported when first used: Hypothesis, an extra; presets and runs
        return importlib.import_module(f"implicitlayer.{name}")
    raise AttributeError(f"module 'implicitlayer' has no attribute {name!r}")
