"""Inner solvers that obey the solver protocol ``solver(objective, init, *theta) -> x``."""

from implicitlayer.solvers._gradient_descent import GradientDescent
from implicitlayer.solvers._scipy import SciPyMinimize
from implicitlayer.solvers._torch_optimizer import TorchOptimizer

__all__ = ["GradientDescent", "SciPyMinimize", "TorchOptimizer"]
