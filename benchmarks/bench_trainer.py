"""What RDropTrainer adds to a step beyond its passes and its loss, and to an evaluation.

    python benchmarks/bench_trainer.py            # about three minutes
    python benchmarks/bench_trainer.py --quick    # to see that it runs

A small BERT on random words, one process. Every way trains and evaluates in turn, several times;
the figures are ratios of medians. R-Drop on a batch is set against the plain Trainer on the batch
stacked: the same work but for the loss.
"""

import argparse
import json
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from regdrop import RDropConfig
from regdrop.experiments.record import describe_hardware, library_versions
from regdrop.integrations.transformers import RDropTrainer

ROOT = Path(__file__).resolve().parent.parent
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "bench_trainer.json")
    arguments = parser.parse_args()
    steps, repeats = (5, 1) if arguments.quick else (24, 7)
    console = Console()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in track(range(repeats), "measuring", console=console):
            for name, (batch, rdrop) in WAYS.items():
                times[name].append(measure(batch, rdrop, steps, folder))
    step = {name: statistics.median(t for t, _ in found) for name, found in times.items()}
    evaluation = {name: statistics.median(t for _, t in found) for name, found in times.items()}
    table = Table("way", "against", "step", "evaluation")
    ratios = []
    for way, other in RATIOS:
        pair = step[way] / step[other], evaluation[way] / evaluation[other]
        ratios.append({"way": way, "against": other, "step": pair[0], "evaluation": pair[1]})
        table.add_row(way, other, f"{pair[0]:.3f}x", f"{pair[1]:.3f}x")
    console.print(table)
    record = {
        "command": "python benchmarks/bench_trainer.py" + (" --quick" if arguments.quick else ""),
        "date": date.today().isoformat(),
        "repeats": repeats,
        "steps": steps,
        "versions": library_versions(),
        "hardware": describe_hardware(),
        "ratios": ratios,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
