"""Change the core on purpose, one small fault at a time, and count the faults that its tests catch.

    python tests/reliability/mutate.py --sample 12 --seed 0

Each mutant is a copy of the sources with one fault (`faults.py`); a fork of this process, which has
imported the libraries but not regdrop, runs the tests that belong to the module, the nearest file
first, until one fails. Faults of C++ that do not compile do not count. mutmut would leave out what
matters most here, functions with two decorators (every kernel's backward), Triton's programs, C++.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}

import datasets
import numpy
import pytest
import scipy.stats
import torch
import transformers
from faults import Mutant, cpp_mutants, python_mutants

ROOT = Path(__file__).parents[2]
PACKAGE = Path("src/regdrop")
LIBRARIES = datasets, numpy, scipy.stats, torch, transformers.Trainer, transformers.AutoModel

LOSS = ["loss/test_cross_entropy.py", "loss/test_loss_pairs.py", "loss/test_counts.py"]
ELEMENTS = ["loss/test_elementwise.py", "loss/test_loss_pairs.py", "loss/test_every_reduction.py"]
LINEAR = ["loss/test_linear_cross_entropy.py", "loss/test_every_reduction.py"]
ROWS = ["kernels/test_class_blocks.py", *LOSS, *LINEAR]
HEADS = [
    "integrations/transformers/heads/test_heads.py",
    "integrations/transformers/likelihood/test_own_loss.py",
    "integrations/transformers/heads/test_every_head.py",
]
TRAINER = [
    "integrations/transformers/test_trainer.py",
    "integrations/transformers/test_trainer_pairs.py",
    "integrations/transformers/test_features.py",
    "integrations/transformers/test_interplay.py",
    "integrations/transformers/likelihood/test_selection.py",
    "integrations/transformers/forward/test_batches.py",
    "integrations/transformers/likelihood/test_own_loss.py",
    "integrations/transformers/test_two_processes.py",
]
CPP = ["kernels/test_cpp_rows.py", "kernels/test_whole_loss.py", *LOSS]
# The tests of each module, the nearest and quickest first; a folder's stands for its modules.
TESTS = {
    "kernels/terms.py": ["kernels/test_whole_loss.py", "kernels/test_cpp_rows.py", *LOSS],
    "kernels/chunked.py": [*LOSS, *ROWS],
    "kernels/class_blocks.py": ROWS,
    "kernels/class_rows.py": ROWS,
    "kernels/cpp_rows.py": ["kernels/test_cpp_rows.py", *LOSS],
    "kernels/rows.cpp": CPP,
    "kernels/row_parts.h": CPP,
    "kernels/narrow_rows.h": CPP,
    "kernels/fused_linear.py": LINEAR,
    "kernels/linear_chunks.py": LINEAR,
    "kernels/projection.py": [
        *LINEAR,
        "kernels/test_class_blocks.py",
        "integrations/transformers/forward/test_fused.py",
    ],
    "kernels/selection.py": ["kernels/test_kernel_choice.py", *LOSS, *LINEAR],
    "kernels/target.py": [*LOSS, *LINEAR, "kernels/test_cpp_rows.py"],
    "kernels/triton_programs.py": ["kernels/test_triton_rows.py", "kernels/test_class_blocks.py"],
    "kernels/triton_rows.py": ["kernels/test_triton_rows.py", "kernels/test_class_blocks.py"],
    "kernels": [*LOSS, "loss/test_forward_mode.py", "loss/test_every_reduction.py", *LINEAR],
    "loss/adaptive_softmax.py": ["loss/test_adaptive_softmax.py"],
    "loss/binary_cross_entropy.py": ELEMENTS,
    "loss/elementwise.py": ["loss/test_elementwise.py"],
    "loss/regression.py": ELEMENTS,
    "loss/ctc.py": ["loss/test_ctc.py"],
    "loss/fraternal.py": ["loss/test_fraternal.py", "test_rdrop_step.py"],
    "loss/linear_cross_entropy.py": [*LINEAR, "loss/test_unlabelled.py"],
    "loss/linear_items.py": LINEAR,
    "loss/module.py": ["loss/test_module.py", "loss/test_elementwise.py"],
    "loss/terms.py": ["loss/test_ctc.py", *LOSS, "loss/test_operations.py"],
    "loss": [
        *LOSS,
        "loss/test_every_reduction.py",
        "loss/test_defaults.py",
        "loss/test_class_dim.py",
        "loss/test_unlabelled.py",
        "loss/test_module.py",
        "test_mistakes.py",
    ],
    "step.py": ["test_rdrop_step.py", "test_step.py"],
    "step_passes.py": ["test_rdrop_step.py", "test_step.py"],
    "step_terms.py": ["test_rdrop_step.py", "test_step_outputs.py"],
    "heads.py": [*HEADS, "integrations/transformers/test_methods.py"],
    "integrations/transformers/heads/registry.py": HEADS,
    "integrations/transformers/heads/batch.py": HEADS,
    "integrations/transformers/heads/classes.py": HEADS,
    "integrations/transformers/heads/words.py": HEADS,
    "integrations/transformers/trainer.py": TRAINER,
    "experiments/bootstrap.py": ["experiments/test_bootstrap.py"],
    "experiments/statistics.py": ["experiments/test_statistics.py"],
    "experiments/running/run.py": [
        "experiments/running/test_run.py",
        "experiments/recording/test_history.py",
    ],
}
# Interpreted and compiled kernels take long, and concern few modules.
QUICK = ["-m", "not slow and not long", "-k", "not triton and not compiled"]
WHOLE = ["-m", "not long"]
BUILT = ("kernels/terms.py", "kernels/cpp_rows.py", "kernels/selection.py")
BUILT += ("kernels/rows.cpp", "kernels/row_parts.h", "kernels/narrow_rows.h")
BUILT += ("kernels/triton_programs.py", "kernels/triton_rows.py")
BUILD = (
    "from regdrop.kernels.cpp_rows import cpp_kernel; import torch; cpp_kernel(torch.device('cpu'))"
)
NO_TESTS = 5  # pytest's code for a file of which none is chosen


def mutants(module: str) -> list[Mutant]:
    """Return every fault that a module can be given."""
    text = (ROOT / PACKAGE / module).read_text()
    return cpp_mutants(text) if module.endswith((".cpp", ".h")) else python_mutants(text)


def compiles(folder: Path) -> bool:
    """Return whether the C++ kernel of a copy can be built; it is built then."""
    environment = os.environ | {"PYTHONPATH": str(folder / "src")}
    command = [sys.executable, "-c", BUILD]
    return not subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def tests_of(module: str) -> list[str]:
    """Return the test files of a module, each once, in order."""
    return list(dict.fromkeys(TESTS.get(module) or TESTS[module.split("/")[0]]))


def run_tests(folder: Path, files: list[str], seconds: float, chosen: list[str]) -> str | None:
    """Return the first test file that fails in a fork, "time", "crash", or None."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.setsid()
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(folder)
            sys.path[:0] = [str(folder / "src")]
            os.environ["PYTHONPATH"] = str(folder / "src")
            for file in files:
                options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", *chosen]
                if pytest.main([*options, f"tests/{file}"]) not in (0, NO_TESTS):
                    os.write(writer, file.encode())
                    break
        except BaseException:
            os.write(writer, b"start")
        finally:
            os._exit(0)
    os.close(writer)
    end, done, status = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end and not done:
        done, status = os.waitpid(process, os.WNOHANG)
        time.sleep(0.02)
    if not done:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
    with os.fdopen(reader) as pipe:
        failed = pipe.read()
    if failed or not done:
        return failed or "time"
    return "crash" if status else None


