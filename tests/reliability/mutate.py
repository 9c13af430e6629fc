"""Change the core on purpose, one small fault at a time, and count the faults that its tests catch.

    python tests/reliability/mutate.py --sample 12 --seed 0

Each mutant is a copy of the sources with one operator, number, condition or statement changed; a
fork of this process, which has imported the libraries but not regdrop, runs the tests that belong
to the module, the nearest file first, until one fails. mutmut would leave out what matters most
here, functions with two decorators (every kernel's backward) and Triton's programs.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}

import datasets
import numpy
import pytest
import scipy.stats
import torch
import transformers

ROOT = Path(__file__).parents[2]
PACKAGE = Path("src/regdrop")
LIBRARIES = datasets, numpy, scipy.stats, torch, transformers.Trainer, transformers.AutoModel

LOSS = ["loss/test_cross_entropy.py", "loss/test_loss_pairs.py", "loss/test_counts.py"]
ELEMENTS = ["loss/test_elementwise.py", "loss/test_loss_pairs.py", "loss/test_every_reduction.py"]
LINEAR = ["loss/test_linear_cross_entropy.py", "loss/test_every_reduction.py"]
ROWS = ["kernels/test_class_blocks.py", *LOSS, *LINEAR]
HEADS = [
    "integrations/transformers/test_heads.py",
    "integrations/transformers/test_own_loss.py",
    "integrations/transformers/test_every_head.py",
]
TRAINER = [
    "integrations/transformers/test_trainer.py",
    "integrations/transformers/test_trainer_pairs.py",
    "integrations/transformers/test_features.py",
    "integrations/transformers/test_interplay.py",
    "integrations/transformers/test_selection.py",
]
# The tests of each module, the nearest and quickest first; a folder's stands for its modules.
TESTS = {
    "kernels/__init__.py": ["kernels/test_whole_loss.py", "kernels/test_cpp_rows.py", *LOSS],
    "kernels/chunked.py": [*LOSS, *ROWS],
    "kernels/class_blocks.py": ROWS,
    "kernels/class_rows.py": ROWS,
    "kernels/cpp_rows.py": ["kernels/test_cpp_rows.py", *LOSS],
    "kernels/fused_linear.py": LINEAR,
    "kernels/linear_chunks.py": LINEAR,
    "kernels/projection.py": [*LINEAR, "integrations/transformers/test_fused.py"],
    "kernels/selection.py": ["kernels/test_kernel_choice.py", *LOSS, *LINEAR],
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
    "heads.py": [*HEADS, "integrations/transformers/test_methods.py"],
    "integrations/transformers/heads.py": HEADS,
    "integrations/transformers/heads_batch.py": HEADS,
    "integrations/transformers/heads_classes.py": HEADS,
    "integrations/transformers/heads_words.py": HEADS,
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
BUILT = ("kernels/__init__.py", "kernels/cpp_rows.py", "kernels/selection.py")
BUILT += ("kernels/triton_programs.py", "kernels/triton_rows.py")
NO_TESTS = 5  # pytest's code for a file of which none is chosen


class Mutant(NamedTuple):
    """A fault: what stands in a module's text from `start` to `end` becomes `new`."""

    line: int
    start: int
    end: int
    old: str
    new: str


COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {"any": "all", "max": "min", "amax": "amin", "zeros": "ones", "floor": "ceil"}
NAMES |= {f"{name}_like": f"{other}_like" for name, other in [("zeros", "ones")]}
NAMES |= {other: name for name, other in NAMES.items()}


def changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """Yield what a node is changed to; None stands for a statement or a test that is taken away."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and len(new.ops) == 1:
        new.ops = [COMPARISONS[type(new.ops[0])]()]
        yield new
    elif isinstance(new, ast.BinOp) and type(new.op) in ARITHMETIC:
        new.op = ARITHMETIC[type(new.op)]()
        yield new
    elif isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
        yield new
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not | ast.USub):
        yield new.operand
    elif isinstance(new, ast.IfExp):
        new.body, new.orelse = new.orelse, new.body
        yield new
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        yield ast.Constant(not new.value)
    elif isinstance(new, ast.Constant) and isinstance(new.value, int | float):
        yield ast.Constant(new.value + 1)
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Attribute):
        if new.func.attr in NAMES:
            new.func.attr = NAMES[new.func.attr]
            yield new
        elif new.func.attr in ("detach", "clone", "clamp", "masked_fill", "where"):
            yield new.func.value if new.func.attr != "where" else new.args[1]
    elif (isinstance(new, ast.Expr) and isinstance(new.value, ast.Call)) or isinstance(
        new, ast.AugAssign
    ):
        yield ast.Pass()


def parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below that do work: no type, no message, no declaration."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "format_spec"):
            continue
        for child in value if isinstance(value, list) else [value]:
            is_left = isinstance(child, ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom)
            is_alias = isinstance(node, ast.Module) and isinstance(child, ast.Assign)
            if isinstance(child, ast.AST) and not is_left and not is_alias:
                yield child
                yield from parts(child)


def mutants(text: str) -> list[Mutant]:
    """Return every fault that a module can be given."""
    lines = [0]
    for line in text.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    content, found = text.encode(), []
    for node in parts(ast.parse(text)):
        tests = []
        # A comparison and a negation are turned round by themselves.
        if isinstance(node, ast.If | ast.While) and not isinstance(
            node.test, ast.Compare | ast.UnaryOp
        ):
            tests = [(node.test, ast.UnaryOp(ast.Not(), node.test))]
        for old, new in [*((node, new) for new in changes(node)), *tests]:
            start = lines[old.lineno - 1] + old.col_offset
            end = lines[old.end_lineno - 1] + old.end_col_offset
            written = ast.unparse(new) if isinstance(new, ast.Pass) else f"({ast.unparse(new)})"
            found.append(Mutant(old.lineno, start, end, content[start:end].decode(), written))
    return sorted(set(found))


def tests_of(module: str) -> list[str]:
    """Return the test files of a module, each once, in order."""
    return list(dict.fromkeys(TESTS.get(module) or TESTS[module.split("/")[0]]))


def run_tests(folder: Path, files: list[str], seconds: float, chosen: list[str]) -> str | None:
    """Return the first test file that fails in a fork, "time" if it takes too long, or None."""
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
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end and not done:
        done, _ = os.waitpid(process, os.WNOHANG)
        time.sleep(0.02)
    if not done:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
    with os.fdopen(reader) as pipe:
        failed = pipe.read()
    return failed or (None if done else "time")


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
            chosen = mutants(text)
            random.Random(f"{seed} {module}").shuffle(chosen)
            for mutant in sorted(x for x in chosen[:sample] if (module, *x) not in known):
                if tests not in seconds:
                    seconds[tests] = time_tests(folder, files, chosen_tests)
                content = text.encode()
                new = content[: mutant.start] + mutant.new.encode() + content[mutant.end :]
                path.write_bytes(new)
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
    folders = [name for name in TESTS if not name.endswith(".py")]
    paths = [path for name in folders for path in sorted((ROOT / PACKAGE / name).glob("*.py"))]
    found = [str(path.relative_to(ROOT / PACKAGE)) for path in paths]
    found += [name for name in TESTS if name.endswith(".py") and name not in found]
    return [name for name in found if mutants((ROOT / PACKAGE / name).read_text())]


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
            print(len(mutants((ROOT / PACKAGE / name).read_text())), name)
    else:
        main(names, options.sample, options.seed, options.thorough, options.output)
