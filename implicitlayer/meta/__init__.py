"""Meta-learning: implicit MAML and its relatives behind one interface, and a trainer that resumes."""

from implicitlayer.meta._callbacks import Callback
from implicitlayer.meta._checkpoint import CheckpointError, load_checkpoint, save_checkpoint, save_json
from implicitlayer.meta._distributed import WorkerGroup, WorkerLostError, distributed
from implicitlayer.meta._figure import plot_episode, plot_learning_curves
from implicitlayer.meta._first_order import FirstOrderMAML, Reptile
from implicitlayer.meta._head import ANIL, ProtoNet
from implicitlayer.meta._imaml import iMAML
from implicitlayer.meta._method import MetaMethod, TaskLoss
from implicitlayer.meta._monitor import CollapseError, CollapseWarning, PeakMemory, peak_memory
from implicitlayer.meta._statistics import Evaluation, evaluate
from implicitlayer.meta._tasks import TaskSampler, as_support_query, cosine_decay
from implicitlayer.meta._trainer import Trainer
from implicitlayer.meta._unrolled import MAML, TruncatedMAML

__all__ = [
    "ANIL", "MAML", "Callback", "CheckpointError", "CollapseError", "CollapseWarning", "Evaluation", "FirstOrderMAML",
    "MetaMethod", "PeakMemory", "ProtoNet", "Reptile", "TaskLoss", "TaskSampler", "Trainer", "TruncatedMAML",
    "WorkerGroup", "WorkerLostError", "as_support_query", "cosine_decay", "distributed", "evaluate", "iMAML",
    "load_checkpoint", "peak_memory", "plot_episode", "plot_learning_curves", "save_checkpoint", "save_json",
]  # fmt: skip
