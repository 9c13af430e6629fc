"""The five ways of training that `compare` sets against each other, and others by name."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from regdrop.arguments import nearest
from regdrop.config import RDropConfig
from regdrop.schedule import scheduled_alpha
from regdrop.tasks import Task, TrainingSettings

BASELINE = "baseline"
TWO_PASSES = "alpha-0"
_METHODS = ("r3f", "fraternal")
_ORDER = (BASELINE, "baseline-2x", TWO_PASSES, "rdrop", "rdrop-one-backward")


def arm_order(name: str) -> tuple[int, list[tuple[bool, float, str]]]:
    """Return the key by which tables and plots sort the arms: the five first, numbers by value."""
    parts = [
        (True, float(part), "") if part[:1].isdigit() else (False, 0.0, part)
        for part in re.split(r"(\d+(?:\.\d+)?)", name)
    ]
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), parts)


def reference_arm(names: Collection[str]) -> str | None:
    """Return the arm to which the others are compared: the baseline, else two passes without KL."""
    return next((name for name in (BASELINE, TWO_PASSES) if name in names), None)


@dataclass(frozen=True)
class Arm:
    """One way of training a task.

    Attributes:
        name: Name in files and tables.
        description: What it is.
        rdrop: R-Drop's options; one pass with alpha 0 is training without it.
        training: Optimisation.
        dropout_odds: What the odds of every dropout rate are multiplied by.
        dropout_rises: Whether that factor rises from 1 over the run.
    """

    name: str
    description: str
    rdrop: RDropConfig
    training: TrainingSettings
    dropout_odds: float = 1.0
    dropout_rises: bool = False

    def __post_init__(self) -> None:
        averaged = self.training.average_checkpoints
        if self.rdrop.alpha_rule == "restore" and averaged > 1:
            raise ValueError(
                "alpha_rule='restore' goes back to the best checkpoint, and "
                f"average_checkpoints={averaged} keeps the last ones in its place: use "
                "average_checkpoints=1, or another rule"
            )


def baseline_arm(task: Task) -> Arm:
    """Return training with one pass, the NLL weighted as in the other arms."""
    rdrop = RDropConfig(
        alpha=0.0,
        num_passes=1,
        monitor_steps=task.training.logging_steps,
        likelihood=task.rdrop.likelihood,
        **_loss_options(task),
    )
    return Arm(BASELINE, "one pass, no R-Drop", rdrop, task.training)


def _loss_options(task: Task) -> dict[str, Any]:
    """Return how the loss is computed, which is the same in all arms of a task."""
    return {name: getattr(task.rdrop, name) for name in ("class_weight", "fused_linear", "impl")}


def build_arms(task: Task) -> dict[str, Arm]:
    """Return the arms of a task by name, the baseline first.

    All losses are on the baseline's scale, and all arms measure the KL between two passes at
    every log, the baselines by an extra pass that leaves the run as it is.
    """
    if task.rdrop.method != "rdrop":
        raise ValueError(
            f"rdrop.method of a task must be 'rdrop', got {task.rdrop.method!r}: other methods are "
            f"arms of their own, {', '.join(_METHODS)}"
        )
    training = task.training
    rdrop = replace(task.rdrop, scale="mean")
    baseline = baseline_arm(task)
    single = baseline.rdrop
    arms = (
        baseline,
        Arm(
            "baseline-2x",
            "the baseline with twice the updates, its schedule stretched",
            single,
            training.stretched(2),
        ),
        Arm(TWO_PASSES, "two passes without the KL", rdrop.with_alpha(0.0), training),
        Arm("rdrop", f"R-Drop, {_alpha_text(rdrop)}", rdrop, training),
        Arm(
            "rdrop-one-backward",
            f"R-Drop, {_alpha_text(rdrop)}, gradient through one pass",
            replace(rdrop, backward_passes=1),
            training,
        ),
    )
    return {arm.name: arm for arm in arms}


def changed_rdrop(task: Task, **changes: Any) -> RDropConfig:
    """Return R-Drop's options of a task, on the scale of the other arms, with some changed."""
    # Steps of one pass measure the divergence as the baseline does.
    monitor = task.training.logging_steps
    return replace(task.rdrop, scale="mean", monitor_steps=monitor, **changes)


