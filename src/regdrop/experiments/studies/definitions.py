"""The paper's studies and the question of cost: which arms each sets against each other."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

from regdrop.experiments.arms import BASELINE, Arm, build_arms, changed_arm
from regdrop.experiments.studies.alpha_schedules import alpha_schedules, constant_alphas
from regdrop.tasks import Task
from regdrop.tasks.common.accepted import check_choice

# Each is a batch more in memory.
_MOST_PASSES = 100


@dataclass(frozen=True)
class Study:
    """One question, asked by arms that differ in one thing.

    Attributes:
        question: What it asks, in one line.
        grid: Values of what is varied, where none are given; empty where nothing is.
        build: From a task and a grid to the arms.
    """

    question: str
    grid: tuple[float, ...]
    build: Callable[[Task, Sequence[float]], list[Arm]]


def study_arms(name: str, task: Task, grid: Sequence[float] | None = None) -> list[Arm]:
    """Return the arms of a study, the baseline first where it has one.

    Args:
        name: One of STUDIES.
        task: The task.
        grid: Values of what is varied; None for the study's own.

    Raises:
        ValueError: For an unknown study, or a grid that it cannot have.
    """
    is_comparison = name == "curves"
    if not is_comparison:
        check_choice("STUDY", name, STUDIES)
    if grid is not None and (is_comparison or not STUDIES[name].grid):
        raise ValueError(f"study {name!r} varies no number and takes no grid, got {list(grid)}")
    if is_comparison:
        warnings.warn(
            "the study curves is now the comparison that `regdrop compare` makes",
            DeprecationWarning,
            stacklevel=2,
        )
        return list(build_arms(task).values())
    study = STUDIES[name]
    values = list(study.grid if grid is None else grid)
    if not all(map(math.isfinite, values)):
        raise ValueError(f"grid must hold finite numbers, got {values}")
    if len(set(values)) != len(values) or (study.grid and not values):
        raise ValueError(f"grid must hold different numbers, at least one, got {values}")
    arms = study.build(task, values)
    names = [arm.name for arm in arms]
    if same := sorted({arm for arm in names if names.count(arm) > 1}):
        raise ValueError(
            f"grid must hold numbers that differ in their first six digits, got {values}: several "
            f"of them are the arm {same[0]}"
        )
    return arms


def _every_n_steps(task: Task, grid: Sequence[float]) -> list[Arm]:
    arms = [build_arms(task)[BASELINE]]
    for k in _whole_numbers("every-n-steps", grid):
        if k == 1:
            arms.append(build_arms(task)["rdrop"])
            continue
        text = f"R-Drop on every {_ordinal(k)} step"
        arms.append(changed_arm(task, f"every-{k}", text, every_n_steps=k, rescale=False))
        arms.append(
            changed_arm(
                task, f"every-{k}-rescaled", f"{text}, its alpha times {k}", every_n_steps=k
            )
        )
    return arms


def _ordinal(number: int) -> str:
    is_teen = number % 100 in (11, 12, 13)
    return f"{number}{'th' if is_teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def _num_passes(task: Task, grid: Sequence[float]) -> list[Arm]:
    arms = []
    for m in _whole_numbers("num-passes", grid):
        if m > _MOST_PASSES:
            raise ValueError(f"grid of num-passes must hold at most {_MOST_PASSES}, got {m:g}")
        if m == 1:
            arms.append(build_arms(task)[BASELINE])
        else:
            arms.append(changed_arm(task, f"passes-{m}", f"R-Drop with {m} passes", num_passes=m))
    return arms


def _dropout_rates(task: Task, grid: Sequence[float]) -> list[Arm]:
    # Both passes are treated alike, so that a pair and its reverse are one.
    return [
        changed_arm(
            task,
            f"rates-{p:g}-{q:g}",
            f"R-Drop, dropout {p:g} in one pass and {q:g} in the other",
            dropout_rates=(p, q),
            passes="sequential",
        )
        for p, q in combinations_with_replacement(sorted(grid), 2)
    ]


def _cost(task: Task, grid: Sequence[float]) -> list[Arm]:
    # Beside the five arms, what else can be had for a third of a step more than the baseline's.
    steps = task.training.max_steps
    ways: list[tuple[str, str, dict[str, Any]]] = [
        ("third-batch", "the second pass on a third of the batch", {"fraction": 1 / 3}),
        ("every-3", "every 3rd step, as in the paper", {"every_n_steps": 3, "rescale": False}),
        ("every-3-rescaled", "every 3rd step with alpha times 3", {"every_n_steps": 3}),
        ("late-start", "in the last third of the steps", {"start_step": round(steps * 2 / 3)}),
        (
            "late-start-half-batch",
            "from a third of the steps on, the second pass on half of the batch",
            {"start_step": round(steps / 3), "fraction": 0.5},
        ),
        (
            "one-backward-half-batch",
            "one backward pass, the second pass on half of the batch",
            {"backward_passes": 1, "fraction": 0.5},
        ),
    ]
    return [
        *build_arms(task).values(),
        *(changed_arm(task, name, f"R-Drop, {text}", **changes) for name, text, changes in ways),
    ]


def _whole_numbers(study: str, grid: Sequence[float]) -> list[int]:
    wrong = [x for x in grid if x != int(x) or x < 1]
    if wrong:
        raise ValueError(f"grid of {study} must hold whole numbers from 1 on, got {wrong[0]:g}")
    return [int(x) for x in grid]


STUDIES = {
    "alpha": Study("How strongly should the passes agree?", (0, 1, 3, 5, 7, 10), constant_alphas),
    "every-n-steps": Study(
        "Is R-Drop on every k-th step enough, with and without alpha times k?",
        (1, 2, 5, 10),
        _every_n_steps,
    ),
    "num-passes": Study("Do more passes help?", (1, 2, 3, 4), _num_passes),
    "dropout-rates": Study(
        "Which dropout rates of the two passes?", (0.1, 0.2, 0.3, 0.4, 0.5), _dropout_rates
    ),
    "cost": Study("What does R-Drop's gain cost at least?", (), _cost),
    "alpha-schedules": Study(
        "Can a rule for the whole run take the place of a search for alpha?",
        (0, 1, 3, 6, 10, 16),
        alpha_schedules,
    ),
}
