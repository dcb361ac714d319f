"""Put an optimizer inside a PyTorch model: differentiable argmin layers around any solver, and implicit MAML."""

import importlib
import importlib.util
import typing

from implicitlayer import _errors, api, compiled, constrained, equation, explain, layer, linear, outer, programs
from implicitlayer import fewshot as fewshot
from implicitlayer import meta as meta
from implicitlayer import sets as sets
from implicitlayer import solvers as solvers
from implicitlayer._errors import *
from implicitlayer.api import *
from implicitlayer.base._records import BackwardRecord, ForwardRecord, GradientError, diagnostics
from implicitlayer.base._solution import ActiveSet, LinearSolution, RecordingSolver, SolverResult
from implicitlayer.base._status import Status
from implicitlayer.compiled import *
from implicitlayer.constrained import *
from implicitlayer.equation import *
from implicitlayer.explain import *
from implicitlayer.layer import *
from implicitlayer.linear import *
from implicitlayer.outer import *
from implicitlayer.programs import *
from implicitlayer.sets._regularizers import L1, ElasticNet, GroupL1
from implicitlayer.sets._set import Prox

if typing.TYPE_CHECKING:
    from implicitlayer import testing as testing
    from implicitlayer.outer._search_cv import ImplicitSearchCV as ImplicitSearchCV

__version__ = "0.1.0"

__all__ = [
    "L1",
    "ActiveSet",
    "BackwardRecord",
    "ElasticNet",
    "ForwardRecord",
    "GradientError",
    "GroupL1",
    "ImplicitSearchCV",
    "LinearSolution",
    "Prox",
    "RecordingSolver",
    "SolverResult",
    "Status",
    "diagnostics",
    "fewshot",
    "meta",
    "sets",
    "solvers",
    "testing",
]
# what these rooms list is reached as il.*
__all__ += _errors.__all__
__all__ += api.__all__
__all__ += compiled.__all__
__all__ += constrained.__all__
__all__ += equation.__all__
__all__ += explain.__all__
__all__ += layer.__all__
__all__ += linear.__all__
__all__ += outer.__all__
__all__ += programs.__all__


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
