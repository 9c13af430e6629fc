"""Settings of an arm searched in ranges by Optuna, by several machines at once if need be."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from regdrop.experiments.arms import Arm
from regdrop.experiments.studies.choices import TunedArm
from regdrop.experiments.studies.variations import Setting, Variation, tried_arm

STORAGE_NAME = "optuna.db"


_HEARTBEAT_SECONDS = 60


def search(
    arm: Arm,
    variations: Sequence[Variation],
    measure: Callable[[Sequence[Arm]], Mapping[str, float]],
    *,
    name: str,
    storage: str,
    trials: int,
    greater_is_better: bool,
) -> TunedArm:
    """Choose settings of an arm by Optuna; what other machines tried in the same search counts.

    Args:
        arm: The arm.
        variations: What is chosen.
        measure: From arms to the metric of each, by its name.
        name: Name of the search, of all on which its trials depend.
        storage: Address of Optuna's storage.
        trials: Number of settings that are tried.
        greater_is_better: Direction of the metric.

    Raises:
        ValueError: If the storage cannot be opened.
    """
    import optuna

    def objective(trial: optuna.Trial) -> float:
        run = tried_arm(arm, _rounded({v.name: _suggest(trial, v) for v in variations}))
        try:
            return measure([run])[run.name]
        except KeyboardInterrupt:  # whoever repeats the command goes on with this trial's runs
            study.enqueue_trial(trial.params)
            raise

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=name,
        storage=_open_storage(storage),
        direction="maximize" if greater_is_better else "minimize",
        # Without a seed, lest two machines, or a search that goes on, try the same again.
        sampler=optuna.samplers.TPESampler(),
        load_if_exists=True,
    )
    done = (optuna.trial.TrialState.COMPLETE,)
    if len(study.get_trials(deepcopy=False, states=done)) < trials:
        enough = optuna.study.MaxTrialsCallback(trials, states=done)
        study.optimize(objective, callbacks=[enough])
    finished = study.get_trials(deepcopy=False, states=done)
    return TunedArm(_rounded(study.best_params), float(study.best_value), len(finished))


def _open_storage(address: str) -> Any:
    """Open Optuna's storage so that a trial whose process was killed is begun again."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import SQLAlchemyError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            return RDBStorage(
                address,
                heartbeat_interval=_HEARTBEAT_SECONDS,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
            )
        except (ImportError, SQLAlchemyError) as error:
            raise ValueError(
                f"the storage of a search cannot be opened: {address!r}, "
                f"{str(error).splitlines()[0]}"
            ) from error


def _rounded(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Return settings as a person writes them."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in settings.items()}


def _suggest(trial: Any, variation: Variation) -> Setting:
    if variation.values:
        value: Setting = trial.suggest_categorical(variation.name, list(variation.values))
        return value
    low, high = variation.low, variation.high
    if isinstance(low, int) and isinstance(high, int):
        return int(trial.suggest_int(variation.name, low, high, log=variation.log))
    return float(trial.suggest_float(variation.name, low, high, log=variation.log))
