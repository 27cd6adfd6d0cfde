"""Training: `run` does everything for one configuration in one folder, `evaluate` scores a finished run again."""

from gdpd.training.checkpoint import CheckpointError, CheckpointWarning
from gdpd.training.history import History, Progress
from gdpd.training.loop import TrainingDiverged
from gdpd.training.progress import RichProgress
from gdpd.training.run_folder import evaluate, run, train_teacher_only
from gdpd.training.stages import WeakTeacherError, WeakTeacherWarning

__all__ = [
    "CheckpointError",
    "CheckpointWarning",
    "History",
    "Progress",
    "RichProgress",
    "TrainingDiverged",
    "WeakTeacherError",
    "WeakTeacherWarning",
    "evaluate",
    "run",
    "train_teacher_only",
]
