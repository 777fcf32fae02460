"""Every error that this library raises on purpose.

    SurgeryError
    ├── RateError         (ValueError)  a block or a rate that does not exist
    ├── TensorError       (ValueError)  q, k, v or a feature map with the wrong shape, dtype or device
    ├── ModelError        (ValueError)  no supported transformer, or converted already
    ├── ConfigError       (ValueError)  an option outside its range
    ├── DataError         (ValueError)  prompts, captions, videos, clips
    ├── SelectionError    (ValueError)  a budget that no choice of rates meets
    ├── EvaluationError   (ValueError)  scores, results files, video sets
    ├── StudyError        (ValueError)  folders, votes
    ├── CheckpointError                 a file that is damaged, foreign, newer or does not fit
    ├── BenchmarkError                  a way of computing attention that is wrong or does not run
    ├── RunError                        a run folder made with other settings, a file that cannot be written
    └── DivergenceError                 a loss that is not finite

Each message says what was got, what was expected, and the fix.
"""


class SurgeryError(Exception):
    """Root of the tree above."""


class RateError(SurgeryError, ValueError):
    """A block or a rate that does not exist."""


class TensorError(SurgeryError, ValueError):
    """q, k, v or a feature map with the wrong shape, dtype or device."""


class ModelError(SurgeryError, ValueError):
    """A model that is no supported transformer, or is (not) converted already."""


class ConfigError(SurgeryError, ValueError):
    """An option outside its range."""


class DataError(SurgeryError, ValueError):
    """Prompts, captions, videos or clips that cannot be used."""


class SelectionError(SurgeryError, ValueError):
    """A budget that no choice of rates meets."""


class EvaluationError(SurgeryError, ValueError):
    """Scores, results files or sets of videos that cannot be judged."""


class StudyError(SurgeryError, ValueError):
    """Folders or votes that a preference study cannot use."""


class CheckpointError(SurgeryError):
    """A checkpoint that is damaged, foreign, of a newer format, or does not fit the model."""


class BenchmarkError(SurgeryError):
    """A benchmark some of whose cases are wrong or do not run; the others are measured and written."""


class RunError(SurgeryError):
    """A run folder made with other settings or another base model, or a file that cannot be written."""


class DivergenceError(SurgeryError):
    """A loss that became NaN or infinite; the last good state is kept."""
