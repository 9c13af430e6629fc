"""What the options say of alpha over a run: whether they are numbers, and go together."""

from typing import Literal, NamedTuple

from regdrop.arguments import check_integer, check_number

AlphaSchedule = Literal["constant", "linear", "cosine"]
AlphaRule = Literal["ramp", "stall", "restore", "kl-target", "gap", "ramp-from-stall"]

# Begin and end of the ramp of alpha="auto", one for all tasks that were looked at.
_RAMP_START, _RAMP_END = 3.0, 10.0
# What the rules that read the validation loss reach at most.
RULE_MAX = 16.0
# The paper's usual weight.
DEFAULT_ALPHA_MIN = 1.0


class AlphaOptions(NamedTuple):
    """The options of `RDropConfig` that say what alpha is in a run, or that bear on it."""

    alpha: float | Literal["auto"]
    alpha_schedule: AlphaSchedule
    alpha_warmup_steps: int
    alpha_warmup_ratio: float | None
    alpha_start: float | None
    alpha_rule: AlphaRule
    alpha_max: float | None
    alpha_min: float
    single_pass_below: float | None
    num_passes: int
    monitor_steps: int | None
    method: str

    @property
    def highest(self) -> float:
        """The most that alpha may be in a run."""
        if self.alpha == "auto":
            return auto_range(self.alpha_rule, self.alpha_start, self.alpha_max)[1]
        return max(self.alpha, self.alpha_start or 0.0)


def auto_range(
    rule: AlphaRule, alpha_start: float | None, alpha_max: float | None
) -> tuple[float, float]:
    """Return where the "ramp" of alpha="auto" begins, 0 for other rules, and the most it may be."""
    if rule != "ramp":
        return 0.0, RULE_MAX if alpha_max is None else alpha_max
    end = _RAMP_END if alpha_max is None else alpha_max
    return min(_RAMP_START, end) if alpha_start is None else alpha_start, end


def check_alpha_numbers(options: AlphaOptions) -> None:
    """Check each number alone.

    Raises:
        TypeError: For a number that is none.
        ValueError: For a number out of range.
    """
    if options.alpha != "auto":
        if isinstance(options.alpha, str):
            raise TypeError(f"alpha must be a number, got str {options.alpha!r}; or 'auto'")
        check_number("alpha", options.alpha, low=0)
    for name in ("alpha_start", "alpha_max"):
        if getattr(options, name) is not None:
            check_number(name, getattr(options, name), low=0)
    check_number("alpha_min", options.alpha_min, low=0)
    check_integer("alpha_warmup_steps", options.alpha_warmup_steps, low=0)
    if options.alpha_warmup_ratio is not None:
        check_number("alpha_warmup_ratio", options.alpha_warmup_ratio, low=0, high=1)
        if options.alpha_warmup_ratio == 0:
            raise ValueError(
                "alpha_warmup_ratio must be above 0 and at most 1, got 0; "
                "alpha_schedule='constant' has no ramp"
            )
    if options.single_pass_below is not None:
        check_number("single_pass_below", options.single_pass_below, low=0)


def check_alpha_combinations(options: AlphaOptions) -> None:
    """Check that the options, each good alone, do not exclude each other.

    Raises:
        ValueError: For two that do.
    """
    _check_schedule(options)
    if options.single_pass_below is not None:
        _check_single_passes(options, options.single_pass_below)


def _check_schedule(options: AlphaOptions) -> None:
    ramp = {
        name: getattr(options, name)
        for name, absent in (("alpha_warmup_steps", 0), ("alpha_warmup_ratio", None))
        if getattr(options, name) != absent
    }
    given = " and ".join(f"{name}={value}" for name, value in ramp.items())
    if len(ramp) > 1:
        raise ValueError(f"the length of alpha's ramp must be given once, got {given}")
    if options.alpha == "auto":
        _check_auto(options, given)
    else:
        _check_options_of_auto_are_absent(options)
    if options.alpha_schedule != "constant" and not ramp:
        raise ValueError(
            f"alpha_schedule={options.alpha_schedule!r} needs alpha_warmup_steps above 0, or "
            "alpha_warmup_ratio"
        )
    if options.alpha_schedule == "constant" and ramp:
        raise ValueError(f"{given} needs alpha_schedule='linear' or 'cosine', got 'constant'")
    if options.alpha_start and options.alpha != "auto" and options.alpha_schedule == "constant":
        raise ValueError(
            f"alpha_start={options.alpha_start} needs alpha_schedule='linear' or 'cosine', or "
            "alpha='auto', got 'constant'"
        )


