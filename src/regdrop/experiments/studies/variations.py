"""Settings of arms that are varied: as a user types them, and arms that have them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from regdrop.arguments import nearest
from regdrop.config import RDropConfig
from regdrop.experiments.arms import Arm
from regdrop.tasks import Task
from regdrop.tasks.configure import parse_value

Setting = float | int | str

# What an arm has of its own.
_PARTS = ("rdrop", "training")


@dataclass(frozen=True)
class Variation:
    """A setting of an arm that is chosen: from values, or from a range.

    Attributes:
        name: "rdrop.NAME" or "training.NAME".
        values: The values; empty for a range.
        low: Lower end of a range; of whole numbers where both ends are.
        high: Upper end of a range.
        log: Whether a range is searched by its logarithm.
    """

    name: str
    values: tuple[Setting, ...] = ()
    low: float = math.nan
    high: float = math.nan
    log: bool = False


def parse_variation(text: str) -> Variation:
    """Return the variation of "name=value,value,..." or "name=low:high" or "name=low:high:log".

    Raises:
        ValueError: If it is neither.
    """
    name, _, right = text.partition("=")
    parts = right.split(":")
    if not right or name.split(".")[0] not in _PARTS or "." not in name:
        raise ValueError(
            f"a variation must be rdrop.NAME=... or training.NAME=... with values by commas or "
            f"LOW:HIGH[:log], got {text!r}"
        )
    if len(parts) == 1:
        values = tuple(parse_value(part) for part in right.split(","))
        if len(set(map(_as_one, values))) != len(values):
            raise ValueError(f"the values of a variation must differ, got {text!r}")
        return Variation(name, values=values)
    numbers = [parse_value(part) for part in parts[:2]]
    log = parts[2:] == ["log"]
    is_range = all(_is_number(x) and math.isfinite(x) for x in numbers) and (log or len(parts) == 2)
    if not is_range or not numbers[0] < numbers[1] or (log and numbers[0] <= 0):
        raise ValueError(f"a range must be LOW:HIGH or LOW:HIGH:log with LOW < HIGH, got {text!r}")
    return Variation(name, low=numbers[0], high=numbers[1], log=log)


def with_settings(arm: Arm, settings: Mapping[str, Setting]) -> Arm:
    """Return an arm with other settings of R-Drop and of its training.

    Args:
        arm: The arm.
        settings: Values by "rdrop.NAME" and "training.NAME".

    Raises:
        ValueError: For a setting that there is not, or a value that it refuses.
    """
    for name, value in settings.items():
        part, _, own = name.partition(".")
        if part not in _PARTS:
            raise ValueError(
                f"a setting of an arm must be rdrop.NAME or training.NAME, got {name!r}"
            )
        holder: Any = getattr(arm, part)
        known = [known.name for known in fields(holder)]
        if own not in known:
            raise ValueError(
                f"{part} has no setting {own!r}; it has {', '.join(known)}{nearest(own, known)}"
            )
        is_auto = name == "rdrop.alpha" and value == "auto" and arm.dropout_odds == 1
        if _is_number(getattr(holder, own)) and not _is_number(value) and not is_auto:
            raise ValueError(f"{name} must be a number, got {value!r}")
        if name == "rdrop.alpha" and arm.dropout_odds != 1:
            # The penalty that R-Drop has by this alpha, which must be one that it takes.
            alpha = float(value)
            RDropConfig(alpha=alpha)
            arm = replace(arm, dropout_odds=1 + alpha)
            continue
        try:
            arm = replace(arm, **{part: replace(holder, **{own: value})})
        except TypeError as error:
            raise ValueError(f"{name} cannot be {value!r}: {error}") from error
    return arm


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_one(value: Any) -> Any:
    """Return what two values share that are one: 1 and 1.0."""
    return float(value) if _is_number(value) else str(value)


def is_varied(arm: Arm, variation: Variation) -> bool:
    """Return whether a setting means anything to an arm: R-Drop's mean nothing to one pass."""
    if variation.name == "rdrop.alpha":
        return arm.rdrop.alpha not in (0, "auto") or arm.dropout_odds != 1
    return not variation.name.startswith("rdrop.") or arm.rdrop.num_passes > 1


def check_variations(
    task: Task, arms: Sequence[Arm], variations: Sequence[Variation], study: Sequence[Arm] = ()
) -> None:
    """Check that nothing is varied twice, and nothing by which an arm is what it is.

    Args:
        task: The task.
        arms: The arms of which something is varied.
        variations: What is varied.
        study: All arms of the study: what makes one of them is varied for none.

    Raises:
        ValueError: If it is.
    """
    names = [variation.name for variation in variations]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"a setting must be varied once, got {twice[0]} {names.count(twice[0])} times; name "
            "all of its values in one"
        )
    for variation in variations:
        varied = [arm for arm in arms if is_varied(arm, variation)]
        for arm in varied:
            if _defines(task, arm, variation.name):
                raise ValueError(
                    f"{variation.name} must not be varied for {arm.name} ({arm.description}): it "
                    "is what makes that arm; name the other arms by --arms"
                )
        for other in study if varied else ():
            if is_varied(other, variation) and _defines(task, other, variation.name):
                raise ValueError(
                    f"{variation.name} must not be varied for {varied[0].name}: it is what makes "
                    f"another arm of the study, {other.name} ({other.description})"
                )


def _defines(task: Task, arm: Arm, name: str) -> bool:
    """Return whether a setting is one in which an arm differs from its task."""
    part, _, own = name.partition(".")
    # Another method's alpha is a weight of its own, which has to be chosen as well.
    if name == "rdrop.alpha" and (arm.rdrop.method != "rdrop" or arm.dropout_odds != 1):
        return False
    base: Any = getattr(task, part)
    mine: Any = getattr(arm, part)
    return hasattr(base, own) and getattr(base, own) != getattr(mine, own)


def describe_settings(settings: Mapping[str, Setting]) -> str:
    """Return settings as one line."""
    return ",".join(f"{name}={value}" for name, value in settings.items())


def tried_arm(arm: Arm, settings: Mapping[str, Setting]) -> Arm:
    """Return an arm with other settings, which its name tells."""
    return replace(with_settings(arm, settings), name=f"{arm.name}@{describe_settings(settings)}")
