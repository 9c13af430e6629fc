"""The mean loss since the last log, through a checkpoint between two logs."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regdrop.experiments.recording.files import read_object, write_json
from regdrop.experiments.recording.history import TRAINING_LOSS, check_finite
from regdrop.experiments.running.integrity import written_checkpoint
from regdrop.integrations.transformers.internals import go_on_from_log, loss_since_log

_NAME = "running_loss.json"


class RunningLoss(TrainerCallback):
    """Keeps in checkpoints what the Trainer (as of 5.24) forgets there.

    Without it the first loss that a resumed run logs is the mean since its checkpoint.

    Args:
        trainer: The trainer.
        checkpoint: What the run goes on from; None for its start.
    """

    def __init__(self, trainer: Any, checkpoint: Path | None) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the sum of a checkpoint."""
        path = None if self.checkpoint is None else self.checkpoint / _NAME
        if path is not None and path.exists():
            kept = read_object(path, "the loss since the last log of a run")
            go_on_from_log(self.trainer, kept["sum"], kept["since"])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the sum, its mean over processes, as each of them takes it up.

        Raises:
            DivergedError: If it is no finite number.
        """
        total, since = loss_since_log(self.trainer)
        mean = self.trainer.accelerator.gather(total).mean().item()
        check_finite({TRAINING_LOSS: mean}, state.global_step)
        if state.is_world_process_zero:
            write_json(written_checkpoint(args, state) / _NAME, {"sum": mean, "since": since})