def main(modules: list[str], sample: int, seed: int, is_thorough: bool, output: Path) -> None:
    """Try a sample of each module's faults, print and save what became of each.

    Those that an earlier call has saved are not tried again: a larger sample holds the smaller one.
    """
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # mutants of one second and one size look alike to its cache
    output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(output.read_text()) if output.exists() else []
    known = [(x["module"], *(x[field] for field in Mutant._fields)) for x in results]
    seconds: dict[tuple[str, ...], float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("src", "tests"):
            shutil.copytree(ROOT / part, folder / part)
        shutil.copy(ROOT / "pyproject.toml", folder)
        # The C++ kernel is built from the copy, and must not replace the one in use.
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
        for module in modules:
            path, files = folder / PACKAGE / module, tests_of(module)
            chosen_tests = WHOLE if is_thorough or module in BUILT else QUICK
            tests = (*files, *chosen_tests)
            text = path.read_text()
            chosen = mutants(module)
            random.Random(f"{seed} {module}").shuffle(chosen)
            for mutant in sorted(x for x in chosen[:sample] if (module, *x) not in known):
                if tests not in seconds:
                    seconds[tests] = time_tests(folder, files, chosen_tests)
                content = text.encode()
                new = content[: mutant.start] + mutant.new.encode() + content[mutant.end :]
                path.write_bytes(new)
                if module.endswith((".cpp", ".h")) and not compiles(folder):
                    path.write_text(text)
                    continue
                failed = run_tests(folder, files, 60 + 4 * seconds[tests], chosen_tests)
                path.write_text(text)
                outcome = f"caught by {failed}" if failed else "SURVIVED"
                place = f"{module}:{mutant.line}"
                print(f"{outcome:45} {place}: {mutant.old!r} -> {mutant.new}", flush=True)
                results.append({"module": module, **mutant._asdict(), "caught_by": failed})
                output.write_text(json.dumps(results, indent=1))
    print_table(results)


def time_tests(folder: Path, files: list[str], chosen: list[str]) -> float:
    """Return the seconds that tests take; end where one fails as it is."""
    start = time.monotonic()
    if failed := run_tests(folder, files, 3600, chosen):
        sys.exit(f"{failed} fails as it is:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return time.monotonic() - start


def print_table(results: list[dict[str, Any]]) -> None:
    """Print what was caught of each module's faults, and of all."""
    caught: dict[str, list[bool]] = {}
    for result in results:
        caught.setdefault(result["module"], []).append(result["caught_by"] is not None)
    print("\n| module | tried | caught |\n| --- | ---: | ---: |")
    for module, found in caught.items():
        print(f"| {module} | {len(found)} | {sum(found)} |")
    count = sum(map(len, caught.values()))
    print(f"{count} tried, {sum(map(sum, caught.values()))} caught")


def core() -> list[str]:
    """Return the modules of the core that hold anything to change."""
    folders = [name for name in TESTS if "." not in name]
    paths = [path for name in folders for path in sorted((ROOT / PACKAGE / name).glob("*.py"))]
    found = [str(path.relative_to(ROOT / PACKAGE)) for path in paths]
    found += [name for name in TESTS if "." in name and name not in found]
    return [name for name in found if mutants(name)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="*", help="such as kernels/eager.py; all of the core")
    parser.add_argument("--sample", type=int, default=12, help="faults a module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--thorough", action="store_true", help="let them meet slow tests, too")
    parser.add_argument("--output", type=Path, default=Path("runs/mutants.json"))
    parser.add_argument("--list", action="store_true", help="count the possible ones alone")
    options = parser.parse_args()
    names = options.modules or core()
    if options.list:
        for name in names:
            print(len(mutants(name)), name)
    else:
        main(names, options.sample, options.seed, options.thorough, options.output)
