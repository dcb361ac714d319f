"""Inner solvers that obey the solver protocol ``solver(objective, init, *theta) -> x``."""

from implicitlayer.programs._backends import DAQP, OSQP, ActiveSet, Clarabel, Moreau, ProxQP, QPSolvers
from implicitlayer.solvers._accelerated_gradient import AcceleratedGradient
from implicitlayer.solvers._anderson import AndersonAcceleration
from implicitlayer.solvers._gradient_descent import GradientDescent
from implicitlayer.solvers._interior_point import InteriorPoint
from implicitlayer.solvers._lbfgs import LBFGS
from implicitlayer.solvers._levenberg_marquardt import LevenbergMarquardt
from implicitlayer.solvers._newton_cg import NewtonCG
from implicitlayer.solvers._progress import Iteration
from implicitlayer.solvers._proximal_gradient import ProjectedGradient, ProximalGradient
from implicitlayer.solvers._roots import Broyden, Newton
from implicitlayer.solvers._scipy import SciPyMinimize
from implicitlayer.solvers._sqp import SQP
from implicitlayer.solvers._torch_optimizer import TorchOptimizer

__all__ = [
    "DAQP",
    "LBFGS",
    "OSQP",
    "SQP",
    "AcceleratedGradient",
    "ActiveSet",
    "AndersonAcceleration",
    "Broyden",
    "Clarabel",
    "GradientDescent",
    "InteriorPoint",
    "Iteration",
    "LevenbergMarquardt",
    "Moreau",
    "Newton",
    "NewtonCG",
    "ProjectedGradient",
    "ProxQP",
    "ProximalGradient",
    "QPSolvers",
    "SciPyMinimize",
    "TorchOptimizer",
]
