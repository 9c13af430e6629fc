"""The options of training with R-Drop, shared by every integration and the command line."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any, Literal, get_args

from torch.serialization import add_safe_globals

from regdrop.alpha_options import (
    DEFAULT_ALPHA_MIN,
    RULE_MAX,
    AlphaOptions,
    AlphaRule,
    AlphaSchedule,
    auto_range,
    check_alpha_combinations,
    check_alpha_numbers,
)
from regdrop.arguments import IGNORE_INDEX, check_integer, check_number, nearest
from regdrop.kernels import Implementation

Method = Literal["rdrop", "r3f", "fraternal"]
Likelihood = Literal["auto", "model"]

# Options that were saved together before there was `alpha_start`; a ramp began at 0 then.
_SAVED_BEFORE = {"alpha", "alpha_rule", "alpha_max", "alpha_min", "every_n_steps", "scale"}


@dataclass(frozen=True)
class RDropConfig:
    """Options of training with R-Drop; steps are optimiser steps.

    Attributes:
        alpha: Weight of the divergence, the paper's. "auto": none to search, it rises in the run as
            `alpha_rule` has it, from 3 to 10 if nothing else is said.
        num_passes: Passes a batch; 1 (with alpha 0) is training without R-Drop.
        backward_passes: First passes that carry the gradient, scaled to stay unbiased; 1 costs
            about 1.3 single-pass steps instead of 2. None: all.
        fraction: Random part of the batch that the passes after the first see; its divergence is
            weighted 1 / fraction.
        every_n_steps: Apply R-Drop on every n-th step only.
        rescale: Multiply alpha by every_n_steps on those steps, so that its mean stays alpha.
        start_step: First step with R-Drop.
        alpha_schedule: "constant", or a "linear" or "cosine" ramp from `alpha_start` to alpha, then
            constant.
        alpha_warmup_steps: Length of the ramp, counted from start_step.
        alpha_warmup_ratio: Length of the ramp as a part of the steps from start_step to the end of
            the run, instead of alpha_warmup_steps; 1.0 is all of them.
        alpha_start: Where that ramp begins, and the "ramp" of alpha="auto". Above alpha it falls.
            None: 0, and 3 for "auto", or `alpha_max` if that is less.
        alpha_rule: How alpha="auto" rises; see `regdrop.alpha.RULES`. "ramp" needs no validation;
            the others act at evaluations, by the validation loss.
        alpha_max: What alpha="auto" reaches at most; the end of the "ramp". None: 10 for the
            "ramp", 16 for the rules that read the validation loss.
        alpha_min: Where the rules that read the validation loss begin, and the least that they step
            back to ("gap" goes down to 0). The default gives way to a lower `alpha_max`.
        single_pass_below: Steps whose alpha, as scheduled, is below it have one pass; the weight of
            the NLL is that of the other steps. None: no such steps.
        dropout_rates: One dropout rate for each pass, with passes="sequential".
        passes: "stacked" for one forward of the stacked batch, "sequential" for one a pass.
        scale: "mean" for a loss on the scale of training without R-Drop, "sum" for the paper's.
        class_weight: Weight of each class in the NLL.
        unlabelled_index: Label of items that have none: they count in the divergence and not in the
            NLL, so that labelled and unlabelled data train in one batch.
        likelihood: What a trainer minimises beside the divergence. "model": the loss that the
            model, or the trainer's own `compute_loss`, returns, whatever it is. "auto": the loss
            that regdrop knows for the model, computed with its divergence at once; where it knows
            none that gives the model's own loss, "model", with a notice.
        monitor_steps: Every so many steps measure the divergence also where a step has one pass,
            by an extra pass that leaves the run as it is.
        fused_linear: Whether the last layer of a language model and the loss are computed in one,
            so that its logits never exist. "auto": from 8,192 words on, where the layer and what
            follows it are understood; True: always, else an error; False: never. Trainers of
            transformers alone have it.
        impl: How a cross entropy and its divergence are computed, as in `rdrop_cross_entropy`,
            behind a fused last layer too ("eager" has none); "cpp" is the fastest on a CPU and is
            built once for each kind of CPU. Heads of other losses take "auto" alone.
        method: "rdrop", or another regulariser of two passes to compare with it: "r3f" adds noise
            to the embeddings of the second pass, which carries no NLL (its lambda is
            alpha / 4); "fraternal" compares logits by their squared difference, mean over classes
            (its kappa is alpha / 2). Both as in their papers with scale "mean".
        noise: Standard deviation of the noise of "r3f".

    Raises:
        TypeError: For a number that is none.
        ValueError: For an option out of range or that is no choice, or two that exclude each other.
    """

    alpha: float | Literal["auto"] = 1.0
    num_passes: int = 2
    backward_passes: int | None = None
    fraction: float = 1.0
    every_n_steps: int = 1
    rescale: bool = True
    start_step: int = 0
    alpha_schedule: AlphaSchedule = "constant"
    alpha_warmup_steps: int = 0
    alpha_warmup_ratio: float | None = None
    alpha_start: float | None = None
    alpha_rule: AlphaRule = "ramp"
    alpha_max: float | None = None
    alpha_min: float = DEFAULT_ALPHA_MIN
    single_pass_below: float | None = None
    dropout_rates: tuple[float, ...] | None = None
    passes: Literal["stacked", "sequential"] = "stacked"
    scale: Literal["sum", "mean"] = "mean"
    class_weight: tuple[float, ...] | None = None
    unlabelled_index: int | None = None
    likelihood: Likelihood = "auto"
    monitor_steps: int | None = None
    fused_linear: bool | Literal["auto"] = "auto"
    impl: Implementation = "auto"
    method: Method = "rdrop"
    noise: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("dropout_rates", "class_weight"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _as_numbers(name, value))
        for field in fields(self):
            value = getattr(self, field.name)
            # A number of NumPy, which JSON cannot hold.
            if isinstance(value, Real) and hasattr(value, "item"):
                object.__setattr__(self, field.name, value.item())
        check_alpha_numbers(self._alpha_options())
        self._check_numbers()
        self._check_choices()
        self._leave_out_unused()
        self._check_combinations()
        self._check_likelihood()
        self._check_method()
        check_alpha_combinations(self._alpha_options())

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "RDropConfig":
        """Build the config from a mapping of its fields, as `to_dict` writes it.

        Raises:
            TypeError: As the config does, and for options that are no mapping.
            ValueError: As the config does, and for a name that is no field.
        """
        if not isinstance(options, Mapping):
            raise TypeError(f"options must be a mapping, got {type(options).__name__}")
        known = {field.name for field in fields(cls)}
        if "alpha_start" not in options and options.keys() >= _SAVED_BEFORE:
            options = {**options, "alpha_start": 0.0}
        if unknown := sorted(set(options) - known):
            raise ValueError(
                f"RDropConfig has no option {unknown}; it has {sorted(known)}"
                f"{nearest(unknown[0], known)}"
            )
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a dictionary that JSON can hold.

        Where alpha is "auto" by the "ramp" it holds the numbers from which and to which it rises.
        """
        options = asdict(self)
        if self.alpha == "auto" and self.alpha_rule == "ramp":
            ends = auto_range(self.alpha_rule, self.alpha_start, self.alpha_max)
            options["alpha_start"], options["alpha_max"] = ends
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in options.items()
        }

    @property
    def highest_alpha(self) -> float:
        """The most that alpha may be in a run, before `every_n_steps` multiplies it."""
        return self._alpha_options().highest

    def with_alpha(self, alpha: float) -> "RDropConfig":
        """Return the same options with a number as alpha, without what reads another alpha."""
        start = None if self.alpha == "auto" else self.alpha_start
        return replace(
            self,
            alpha=alpha,
            alpha_start=None if start is None else min(start, alpha),
            alpha_rule="ramp",
            alpha_max=None,
            alpha_min=DEFAULT_ALPHA_MIN,
            single_pass_below=None,
        )

    def _alpha_options(self) -> AlphaOptions:
        return AlphaOptions(*(getattr(self, name) for name in AlphaOptions._fields))

    def _leave_out_unused(self) -> None:
        """Take the defaults of before where an option means nothing: saved options hold them."""
        if self.alpha != "auto" and self.alpha_max == RULE_MAX:
            object.__setattr__(self, "alpha_max", None)
        if self.alpha_start == 0 and (self.alpha != "auto" or self.alpha_rule != "ramp"):
            object.__setattr__(self, "alpha_start", None)

    def _check_numbers(self) -> None:
        check_number("fraction", self.fraction, low=0, high=1)
        check_number("noise", self.noise, low=0)
        if self.fraction == 0:
            raise ValueError("fraction must be above 0 and at most 1, got 0")
        for name, low in (("num_passes", 1), ("every_n_steps", 1), ("start_step", 0)):
            check_integer(name, getattr(self, name), low=low)
        if self.monitor_steps is not None:
            check_integer("monitor_steps", self.monitor_steps, low=1)
        if self.backward_passes is not None:
            check_integer("backward_passes", self.backward_passes, low=1)
        if self.unlabelled_index is not None:
            check_integer("unlabelled_index", self.unlabelled_index, low=-(2**63))
            if self.unlabelled_index == IGNORE_INDEX:
                raise ValueError(
                    "unlabelled_index must differ from -100, the label of items that count in "
                    "neither term, got -100; use -1"
                )
        for rate in self.dropout_rates or ():
            if not 0 <= rate < 1:
                raise ValueError(f"dropout_rates must be from 0 up to 1, got {rate}")
        if self.class_weight is not None and not self.class_weight:
            raise ValueError("class_weight must hold one weight for each class, got none")
        for weight in self.class_weight or ():
            check_number("class_weight", weight, low=0)

    def _check_choices(self) -> None:
        choices = {
            "alpha_schedule": get_args(AlphaSchedule),
            "alpha_rule": get_args(AlphaRule),
            "passes": ("stacked", "sequential"),
            "scale": ("sum", "mean"),
            "rescale": (True, False),
            "fused_linear": ("auto", True, False),
            "impl": get_args(Implementation),
            "method": get_args(Method),
            "likelihood": get_args(Likelihood),
        }
        for name, accepted in choices.items():
            value = getattr(self, name)
            # 0 equals False, and is none.
            if value not in accepted or (isinstance(value, int) and not isinstance(value, bool)):
                raise ValueError(f"{name} must be one of {accepted}, got {value!r}")

    def _check_combinations(self) -> None:
        for name in ("alpha", "alpha_start"):
            if self.num_passes == 1 and getattr(self, name) not in (0, None):
                raise ValueError(f"num_passes=1 needs {name}=0, got {name}={getattr(self, name)!r}")
        if self.backward_passes is not None and self.backward_passes > self.num_passes:
            raise ValueError(
                f"backward_passes must be at most num_passes={self.num_passes}, "
                f"got {self.backward_passes}"
            )
        if self.dropout_rates is not None:
            if self.passes != "sequential":
                raise ValueError(
                    "dropout_rates needs passes='sequential': one forward has one rate, "
                    f"got passes={self.passes!r}"
                )
            if len(self.dropout_rates) != self.num_passes:
                raise ValueError(
                    f"dropout_rates must have one rate for each of num_passes={self.num_passes}, "
                    f"got {self.dropout_rates}"
                )
        if self.impl == "eager" and self.fused_linear is True:
            raise ValueError("impl='eager' keeps full logits: it excludes fused_linear=True")

    def _check_likelihood(self) -> None:
        if self.likelihood != "model":
            return
        for name in ("class_weight", "unlabelled_index"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} needs an NLL that regdrop computes, got likelihood='model': "
                    "give the model's own loss its weights, or use likelihood='auto'"
                )
        for name, default in (("method", "rdrop"), ("impl", "auto")):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs likelihood='auto', got 'model'"
                )
        if self.fused_linear is True:
            raise ValueError("fused_linear=True needs likelihood='auto', got 'model'")

    def _check_method(self) -> None:
        if self.method == "rdrop":
            return
        needed: dict[str, Any] = {"num_passes": 2, "fraction": 1.0, "passes": "stacked"}
        if self.method == "r3f":
            needed["backward_passes"] = None
        else:
            needed["impl"] = "auto"
            if self.fused_linear is True:
                raise ValueError(
                    "method='fraternal' compares logits: it excludes fused_linear=True"
                )
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"method={self.method!r} needs {name}={value!r}, got {getattr(self, name)!r}"
                )


def _as_numbers(name: str, value: Any) -> tuple[float, ...]:
    """Return several numbers as a tuple; JSON and the command line give a list."""
    values = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be several numbers, got {value!r}")
    values = list(values)
    for each in values:
        if isinstance(each, bool) or not isinstance(each, Real):
            raise TypeError(f"{name} must be several numbers, got {each!r} among them")
    return tuple(float(each) for each in values)


# A checkpoint may hold the options, as Lightning's hyperparameters: `torch.load` reads what it is
# told to be plain data.
add_safe_globals([RDropConfig])
