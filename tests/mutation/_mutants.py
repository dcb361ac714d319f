"""All seeded faults."""

# Equivalent changes do not count: a wrong metric of a proximal objective, say, is a worse preconditioner and no more,
# as long as solves run to their tolerance; a finished lane that is stepped on comes nearer to its solution.

from mutation._mutants_layer import LAYER_MUTANTS
from mutation._mutants_linear import LINEAR_MUTANTS
from mutation._mutants_solvers import SOLVER_MUTANTS

MUTANTS = [*LAYER_MUTANTS, *LINEAR_MUTANTS, *SOLVER_MUTANTS]