def changed_arm(task: Task, name: str, description: str, **changes: Any) -> Arm:
    """Return training with R-Drop with some of its options changed."""
    return Arm(name, description, changed_rdrop(task, **changes), task.training)


def optional_arms(task: Task) -> dict[str, Arm]:
    """Return further controls, and the regularisers with which the paper compares itself.

    One pass with more dropout shows what noise alone does: its odds are multiplied by 1 + alpha, as
    to second order R-Drop multiplies dropout's own penalty; by the mean of an alpha that changes in
    the run, or by the middle of what a rule gives that reads the validation loss. Full R-Drop on
    two thirds of each batch costs what the cheaper forms cost: they have to beat it. R3F's lambda
    is 1 (arXiv 2008.03156) and fraternal dropout's kappa 0.15 (arXiv 1711.00066), whatever the
    task's alpha, which is R-Drop's; `regdrop tune` chooses others.
    """
    base = RDropConfig(noise=task.rdrop.noise, **_loss_options(task))
    r3f = replace(base, alpha=4.0, method="r3f")
    # It compares logits, which no kernel of the loss does.
    fraternal = replace(base, alpha=0.3, method="fraternal", fused_linear="auto", impl="auto")
    alpha, text = _mean_alpha(task)
    arms = (
        replace(
            baseline_arm(task),
            name="matched-dropout",
            description=f"one pass, the odds of its dropout times {1 + alpha:g}{text}",
            dropout_odds=1 + alpha,
        ),
        Arm(
            "two-thirds-batch",
            f"R-Drop, {_alpha_text(task.rdrop)}, on two thirds of each batch",
            replace(task.rdrop, scale="mean"),
            _smaller_batch(task.training, 2 / 3),
        ),
        Arm("r3f", "R3F: noise on the embeddings, lambda 1", r3f, task.training),
        Arm("fraternal", "fraternal dropout, kappa 0.15", fraternal, task.training),
    )
    return {arm.name: arm for arm in arms}


def _mean_alpha(task: Task) -> tuple[float, str]:
    """Return the mean of a task's alpha over the run, and what is to be said of it.

    What a rule gives that reads the validation loss is not known beforehand.
    """
    rdrop, steps = task.rdrop, task.training.max_steps
    if rdrop.alpha == "auto" and rdrop.alpha_rule != "ramp":
        high = rdrop.highest_alpha
        low = min(rdrop.alpha_min, high)
        return (low + high) / 2, f", for alpha in the middle between {low:g} and {high:g}"
    # With both of its ends the mean of a ramp is the middle between them.
    return mean(scheduled_alpha(rdrop, step, steps) for step in range(steps + 1)), ""


def _alpha_text(rdrop: RDropConfig) -> str:
    if rdrop.alpha == "auto":
        return f"alpha by {rdrop.alpha_rule} up to {rdrop.highest_alpha:g}"
    return f"alpha {rdrop.alpha:g}"


def _smaller_batch(training: TrainingSettings, share: float) -> TrainingSettings:
    batches = training.gradient_accumulation_steps
    size = max(1, round(training.batch_size * share / batches)) * batches
    return replace(training, batch_size=size)


def compared_arms(task: Task, names: Sequence[str] | None = None) -> list[Arm]:
    """Return the five arms of a task, or those of some names, others among them.

    Raises:
        ValueError: For a name that there is not.
    """
    five = build_arms(task)
    return choose_arms({**five, **optional_arms(task)}, list(five) if names is None else names)


def choose_arms(arms: Mapping[str, Arm], names: Sequence[str] | None) -> list[Arm]:
    """Return the arms of some names, or all.

    Raises:
        ValueError: For a name that there is not.
    """
    chosen = list(arms) if names is None else list(names)
    if unknown := sorted(set(chosen) - set(arms)):
        raise ValueError(
            f"arms must be among {', '.join(arms)}; got {', '.join(unknown)}"
            f"{nearest(unknown[0], arms)}"
        )
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"arms must be named once each, got {', '.join(chosen)}")
    return [arms[name] for name in chosen]
