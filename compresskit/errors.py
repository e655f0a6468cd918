"""Every error that compresskit raises on purpose.

Each says what was asked, what was found and what to do. Each is also the builtin exception that it
resembles, so callers may catch either.
"""


class CompresskitError(Exception):
    """Base of all errors that a user can cause and mend."""


class UnknownNameError(CompresskitError, LookupError):
    """A decomposition, structure or option of this name does not exist."""


class OptionError(CompresskitError, ValueError):
    """An option has a value that it cannot take."""


class StructureError(CompresskitError, ValueError):
    """The sizes of a factorisation are impossible or do not fit the weight."""


class WeightError(CompresskitError, ValueError):
    """A weight cannot be factorised: not a real floating-point matrix, or it holds NaN or infinity."""


class ImportanceError(CompresskitError, ValueError):
    """Second moments or weights of a layer's inputs and outputs are no such thing, or of another layer."""


class PlanError(CompresskitError, ValueError):
    """A pattern, rule or plan does not fit the model."""


class BudgetError(CompresskitError, ValueError):
    """The size that was asked for cannot be reached."""


class CheckpointError(CompresskitError, ValueError):
    """A checkpoint is missing, damaged, or not one that this version reads."""


class OutputError(CompresskitError, OSError):
    """The output could not be written."""


class DataError(CompresskitError, ValueError):
    """Data of a task is missing, malformed, or does not fit the task or the model."""


class CalibrationError(CompresskitError, ValueError):
    """Calibration has no data to go by, met values that are not finite, or was made for another model."""


class KernelError(CompresskitError, RuntimeError):
    """The compiled kernel cannot be made here."""


class TrainingError(CompresskitError, RuntimeError):
    """Training cannot start, cannot be resumed, or has diverged."""


class DistillError(CompresskitError, ValueError):
    """Teacher, student, objective and data do not fit together."""


class LossError(CompresskitError, ArithmeticError):
    """A term of the objective is not a finite number."""


class CacheError(CompresskitError, OSError):
    """The teacher's cache cannot hold what it should, or its folder holds something else."""
