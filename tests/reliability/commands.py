"""Commands as forks of this process, which has imported everything; what an attack counts."""

import json
import os
import random
import sys
import traceback
from collections import Counter
from pathlib import Path

from regdrop.commands import app
from regdrop.tasks import PRESETS


def small(steps: int) -> list[str]:
    """Return the options of a command that trains a small model on the digits for a few steps."""
    model = {**PRESETS["digits"].model_config, "num_hidden_layers": 1, "hidden_size": 16}
    settings = {"training.eval_steps": 2, "training.logging_steps": 3, "model_config": model}
    given = [
        x for name, value in settings.items() for x in ("--set", f"{name}={json.dumps(value)}")
    ]
    return ["--steps", str(steps), *given]


COMMAND = ["train", "digits", *small(steps=8)]


class Attack:
    """What an attack needs: its random numbers, its folder and its counts."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.number = 0
        self.right = self.run_alone(folder / "right")

    def note(self, outcome: str, what: str) -> None:
        """Count an outcome; say what must not be."""
        self.counts["tried"] += 1
        self.counts[outcome] += 1
        if outcome in ("tracebacks", "silent"):
            print(f"{outcome}: {what}", flush=True)

    def start(self, arguments: list[str]) -> tuple[int, Path]:
        """Start a command; return its process and the file of its output."""
        self.number += 1
        log = self.folder / f"output-{self.number}.txt"
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process, log
        code = 99
        try:
            os.setsid()
            file = os.open(log, os.O_WRONLY | os.O_CREAT)
            for descriptor in (1, 2):
                os.dup2(file, descriptor)
            sys.argv = ["regdrop", *arguments]
            app()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def run_alone(self, folder: Path) -> dict:
        """Train without a disturbance, and return what the record must be."""
        process, log = self.start([*COMMAND, "--output", str(folder)])
        _, status = os.waitpid(process, 0)
        assert status == 0, log.read_text()
        return comparable(folder)


def comparable(folder: Path) -> dict:
    """Return the record of a run without its times."""
    return comparable_fields(json.loads((folder / "record.json").read_text()))


def comparable_fields(record: dict) -> dict:
    """Return what is the same whenever and wherever a run is done."""
    history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in record["history"]]
    kept = ("arm", "seed", "steps", "best_step", "validation", "test", "examples")
    return {k: record[k] for k in kept} | {"history": history}
