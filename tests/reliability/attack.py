"""Attack the command line: kills, two commands at once, damage, wrong settings and wrong data.

    python tests/reliability/attack.py --seconds 600 --comparisons 3 --seed 1

Each command is a fork of this process, which has imported everything. The last line counts what was
tried, recovered (the record is that of an undisturbed run) and refused (one clear line), and what
must not be: tracebacks, and wrong things that were taken without a word.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from commands import COMMAND, Attack, comparable
from comparisons import Comparison, disturb_a_comparison
from sklearn.datasets import load_digits

from regdrop.experiments.running.integrity import list_checkpoints
from regdrop.integrations.transformers import RDropTrainer
from regdrop.tasks import PRESETS
from regdrop.tasks.configure import change_task
from text_data import write_encoder, write_glue, write_rows


def disturb_a_run(attack: Attack) -> None:
    """Kill a run at random times, with another beside it and with damage, until it is done."""
    folder = attack.folder / f"run-{attack.number}"
    command = [*COMMAND, "--output", str(folder), "--resume"]
    said = []
    for _ in range(20):
        processes = [attack.start(command) for _ in range(attack.random.choice((1, 1, 2)))]
        if attack.random.random() < 0.7:
            time.sleep(attack.random.uniform(0.0, 2.5))
            os.kill(attack.random.choice(processes)[0], signal.SIGKILL)
        for process, log in processes:
            os.waitpid(process, 0)
            said.append(log.read_text(errors="replace") if log.exists() else "")
        if (folder / "record.json").exists():
            break
        damage_newest(attack, folder / "unfinished")
    if any("Traceback (most recent" in text for text in said):
        attack.note("tracebacks", f"{command}: {said[-1][-2000:]}")
        return
    is_right = (folder / "record.json").exists() and comparable(folder) == attack.right
    left = sorted(x.name for x in folder.iterdir()) if folder.exists() else []
    if is_right and left == ["model", "record.json"]:
        attack.note("recovered", "")
    else:
        attack.note("silent", f"{folder}: right {is_right}, holds {left}; {said[-1][-500:]}")
    shutil.rmtree(folder, ignore_errors=True)


def damage_newest(attack: Attack, work: Path) -> None:
    """Cut, empty or remove a file of the newest checkpoint, now and then."""
    checkpoints = list_checkpoints(work)
    if not checkpoints or attack.random.random() < 0.6:
        return
    files = sorted(path for path in checkpoints[-1].iterdir() if path.is_file())
    if not files:
        return
    path = attack.random.choice(files)
    content = path.read_bytes()
    kind = attack.random.choice(("cut", "empty", "remove"))
    if kind == "remove":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if kind == "cut" else b"")


# Wrong for whatever a field may take.
WRONG = (math.nan, math.inf, -math.inf, [{}], {"a": [1]}, "\x00\x00", [None])


def set_a_wrong_option(attack: Attack) -> None:
    """Set a field of a preset to what it cannot be."""
    task = PRESETS[attack.random.choice(sorted(PRESETS))]
    prefix, holder = attack.random.choice(
        (("", task), ("training.", task.training), ("rdrop.", task.rdrop))
    )
    name = prefix + attack.random.choice([field.name for field in fields(holder)])
    value = attack.random.choice(WRONG)
    text_fields = ("description", "dataset", "source", "target", "model", "dataset_config")
    if name in ("model_config", *text_fields, "training.optim_args") and not isinstance(
        value, (float, list)
    ):
        value = [{}]
    elif name in ("training.optim", "training.lr_scheduler_type"):  # known to transformers alone
        value = math.nan
    setting = f"{name}={json.dumps(value)}"
    try:
        change_task(task, settings=[setting])
    except ValueError:
        attack.note("refused", "")
    except Exception:
        attack.note("tracebacks", f"{task.name} {setting}: {traceback.format_exc()[-500:]}")
    else:
        attack.note("silent", f"{task.name} {setting}")


def give_wrong_data(attack: Attack) -> None:
    """Put something wrong into a row, or a file, of one split."""
    folder = attack.folder / f"data-{attack.counts['tried']}"
    write_glue(folder / "data", "cola")
    split = attack.random.choice(("train", "validation"))
    path = folder / "data" / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = attack.random.randrange(len(rows))
    wrong = attack.random.choice(
        (
            {"sentence": None},
            {"label": None},
            {"label": 2},
            {"label": -1},
            {"label": 10**6},
            {"label": "many"},
            {"label": ["a"]},
            {"sentence": ["a"]},
            {"sentence": 3},
            {"sentence": {"a": "b"}},
        )
    )
    kind = attack.random.choice(
        ("row", "row", "column", "empty", "cut", "mark", "two", "one class")
    )
    if kind == "row":
        rows[row].update(wrong)
    elif kind == "column":
        for each in rows:
            del each["label"]
    elif kind == "one class":
        path = folder / "data" / "train.jsonl"
        rows = [{"sentence": "good", "label": 1}] * 20
    write_rows(path, rows)
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[: -attack.random.randrange(4, 20)])
    elif kind == "mark":
        path.write_bytes(b"\xef\xbb\xbf" + content)
    elif kind == "two":
        (folder / "data" / f"{split}.csv").write_text("sentence,label\ngood,1\n")
    task = replace(
        PRESETS["minilm-cola"],
        dataset=str(folder / "data"),
        model=str(write_encoder(folder / "model")),
        train_examples=None,
    )
    what = f"{kind} {wrong if kind == 'row' else ''} in row {row} of {split}"
    try:
        prepared = task.prepare()
        for name in prepared.splits:
            list(prepared.splits[name])
    except ValueError:
        attack.note("refused", "")
    except Exception:
        attack.note("tracebacks", f"{what}: {traceback.format_exc()[-1500:]}")
    else:
        attack.note("silent", what)
    shutil.rmtree(folder)


def main(seconds: float, comparisons: int, seed: int) -> Counter[str]:
    """Attack for so long, and so many comparisons after that; return the counts."""
    torch.set_num_threads(1)
    load_digits()
    assert RDropTrainer
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        import datasets

        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        datasets.disable_progress_bars()
        attack = Attack(seed, folder)
        while time.monotonic() < end:
            disturb_a_run(attack)
            for _ in range(50):
                set_a_wrong_option(attack)
            for _ in range(3):
                give_wrong_data(attack)
        if comparisons:
            comparison = Comparison.undisturbed(attack)
            for number in range(comparisons):
                disturb_a_comparison(attack, comparison, number)
    return attack.counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--comparisons", type=int, default=0, help="each takes minutes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = main(options.seconds, options.comparisons, options.seed)
    names = ("tried", "recovered", "refused", "tracebacks", "silent")
    print(", ".join(f"{counts[name]} {name}" for name in names))
    sys.exit(bool(counts["tracebacks"] or counts["silent"]))
