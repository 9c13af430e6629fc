"""Attack the command line: kills, two commands at once, damage, wrong settings and wrong data.

    python tests/reliability/attack.py --seconds 600 --comparisons 3 --seed 1

Each command is a fork of this process, which has imported everything. The last line counts what was
tried, recovered (the record is that of an undisturbed run) and refused (one clear line), and what
must not be: tracebacks, and wrong things that were taken without a word.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from commands import COMMAND, Attack, comparable
from comparisons import Comparison, disturb_a_comparison
from sklearn.datasets import load_digits
from wrong_data import give_wrong_images, give_wrong_rows
from wrong_settings import set_a_wrong_option

from regdrop.experiments.running.integrity import list_checkpoints
from regdrop.integrations.transformers import RDropTrainer


def disturb_a_run(attack: Attack) -> None:
    """Kill a run at random times, with another beside it and with damage, until it is done."""
    folder = attack.folder / f"run-{attack.number}"
    command = [*COMMAND, "--output", str(folder), "--resume"]
    said = []
    for turn in range(20):
        count = 2 if turn == 0 else attack.random.choice((1, 1, 2))
        processes = [attack.start(command) for _ in range(count)]
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


def main(seconds: float, comparisons: int, seed: int) -> Counter[str]:
    """Attack for so long, and so many comparisons after that; return the counts."""
    torch.set_num_threads(1)
    load_digits()
    assert RDropTrainer
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        os.environ["XDG_CACHE_HOME"] = str(folder / "kept")
        import datasets

        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        datasets.disable_progress_bars()
        attack = Attack(seed, folder)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            disturb_a_run(attack)
            for _ in range(100):
                set_a_wrong_option(attack)
            for _ in range(3):
                give_wrong_rows(attack)
                give_wrong_images(attack)
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
