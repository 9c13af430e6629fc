"""Peak memory of a large translation set: its vocabulary, its encoding, its batches.

Writes a synthetic parallel corpus (words drawn by Zipf's law, about 24 a sentence), prepares it as
`regdrop train translation` does, and reads batches of one epoch. The process's peak memory is taken
after every stage.
"""

import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from recording import parse, parser, show, write
from regdrop.experiments import build_arms
from regdrop.experiments.running.building import build_trainer
from regdrop.tasks import PRESETS

_ROWS = 50_000


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_pairs(path: Path, pairs: int, seed: int) -> int:
    """Write a split and return the bytes of its text."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(generator.choice(letters, n)) for n in generator.integers(2, 9, 50_000)]
    schema, total = pa.schema([("de", pa.string()), ("en", pa.string())]), 0
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, pairs, _ROWS):
            rows = min(_ROWS, pairs - start)
            columns = []
            for _ in range(2):
                lengths = generator.poisson(24, rows) + 1
                drawn = np.minimum(generator.zipf(1.2, lengths.sum()), len(words)) - 1
                parts = np.split(drawn, np.cumsum(lengths)[:-1])
                columns.append([" ".join(words[i] for i in part) for part in parts])
            total += sum(len(text) for column in columns for text in column)
            writer.write_table(pa.table(columns, schema=schema))
    return total


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=2_000_000, help="sentence pairs")
    options.add_argument("--batches", type=int, default=200, help="batches that are read")
    arguments = parse(options)
    pairs = 4_000 if arguments.quick else arguments.pairs
    console, rows = Console(), []

    def note(stage: str, since: float) -> float:
        rows.append({"stage": stage, "peak MiB": round(peak_mib()), "seconds": time.time() - since})
        console.print(f"{stage}: {rows[-1]['peak MiB']:,} MiB, {rows[-1]['seconds']:.0f} s")
        return time.time()

    with tempfile.TemporaryDirectory() as folder:
        now = note("imports", time.time())
        data = Path(folder) / "data"
        data.mkdir()
        size = write_pairs(data / "train.parquet", pairs, 0)
        for name in ("validation", "test"):
            write_pairs(data / f"{name}.parquet", 100, 1)
        now = note("the corpus is written", now)
        preset = PRESETS["wmt14-en-de"]
        task = replace(preset, dataset=str(data), dataset_config=None, source="de", target="en")
        task = replace(task, training=replace(task.training, gradient_accumulation_steps=1))
        tiny = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
        tiny |= {
            f"{side}_{x}": n
            for side in ("encoder", "decoder")
            for x, n in (("attention_heads", 2), ("ffn_dim", 16))
        }
        task = replace(task, model_config={**task.model_config, **tiny})
        prepared = task.prepare(Path(folder) / "learned")
        now = note("the vocabulary is learned", now)
        train = prepared.splits["train"]
        now = note("the split is encoded", now)
        arm = build_arms(task)["baseline"]
        trainer = build_trainer(
            task,
            arm,
            0,
            Path(folder) / "work",
            prepared,
            prepared.build_model(),
            train=train,
            validation=prepared.splits["validation"],
        )
        loader = trainer.get_train_dataloader()
        now = note("batches are drawn", now)
        for _, batch in zip(range(arguments.batches), loader, strict=False):
            assert batch["input_ids"].numel() <= trainer.max_tokens
        note(f"{arguments.batches} batches are read", now)
        facts = {
            "kept_pairs": len(train),
            "batches_an_epoch": len(loader),
            "text_mib": round(size / 2**20),
        }
    columns = {"stage": "after", "peak MiB": "peak memory (MiB)", "seconds": "seconds"}
    show(rows, columns, f"{pairs:,} pairs, {facts['text_mib']:,} MiB of text", console)
    write(rows, arguments, console, **facts)


if __name__ == "__main__":
    main()
