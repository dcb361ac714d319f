"""Put an optimizer inside a PyTorch model: differentiable argmin layers around any solver, and implicit MAML."""

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
    ObjectiveError,
    SingularError,
    SolverOutputError,
    StationarityError,
    StationarityWarning,
    UnsupportedTransformError,
)
from implicitlayer._records import BackwardRecord, ForwardRecord, diagnostics
from implicitlayer._solution import LinearSolution, SolverResult
from implicitlayer._status import Status
from implicitlayer.implicit import (
    ArgminLayer,
    ImplicitArgmin,
    ImplicitLayer,
    Proximal,
    argmin,
    fixed_point,
    proximal,
    root,
)
from implicitlayer.linear import (
    ConjugateGradient,
    FlatOperator,
    HessianOperator,
    LinearSolver,
    hessian_operator,
    hvp,
    linear_solve,
)

__version__ = "0.1.0"

__all__ = [
    "ArgminLayer",
    "BackwardRecord",
    "ClosureError",
    "ConjugateGradient",
    "ConvergenceWarning",
    "FlatOperator",
    "ForwardRecord",
    "HessianOperator",
    "ImplicitArgmin",
    "ImplicitLayer",
    "ImplicitLayerError",
    "ImplicitLayerWarning",
    "IndefiniteError",
    "LinearSolution",
    "LinearSolveError",
    "LinearSolver",
    "NonFiniteError",
    "NotConvergedError",
    "ObjectiveError",
    "Proximal",
    "SingularError",
    "SolverOutputError",
    "SolverResult",
    "StationarityError",
    "StationarityWarning",
    "Status",
    "UnsupportedTransformError",
    "argmin",
    "diagnostics",
    "fewshot",
    "fixed_point",
    "hessian_operator",
    "hvp",
    "linear_solve",
    "meta",
    "proximal",
    "root",
    "solvers",
]
