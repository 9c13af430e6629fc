"""A folder of results keeps to the settings of its arms, whichever are asked for."""

from dataclasses import replace

import pytest

from regdrop.experiments import build_arms
from regdrop.experiments.arms import optional_arms
from regdrop.experiments.recording.files import write_json
from regdrop.experiments.recording.ownership import hold
from regdrop.experiments.recording.record import record_path
from regdrop.experiments.recording.settings import resolved_config
from regdrop.experiments.running.run import RunPaths
from regdrop.experiments.studies.definitions import study_arms
from regdrop.experiments.studies.earlier import check_earlier
from regdrop.experiments.studies.variations import tried_arm, with_settings


def longer(task):
    return replace(task, training=replace(task.training, max_steps=12))


@pytest.fixture
def save(tmp_path, record, short):
    """Write the record of an arm, as it was made from the short task."""

    def write(arm, **changes):
        config = resolved_config(short, arm) | changes
        record(arm.name, config=config).save(record_path(tmp_path, arm.name, 0))

    return write


def test_results_of_other_settings_are_refused_and_what_they_leave_alone_is_not(
    tmp_path, short, save
):
    for name in ("baseline", "alpha-0"):
        save(build_arms(short)[name])
    stronger = replace(short, rdrop=replace(short.rdrop, alpha=5.0))
    check_earlier(tmp_path, "compare", stronger, ["rdrop"])
    with pytest.raises(
        ValueError, match=r"\(training.max_steps of alpha-0, training.max_steps of b"
    ):
        check_earlier(tmp_path, "compare", longer(short), ["rdrop"])
    # What is asked for is checked by its own record.
    check_earlier(tmp_path, "compare", longer(short), ["baseline", "alpha-0"])
    save(optional_arms(short)["matched-dropout"])
    check_earlier(tmp_path, "compare", short, ["rdrop"])
    with pytest.raises(ValueError, match=r"\(dropout_odds of matched-dropout\)"):
        check_earlier(tmp_path, "compare", stronger, ["rdrop"])


def test_a_run_at_work_and_one_to_go_on_with_count_as_results_do(tmp_path, short):
    paths = RunPaths.compared(tmp_path, "rdrop", 0)
    write_json(paths.work / "config.json", resolved_config(short, build_arms(short)["rdrop"]))
    refused = pytest.raises(ValueError, match=r"other settings \(training.max_steps of rdrop\)")
    check_earlier(tmp_path, "compare", longer(short), ["baseline"])  # stopped before anything
    with hold(paths.lock, "the run"):
        check_earlier(tmp_path, "compare", short, ["baseline"])
        with refused:
            check_earlier(tmp_path, "compare", longer(short), ["baseline"])
    write_json(paths.work / "checkpoint-2" / "trainer_state.json", {"global_step": 2})
    with refused:
        check_earlier(tmp_path, "compare", longer(short), ["baseline"])
    (paths.work / "config.json").write_text("")
    check_earlier(tmp_path, "compare", longer(short), ["baseline"])


def test_records_of_older_versions_and_unknown_arms_are_left(tmp_path, short, save):
    rdrop = build_arms(short)["rdrop"]
    settings = {k: v for k, v in rdrop.rdrop.to_dict().items() if k != "every_n_steps"}
    save(rdrop, rdrop=settings)
    save(replace(rdrop, name="gone", training=longer(short).training))
    check_earlier(tmp_path, "compare", short, ["baseline"])


@pytest.mark.parametrize(
    ("study", "grid"),
    [
        ("alpha", [1 / 3, 1e-5]),
        ("every-n-steps", [1, 7]),
        ("num-passes", [1, 5]),
        ("dropout-rates", [0.15, 1 / 3]),
    ],
)
def test_arms_of_another_grid_are_made_from_their_names(tmp_path, short, save, study, grid):
    for arm in study_arms(study, short, grid):
        save(arm)
    check_earlier(tmp_path, study, short, [])
    last = study_arms(study, short, grid)[-1].name
    with pytest.raises(ValueError, match=rf"training\.max_steps of {last}"):
        check_earlier(tmp_path, study, longer(short), [])


def test_settings_that_were_chosen_for_arms_are_left_out(tmp_path, short, save):
    settings = {"training.learning_rate": 0.5, "rdrop.alpha": 3.0}
    rdrop, matched = build_arms(short)["rdrop"], optional_arms(short)["matched-dropout"]
    for arm in (rdrop, matched):
        save(with_settings(arm, settings))
    check_earlier(tmp_path, "compare", short, ["baseline"], settings)
    with pytest.raises(ValueError, match=r"training\.learning_rate of rdrop"):
        check_earlier(tmp_path, "compare", short, ["baseline"])
    with pytest.raises(
        ValueError, match=r"\(training\.max_steps of matched-dropout, [^,]* rdrop\)"
    ):
        check_earlier(tmp_path, "compare", longer(short), ["baseline"], settings)


def test_what_was_tried_for_arms_is_told_by_their_names(tmp_path, short, save):
    settings = {"training.learning_rate": 0.5, "rdrop.alpha": 3.0}
    for arm in (build_arms(short)["rdrop"], optional_arms(short)["matched-dropout"]):
        save(tried_arm(arm, settings))
    check_earlier(tmp_path, "compare", short, [])
    with pytest.raises(
        ValueError, match=r"\(training\.max_steps of matched-dropout, [^,]* rdrop\)"
    ):
        check_earlier(tmp_path, "compare", longer(short), [])
