"""What RDropTrainer adds to a step beyond its passes and its loss, and to an evaluation.

    python benchmarks/bench_trainer.py            # about two minutes
    python benchmarks/bench_trainer.py --quick    # to see that it runs

A small BERT on random words, one process. Every way trains and evaluates in turn, several times;
the ratios are taken round by round. R-Drop on a batch is set against the plain Trainer on the batch
stacked: the same work but for the loss.
"""

import statistics
import tempfile
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import recording
from measuring import ratio
from recording import Row
from regdrop import RDropConfig
from regdrop.integrations.transformers import RDropTrainer

BATCH, LENGTH, WORDS = 16, 64, 1000
SINGLE = RDropConfig(alpha=0.0, num_passes=1)
WAYS: dict[str, tuple[int, RDropConfig | None]] = {
    "Trainer": (BATCH, None),
    "RDropTrainer, one pass": (BATCH, SINGLE),
    "Trainer, twice the batch": (2 * BATCH, None),
    "RDropTrainer": (BATCH, RDropConfig(alpha=1.0)),
    "RDropTrainer, one backward": (BATCH, RDropConfig(alpha=1.0, backward_passes=1)),
    "RDropTrainer, a quarter": (BATCH, RDropConfig(alpha=1.0, fraction=0.25)),
}
RATIOS = [
    ("RDropTrainer, one pass", "Trainer"),
    ("RDropTrainer", "Trainer, twice the batch"),
    ("RDropTrainer", "Trainer"),
    ("RDropTrainer, one backward", "Trainer"),
    ("RDropTrainer, a quarter", "Trainer"),
]


class Stopwatch(TrainerCallback):
    """Keeps the time of every step but the first few, from end to end."""

    def __init__(self, warm_up: int = 3) -> None:
        self.warm_up = warm_up
        self.times: list[float] = []
        self.mark = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time since the last step."""
        now = time.perf_counter()
        if state.global_step > self.warm_up:
            self.times.append(now - self.mark)
        self.mark = now


def measure(batch: int, rdrop: RDropConfig | None, steps: int, folder: str) -> tuple[float, float]:
    """Return the median seconds of a step, and those of an evaluation."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        num_labels=3,
    )
    words = torch.randint(WORDS, (256, LENGTH))
    data = [{"input_ids": w, "labels": torch.tensor(i % 3)} for i, w in enumerate(words)]
    watch = Stopwatch()
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=64,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    common: dict[str, Any] = {
        "model": BertForSequenceClassification(config),
        "args": arguments,
        "train_dataset": data,
        "eval_dataset": data,
        "callbacks": [watch],
    }
    trainer = Trainer(**common) if rdrop is None else RDropTrainer(rdrop=rdrop, **common)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    start = time.perf_counter()
    trainer.evaluate()
    return statistics.median(watch.times), time.perf_counter() - start


COLUMNS = {"variant": "way", "against": "against", "step": "step", "evaluation": "evaluation"}


def main() -> None:
    options = recording.parser(__doc__, repeats=3)
    arguments = recording.parse(options)
    steps = 24
    if arguments.quick:
        steps = 5
    console = Console()
    step: dict[str, list[float]] = {name: [] for name in WAYS}
    evaluation: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in track(range(arguments.repeats), "measuring", console=console):
            for name, (batch, rdrop) in WAYS.items():
                seconds = measure(batch, rdrop, steps, folder)
                step[name].append(seconds[0])
                evaluation[name].append(seconds[1])
    rows: list[Row] = [
        {
            "variant": way,
            "against": other,
            "step": ratio(step[way], step[other]),
            "evaluation": ratio(evaluation[way], evaluation[other]),
        }
        for way, other in RATIOS
    ]
    recording.show(rows, COLUMNS, "ratios of times", console)
    recording.write(rows, arguments, console, steps=steps)


if __name__ == "__main__":
    main()