def _check_options_of_auto_are_absent(options: AlphaOptions) -> None:
    for name, default in (
        ("alpha_rule", "ramp"),
        ("alpha_max", None),
        ("alpha_min", DEFAULT_ALPHA_MIN),
    ):
        if getattr(options, name) != default:
            raise ValueError(
                f"{name}={getattr(options, name)!r} needs alpha='auto', got alpha={options.alpha}"
            )


def _check_auto(options: AlphaOptions, excluded: str) -> None:
    if options.alpha_schedule != "constant":
        excluded = f"alpha_schedule={options.alpha_schedule!r}"
    if excluded:
        raise ValueError(
            f"alpha='auto' is a schedule itself: it excludes {excluded}; give the "
            "ramp's end as alpha_max, or a ramp of another length or form by a number as alpha "
            "beside alpha_schedule"
        )
    for name in ("alpha_max", "alpha_min"):
        if getattr(options, name) == 0:
            raise ValueError(f"{name} must be above 0, got 0")
    if options.alpha_rule == "ramp" and options.alpha_min != DEFAULT_ALPHA_MIN:
        raise ValueError(
            f"alpha_min={options.alpha_min} needs an alpha_rule that reads the validation "
            "loss: the 'ramp' begins at alpha_start"
        )
    if options.alpha_min > options.highest and options.alpha_min != DEFAULT_ALPHA_MIN:
        raise ValueError(
            f"alpha_min must be at most alpha_max={options.highest}, got {options.alpha_min}"
        )
    if options.alpha_start is not None and options.alpha_start > options.highest:
        raise ValueError(
            f"alpha_start must be at most alpha_max={options.highest}: alpha='auto' rises, "
            f"got {options.alpha_start}; alpha_schedule='linear' may fall"
        )
    if options.alpha_start and options.alpha_rule != "ramp":
        raise ValueError(
            f"alpha_start={options.alpha_start} needs alpha_rule='ramp', got "
            f"{options.alpha_rule!r}, which begins at alpha_min"
        )
    if options.alpha_rule == "kl-target":
        _check_divergence_is_measured(options)


def _check_divergence_is_measured(options: AlphaOptions) -> None:
    # "kl-target" would leave alpha where it begins, whatever the validation loss does.
    if options.method == "fraternal":
        raise ValueError(
            "alpha_rule='kl-target' reads the KL, which method='fraternal' does not compute"
        )
    if options.single_pass_below is not None and options.monitor_steps is None:
        raise ValueError(
            "alpha_rule='kl-target' reads the KL, which steps with one pass do not have: "
            f"single_pass_below={options.single_pass_below} needs monitor_steps beside it"
        )


def _check_single_passes(options: AlphaOptions, single_pass_below: float) -> None:
    """Check that some step has R-Drop, with "auto" also where alpha follows the ramp at last."""
    if options.num_passes == 1:
        raise ValueError(f"single_pass_below={single_pass_below} needs num_passes above 1, got 1")
    name, highest, why = "alpha", options.highest, ""
    if options.alpha == "auto":
        name, highest = "alpha_max", auto_range("ramp", None, options.alpha_max)[1]
        if options.alpha_rule != "ramp":
            why = " where there is no evaluation and alpha follows the ramp"
    if highest < single_pass_below:
        raise ValueError(
            f"single_pass_below must be at most {name}={highest}, else no step "
            f"has R-Drop{why}, got {single_pass_below}"
        )
