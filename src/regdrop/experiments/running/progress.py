"""How runs tell of their progress."""

import logging
import warnings
from typing import NamedTuple, Protocol

from regdrop.experiments.recording.record import RunRecord


class Update(NamedTuple):
    """Progress of a run: its last step and what was logged there."""

    arm: str
    seed: int
    step: int
    metrics: dict[str, float]


class Display(Protocol):
    """What shows a comparison while it runs."""

    def update(self, update: Update) -> None:
        """Show the progress of a run."""

    def finish(self, record: RunRecord) -> None:
        """Show that a run is done."""

    def say(self, text: str) -> None:
        """Show a line."""


def quiet_libraries() -> None:
    """Leave the showing of progress to the display."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    # Beside what may matter, transformers says how it sorts, loads and shards its checkpoints,
    # that a new head is new (a missing encoder is our own error) and that tied weights are tied.
    for name in (
        "accelerate",
        "transformers.trainer_utils",
        "transformers.distributed",
        "transformers.modeling_utils",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("transformers.trainer").addFilter(_is_not_about_tied_weights)
    # transformers looks for pinned memory on machines without an accelerator.
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _is_not_about_tied_weights(record: logging.LogRecord) -> bool:
    return "There were missing keys in the checkpoint model loaded" not in record.getMessage()
