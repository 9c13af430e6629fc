"""The Trainer on the device: the section "trainer" of `gpu.py`.

Tiny models of the tests, whose dropout is a function of sample and pass where runs are compared
that draw their masks elsewhere.
"""

import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_findings import Findings, UnavailableError
from measuring import has_triton
from recording import ROOT

sys.path.insert(0, str(ROOT / "tests"))  # tiny models and runs of the tests
import training
from models import Rows, key_dropout, text_rows, tiny_bert, tiny_gpt2
from regdrop import RDropConfig
from regdrop.integrations.transformers import RDropTrainer

RDROP = RDropConfig(alpha=2.0)
TORCH = str(Path(torch.__file__).parent)
# Of runs that compute the same in another order, in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def run(findings: Findings) -> None:
    on_cpu = findings.device == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        train = partial(train_in, Path(folder), on_cpu)
        for precision in ("float32", "bf16", "fp16"):
            findings.check(f"Trainer, {precision}", partial(fit, train, findings.device, precision))
        checks: dict[str, Callable[..., str]] = {
            "as on the CPU": match_cpu,
            "accumulation is one batch": accumulate,
            "fused last layer": fuse,
            "one backward pass, part of the batch": take_part,
            "resumed is uninterrupted": partial(resume, Path(folder)),
            "no synchronisation of ours in a step's loss": partial(watch, findings.device),
        }
        if not on_cpu and has_triton("cuda"):
            checks["Triton is eager"] = match_eager
        for name, check in checks.items():
            findings.check(f"Trainer, {name}", partial(check, train))


def train_in(folder: Path, on_cpu: bool, model: Any, rows: Rows, **options: Any) -> RDropTrainer:
    """Train a model on the device; `use_cpu` says otherwise."""
    torch.manual_seed(0)
    options = {"use_cpu": on_cpu, "rdrop": RDROP, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer: RDropTrainer = training.train(folder, model, rows, **options)
    assert trainer.args.device.type == ("cpu" if options["use_cpu"] else "cuda")
    return trainer


def sentences(size: int = 16) -> Rows:
    """Return sentences as rows of a language model, some of whose words are ignored."""
    words = text_rows(size).columns["input_ids"]
    labels = words.clone()
    labels[::5, 3:] = -100
    return Rows(input_ids=words, attention_mask=torch.ones_like(words), labels=labels)


def fit(train: Callable[..., RDropTrainer], device: str, precision: str) -> str:
    """Train for epochs in a precision; the likelihood falls and the passes differ."""
    if device == "cpu" and precision == "fp16":
        raise UnavailableError("the Trainer has float16 on a GPU alone")
    options = {} if precision == "float32" else {precision: True}
    trainer = train(
        tiny_bert(),
        text_rows(32),
        max_steps=-1,
        num_train_epochs=12,
        optim="adamw_torch",
        learning_rate=1e-2,
        **options,
    )
    nll, kl = training.logged(trainer, "nll"), training.logged(trainer, "kl")
    assert len(nll) == 48, f"{len(nll)} steps were logged"
    first, last = sum(nll[:4]) / 4, sum(nll[-4:]) / 4
    assert last < 0.8 * first, f"the likelihood's term went from {first} to {last}"
    assert min(kl) > 0, f"the divergence is {min(kl)}"
    loss = trainer.evaluate()["eval_loss"]
    assert loss < first, f"the evaluated loss is {loss}"
    return f"nll {first:.3f} to {last:.3f}, evaluated {loss:.3f}"


def match_cpu(train: Callable[..., RDropTrainer]) -> str:
    """Compare steps in float32 with those on the CPU, under the same masks."""
    runs = [train(key_dropout(tiny_bert()), text_rows(), **cpu) for cpu in ({}, {"use_cpu": True})]
    training.assert_same_run(*runs, **CLOSE)
    return _losses(runs[0])


def accumulate(train: Callable[..., RDropTrainer]) -> str:
    """Compare windows of small batches with large batches, under the same masks."""
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    runs = [train(key_dropout(tiny_bert()), text_rows(), **options) for options in ({}, split)]
    training.assert_same_run(*runs, **CLOSE)
    return _losses(runs[1])


def fuse(train: Callable[..., RDropTrainer]) -> str:
    """Compare the fused last layer with explicit logits, under the same dropout."""
    configs = [RDropConfig(alpha=2.0, fused_linear=fused) for fused in (True, False)]
    runs = [train(tiny_gpt2(), sentences(), rdrop=rdrop) for rdrop in configs]
    training.assert_same_run(*runs, **CLOSE)
    return _losses(runs[0])


def take_part(train: Callable[..., RDropTrainer]) -> str:
    """Run the cheaper ways, which have other forwards."""
    configs = [RDropConfig(alpha=2.0, backward_passes=1), RDropConfig(alpha=2.0, fraction=0.5)]
    runs = [train(tiny_gpt2(), sentences(), rdrop=rdrop) for rdrop in configs]
    for trainer in runs:
        assert min(training.logged(trainer, "kl")) > 0
    return "; ".join(map(_losses, runs))


def resume(folder: Path, train: Callable[..., RDropTrainer]) -> str:
    """Compare a run that goes on from a checkpoint with one that was not interrupted."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = train(tiny_bert(), text_rows(), **options)
    again = training.build(
        folder,
        tiny_bert(),
        text_rows(),
        rdrop=RDROP,
        use_cpu=whole.args.device.type == "cpu",
        **options,
    )
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    training.assert_same_run(again, whole, **CLOSE)
    return _losses(again)


def match_eager(train: Callable[..., RDropTrainer]) -> str:
    """Compare the kernel of the GPU with the definition, under the same dropout."""
    configs = [RDropConfig(alpha=2.0, impl=impl) for impl in ("triton", "eager")]
    runs = [train(tiny_gpt2(), sentences(), rdrop=rdrop) for rdrop in configs]
    training.assert_same_run(*runs, **CLOSE)
    return _losses(runs[0])


class Watched(RDropTrainer):
    """A trainer that notes where its loss waits for the GPU, after the first step."""

    waits: list[str]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute it under torch's warnings of synchronisations."""
        if self.state.global_step == 0 or self.args.device.type == "cpu":
            return super().compute_loss(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = self._add_wait
                return super().compute_loss(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _add_wait(self, message: Warning | str, *args: Any) -> None:
        """Note who called torch where it says that it waits."""
        if "synchronizing" in str(message):
            frames = traceback.extract_stack()[:-1]
            callers = [frame for frame in frames if not frame.filename.startswith(TORCH)]
            self.waits.append(f"{callers[-1].filename}:{callers[-1].lineno}")


def watch(device: str, train: Callable[..., RDropTrainer]) -> str:
    """Count the waits in frames of ours; what the model does is its own."""
    Watched.waits = []
    configs = [RDROP, RDropConfig(alpha=2.0, fused_linear=True)]
    for rdrop in configs:
        train(tiny_gpt2(), sentences(), rdrop=rdrop, kind=Watched, max_steps=4)
    ours = sorted({place for place in Watched.waits if f"{ROOT}/src/" in place})
    others = len(Watched.waits) - sum(place in ours for place in Watched.waits)
    assert not ours, f"waits for the GPU: {', '.join(ours)}"
    return f"{others} of others" if device == "cuda" else "ran; a CPU has nothing to wait for"


def _losses(trainer: RDropTrainer) -> str:
    return "loss " + " ".join(f"{x:.4f}" for x in training.logged(trainer, "loss"))
