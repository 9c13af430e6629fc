"""What a Trainer's run keeps beside its weights: the meter, the rule of alpha, the config."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor

from regdrop.alpha import AlphaController
from regdrop.alpha_options import auto_range
from regdrop.config import RDropConfig
from regdrop.divergence_watch import warn_zero_divergence
from regdrop.integrations.transformers.run.checkpoints import load_renamed_weights
from regdrop.integrations.transformers.run.counting import WindowCounting
from regdrop.integrations.transformers.run.planning import StepPlanner, find_validation_loss
from regdrop.integrations.transformers.run.recording import add_to_model_card
from regdrop.loss import ItemCounts
from regdrop.meter import LossMeter
from regdrop.schedule import StepPlan, follows_validation, is_part_of_run, scheduled_alpha
from regdrop.whole_files import write_text

CONFIG_NAME = "rdrop_config.json"
STATE_NAME = "rdrop_state.json"
# Hyperparameters of a search that are R-Drop's begin so: "rdrop.alpha".
_SEARCH_PREFIX = "rdrop."


class RunState(WindowCounting):
    """The part of `RDropTrainerMixin` that lasts from step to step, and from run to run."""

    _meter: LossMeter
    _planner: StepPlanner
    _given_rdrop: RDropConfig
    # What a search put into `rdrop`, and what its trials drew and took of it.
    _searched_rdrop: RDropConfig | None = None
    _trials: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = ()
    _resumed_state: dict[str, Any] | None = None
    # What was looked at or told in this run.
    _is_dropout_checked = _has_warned = _has_told_of_passes = False
    _looked_at = -1

    def begin_training(self) -> None:
        """Begin the meter and the rule of alpha anew, or as a checkpoint has them.

        An attempt that `auto_find_batch_size` gave up has left its own.
        """
        self._meter = LossMeter(self.args.logging_nan_inf_filter)
        self._planner = StepPlanner(self.rdrop, self.state.max_steps)
        # The model, the loss or the data may be others than those of a run before.
        self._source, self._is_checked = None, False
        self._looked_at, self._has_told_of_loss = -1, False
        self._is_dropout_checked = self._has_warned = self._has_told_of_passes = False
        if self.rdrop.alpha_rule == "restore" and not self.args.load_best_model_at_end:
            raise ValueError(
                "alpha_rule='restore' goes back to the best checkpoint: it needs "
                "load_best_model_at_end=True in the Trainer's arguments, got False"
            )
        has_validation = self.eval_dataset is not None and self.args.eval_strategy != "no"
        if self._planner.reads_validation and not has_validation:
            self._follow_ramp("no evaluation during training")
        if not self.state.global_step:
            return
        is_main = self.accelerator.is_main_process
        if is_main and self._resumed_state is not None:
            self._meter.load(self._resumed_state, self.args.device)
        held = [(self._resumed_state or {}).get("planner")]
        if self.accelerator.num_processes > 1:
            held = broadcast_object_list(held)
        if held[0] is not None:
            read_validation = self._planner.reads_validation
            self._planner.load(held[0], self.args.device, is_main)
            if read_validation and not self._planner.reads_validation:
                self._follow_ramp("none in the run so far")
            self._compare_length(held[0].get("total_steps"))

    def _note_step(
        self, plan: StepPlan, nll: Tensor, kl: Tensor | None, counts: ItemCounts
    ) -> None:
        self._meter.add(plan, nll, kl, counts)
        self._planner.add(plan, nll, kl, counts)

    def _note_evaluation(self, metrics: dict[str, float]) -> None:
        """Let a rule of alpha that reads the validation loss have it."""
        if not self._planner.reads_validation:
            return
        loss = find_validation_loss(metrics, self.eval_dataset)
        if self.accelerator.num_processes > 1:
            [loss] = broadcast_object_list([loss])
        if loss is None:
            self._follow_ramp(f"no loss among {', '.join(metrics)}, which the evaluation gave")
            return
        step = self.state.global_step - 1
        self._should_restore = self._planner.observe(step, loss, self.accelerator.reduce)

    def _follow_ramp(self, reason: str) -> None:
        controller = self._planner.controller
        assert controller is not None
        controller.follow_ramp()
        self._tell(
            f"alpha_rule={self.rdrop.alpha_rule!r} follows the validation loss, and there is "
            f"{reason}: alpha follows the ramp to {controller.alpha_max:g}"
        )

    def _collect_parts(self) -> dict[str, float]:
        """Return the means since the last log, and begin anew."""
        parts = self._meter.collect(self.accelerator.reduce)
        # In its first step a new LoRA adapter is zero, and so is the divergence.
        if parts.get("kl") == 0.0 and self.state.global_step > 1 and not self._has_warned:
            warn_zero_divergence()
            self._has_warned = True
        if self.rdrop.single_pass_below is not None:
            parts["passes"] = self._planner.collect_passes()
        return parts

    def _write_beside(self, folder: Path, is_checkpoint: bool) -> None:
        """Write the config beside a model, and beside a checkpoint the state."""
        reduce, state = self.accelerator.reduce, None
        if is_checkpoint:
            state = {**self._meter.state(reduce), "planner": self._planner.state(reduce)}
        if self.args.should_save:
            _write(folder / CONFIG_NAME, self.rdrop.to_dict())
            if state is not None:
                _write(folder / STATE_NAME, state)

    def _read_beside(self, checkpoint: str | None) -> None:
        """Read the state that a checkpoint has; `begin_training` takes it up."""
        self._resumed_state = None
        if checkpoint is None or not self.accelerator.is_main_process:
            return
        state, config = Path(checkpoint) / STATE_NAME, Path(checkpoint) / CONFIG_NAME
        if state.exists():
            self._resumed_state = json.loads(state.read_text(encoding="utf-8"))
        if config.exists():
            saved = json.loads(config.read_text(encoding="utf-8"))
            self._compare_alpha(saved)
            planner = (self._resumed_state or {}).get("planner")
            # A ramp that was asked for once left a state, as one that a rule had to follow does.
            if planner is not None and saved.get("alpha_rule") == "ramp":
                planner["rule"] = None

    def _compare_alpha(self, saved: dict[str, Any]) -> None:
        """Tell where alpha="auto" rises otherwise than in the run that a checkpoint is of."""
        if not saved.get("alpha") == self.rdrop.alpha == "auto":
            return
        now, was = _rise(self.rdrop.to_dict()), _rise({"alpha_start": 0.0, **saved})
        names = [name for name in now if was[name] != now[name]]
        if names:
            before, after = (", ".join(f"{n}={x[n]!r}" for n in names) for x in (was, now))
            self._tell(
                f"alpha='auto' goes on by {after}; the checkpoint's run had {before}: give these "
                "to go on as it was"
            )

    def _compare_length(self, before: int | None) -> None:
        """Tell where alpha goes on as in a run of another length than the checkpoint's."""
        now = self.state.max_steps
        if before in (None, now) or self._planner.reads_validation:
            return
        if not is_part_of_run(self.rdrop):
            return
        step = self.state.global_step
        here, was = (f"{_ramp_at(self.rdrop, step, total):.3g}" for total in (now, before))
        if here != was:
            self._tell(
                f"alpha is {here} here and was {was}: it is a part of the run, which has {now} "
                f"steps and had {before} at the checkpoint"
            )

    def _load_renamed(self, checkpoint: str | None) -> bool:
        """Load weights that have other names than the model's; return whether they were such."""
        if checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        return self.model is not None and load_renamed_weights(self.model, checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's model card, with the R-Drop options among its hyperparameters."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_model_card(Path(self.args.output_dir or ".") / "README.md", self.rdrop)

    def _take_searched(self, params: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
        """Take R-Drop's hyperparameters of a trial, such as "rdrop.alpha"; return the others.

        Args:
            params: The hyperparameters, as the Trainer takes them.
            named: Those that the search drew, by the names under which it tells its best.
        """
        if self.rdrop is not self._searched_rdrop:
            self._given_rdrop = self.rdrop
        own = _own_options(params)
        self._trials += ((named, own),)
        # What a trial does not name is as it was given, not as another trial had it.
        self._search_with(own)
        return {name: v for name, v in params.items() if not name.startswith(_SEARCH_PREFIX)}

    def _leave_search(self) -> None:
        """Take the options that `args` were given after a search, as those of its best trial.

        Without them the options are as they were given to the trainer. Options that somebody
        has put into `rdrop` since are kept.
        """
        if self.rdrop is not self._searched_rdrop and self.rdrop is not self._given_rdrop:
            return
        had = vars(self.args)
        # A trial may name what it draws otherwise than the option, or compute the option of it.
        drawn = (
            own
            for named, own in reversed(self._trials)
            if named and all(name in had and had[name] == value for name, value in named.items())
        )
        self._search_with({**next(drawn, {}), **_own_options(had)})

    def _search_with(self, options: dict[str, Any]) -> None:
        """Have the given options but for these."""
        self.rdrop = RDropConfig.from_dict({**asdict(self._given_rdrop), **options})
        self._searched_rdrop = self.rdrop
        # The model may be another too.
        self._source, self._is_checked = None, False


def _ramp_at(config: RDropConfig, step: int, total_steps: int) -> float:
    """Return alpha of a step in a run of so many steps that has no validation loss."""
    if not follows_validation(config):
        return scheduled_alpha(config, step, total_steps)
    controller = AlphaController.from_config(config, total_steps)
    controller.follow_ramp()
    return controller.alpha_at(step)


def _rise(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return how alpha="auto" rises by saved options, where None is the number that it means."""
    rule = options.get("alpha_rule", "ramp")
    start, end = auto_range(rule, options["alpha_start"], options.get("alpha_max"))
    return {"alpha_rule": rule, "alpha_start": start, "alpha_max": end}


def _own_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return R-Drop's among some hyperparameters, by the names of the config."""
    return {
        name.removeprefix(_SEARCH_PREFIX): value
        for name, value in params.items()
        if name.startswith(_SEARCH_PREFIX)
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
