"""Put an optimizer inside a PyTorch model: differentiable argmin layers around any solver, and implicit MAML."""

import importlib
import importlib.util
import typing

from implicitlayer import fewshot as fewshot
from implicitlayer import meta as meta
from implicitlayer import sets as sets
from implicitlayer import solvers as solvers
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
from implicitlayer.api import ArgminLayer, DeepEquilibrium, FixedPointLayer, RootLayer, argmin, fixed_point, root, value
from implicitlayer.base._active_set import ActiveSet
from implicitlayer.base._records import BackwardRecord, ForwardRecord, GradientError, diagnostics
from implicitlayer.base._solution import LinearSolution, RecordingSolver, SolverResult
from implicitlayer.base._status import Status
from implicitlayer.compiled import CompiledLayer, compile
from implicitlayer.constrained import ConstrainedLayer, CvxpyLayer, Multipliers, constrained_argmin, from_cvxpy, qp
from implicitlayer.equation import (
    Assumptions,
    Composite,
    HessianOperator,
    composite,
    hessian_operator,
    hvp,
    least_squares,
    linear_solve,
)
from implicitlayer.explain import GradientExplanation, explain_gradient
from implicitlayer.layer import (
    Bregman,
    ImplicitArgmin,
    ImplicitLayer,
    LearnedStrength,
    MatrixStrength,
    OperatorStrength,
    Proximal,
    bregman,
    proximal,
)
from implicitlayer.linear import (
    Bicgstab,
    ConjugateGradient,
    Dense,
    FlatOperator,
    Gmres,
    Jacobi,
    LinearSolver,
    Minres,
    Neumann,
    NormalEquations,
    Nystrom,
    WarmStart,
)
from implicitlayer.outer import BilevelResult, bilevel
from implicitlayer.programs import ActiveConstraints
from implicitlayer.sets._regularizers import L1, ElasticNet, GroupL1
from implicitlayer.sets._set import Prox

if typing.TYPE_CHECKING:
    from implicitlayer import testing as testing
    from implicitlayer.outer._search_cv import ImplicitSearchCV as ImplicitSearchCV

__version__ = "0.1.0"

__all__ = [
    "L1",
    "ActiveConstraints",
    "ActiveSet",
    "ArgminLayer",
    "Assumptions",
    "BackwardRecord",
    "Bicgstab",
    "BilevelResult",
    "Bregman",
    "ClosureError",
    "CompiledLayer",
    "Composite",
    "ConjugateGradient",
    "ConstrainedLayer",
    "ConvergenceWarning",
    "CvxpyLayer",
    "DeepEquilibrium",
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
    "ImplicitSearchCV",
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
    "bilevel",
    "bregman",
    "compile",
    "composite",
    "constrained_argmin",
    "diagnostics",
    "explain_gradient",
    "fewshot",
    "fixed_point",
    "from_cvxpy",
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
    "value",
]


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # a finder that forbids it
        return False


# `from implicitlayer import *` takes what the installation has; asked for by name, the rest says which extra it needs.
if not _installed("hypothesis"):
    __all__.remove("testing")
if not _installed("sklearn"):
    __all__.remove("ImplicitSearchCV")


def __getattr__(name: str) -> object:
    if name == "testing":  # imported when first used: Hypothesis is an extra
        return importlib.import_module("implicitlayer.testing")
    if name == "ImplicitSearchCV":  # so is scikit-learn
        return importlib.import_module("implicitlayer.outer._search_cv").ImplicitSearchCV
    moved = " any more: it is examples/paper/train.py of the source" if name == "experiments" else ""
    raise AttributeError(f"module 'implicitlayer' has no attribute {name!r}{moved}")
