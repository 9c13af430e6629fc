import json
from dataclasses import replace

import pytest

from regdrop.experiments import build_arms, run_arm
from regdrop.experiments.arms import optional_arms
from regdrop.experiments.studies import tuning
from regdrop.experiments.studies.choices import (
    TunedArm,
    apply_tuned,
    check_tuned,
    differing_choice,
    load_tuned,
    save_tuned,
)
from regdrop.experiments.studies.definitions import study_arms
from regdrop.experiments.studies.tuning import NoFiniteFigureError, tune, varied_settings
from regdrop.experiments.studies.variations import (
    Variation,
    describe_settings,
    parse_variation,
    with_settings,
)


@pytest.fixture
def runs(monkeypatch):
    """Run in this process, and note what is trained anew."""
    trained = []

    def run_arms(task, arms, *, seeds, folder, **options):
        records = []
        for arm in arms:
            for seed in seeds:
                is_new = not (folder / "records" / f"{arm.name}-seed{seed}.json").exists()
                trained.extend([(arm.name, seed)] if is_new else [])
                records.append(run_arm(task, arm, seed, folder))
        return records

    monkeypatch.setattr(tuning, "run_arms", run_arms)
    return trained


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rdrop.alpha=1,2.5", Variation("rdrop.alpha", values=(1, 2.5))),
        ("training.optim=sgd", Variation("training.optim", values=("sgd",))),
        ("rdrop.fraction=0.1:1", Variation("rdrop.fraction", low=0.1, high=1)),
        ("rdrop.alpha=0.1:10:log", Variation("rdrop.alpha", low=0.1, high=10, log=True)),
    ],
)
def test_variations_as_they_are_typed(text, expected):
    assert repr(parse_variation(text)) == repr(expected)


@pytest.mark.parametrize(
    "text",
    [
        "alpha=1",
        "rdrop.alpha",
        "rdrop.alpha=",
        "task.dropout=1",
        "rdrop.alpha=2:1",
        "rdrop.alpha=0:1:log",
        "rdrop.alpha=a:b",
        "rdrop.alpha=1:2:linear",
    ],
)
def test_what_is_no_variation_is_named(text):
    with pytest.raises(ValueError, match=r"a (variation|range) must be .*, got '"):
        parse_variation(text)


def test_every_combination_is_tried_and_the_best_on_validation_is_taken(tmp_path, short, runs):
    """So small a learning rate learns nothing; the seeds are averaged."""
    arms = [build_arms(short)[name] for name in ("baseline", "rdrop")]
    variations = [
        Variation("training.learning_rate", values=(1e-9, 1e-2)),
        Variation("rdrop.alpha", values=(1, 2)),
    ]
    found = tune(short, arms, variations, seeds=[7, 8], folder=tmp_path)
    # Alpha means nothing to the baseline.
    assert found["baseline"].settings == {"training.learning_rate": 1e-2}
    assert (found["baseline"].tried, found["rdrop"].tried) == (2, 4)
    assert found["rdrop"].settings["training.learning_rate"] == 1e-2
    assert len(runs) == 2 * 2 + 4 * 2
    name = describe_settings(found["rdrop"].settings)
    figures = [
        json.loads((tmp_path / "records" / f"rdrop@{name}-seed{seed}.json").read_text())
        for seed in (7, 8)
    ]
    mean = sum(record["validation"]["nll"] for record in figures) / 2
    assert found["rdrop"].validation == pytest.approx(mean)
    runs.clear()
    assert tune(short, arms, variations, seeds=[7, 8], folder=tmp_path) == found
    assert runs == []


def test_a_search_stays_in_its_range_and_goes_on_where_it_stopped(tmp_path, short, runs):
    pytest.importorskip("optuna")
    arms = [build_arms(short)["rdrop"]]
    variations = [Variation("rdrop.alpha", low=0.1, high=10.0, log=True)]

    def search(trials):
        return tune(short, arms, variations, seeds=[7], folder=tmp_path, trials=trials)["rdrop"]

    found = search(2)
    assert (found.tried, len(runs)) == (2, 2)
    assert 0.1 <= found.settings["rdrop.alpha"] <= 10
    again = search(3)
    assert (again.tried, len(runs)) == (3, 3)
    assert len(set(runs)) == 3
    assert again.validation <= found.validation
    assert search(3) == again
    assert (tmp_path / "optuna.db").exists()


def test_a_search_over_whole_numbers_and_of_other_settings_is_another_search(tmp_path, short, runs):
    pytest.importorskip("optuna")
    arm = build_arms(short)["rdrop"]

    def search(low, high):
        variation = Variation("rdrop.every_n_steps", low=low, high=high)
        return tune(short, [arm], [variation], seeds=[7], folder=tmp_path, trials=1)["rdrop"]

    assert search(2, 3).settings["rdrop.every_n_steps"] in (2, 3)
    assert search(5, 6).settings["rdrop.every_n_steps"] in (5, 6)
    assert len(runs) == 2


def test_an_interrupted_search_goes_on_with_the_trial_it_was_at(tmp_path, short, monkeypatch):
    pytest.importorskip("optuna")
    arm = build_arms(short)["rdrop"]
    asked = []

    def run_arms(task, arms, **options):
        asked.append(arms[0].name)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return [run_arm(task, arms[0], 7, tmp_path)]

    monkeypatch.setattr(tuning, "run_arms", run_arms)
    variation = Variation("rdrop.alpha", low=0.1, high=10.0)
    options = {"seeds": [7], "folder": tmp_path, "trials": 1}
    with pytest.raises(KeyboardInterrupt):
        tune(short, [arm], [variation], **options)
    assert tune(short, [arm], [variation], **options)["rdrop"].tried == 1
    assert asked[0] == asked[1]


def test_a_run_that_diverged_is_never_chosen(tmp_path, short, record, monkeypatch):
    arm = build_arms(short)["rdrop"]

    def run_arms(task, arms, **options):
        figures = {"rdrop@rdrop.alpha=1": float("nan"), "rdrop@rdrop.alpha=2": 0.7}
        return [
            record(one.name, validation={"nll": figures.get(one.name, float("nan"))})
            for one in arms
        ]

    monkeypatch.setattr(tuning, "run_arms", run_arms)
    options = {"seeds": [7], "folder": tmp_path}
    found = tune(short, [arm], [Variation("rdrop.alpha", values=(1, 2, 3))], **options)
    assert found["rdrop"].settings == {"rdrop.alpha": 2}
    with pytest.raises(ValueError, match=r"no setting of rdrop .* ends with a finite figure"):
        tune(short, [arm], [Variation("rdrop.alpha", values=(1, 3))], **options)


def test_what_was_chosen_is_taken_for_every_arm_of_its_study(tmp_path, short, runs):
    baseline, rdrop = arms = [build_arms(short)[name] for name in ("baseline", "rdrop")]

    def choose(alpha, **changes):
        variation = Variation("rdrop.alpha", values=(alpha,))
        return tune(short, [rdrop], [variation], seeds=[7], folder=tmp_path, **changes)

    path = save_tuned(tmp_path, "compare", short, choose(0.5))
    with pytest.raises(ValueError, match=r"a choice for every arm, .* lacks baseline"):
        apply_tuned(arms, "compare", path)
    with pytest.raises(ValueError, match="for the arms of 'compare', not of 'cost'"):
        apply_tuned([rdrop], "cost", path)
    # What is chosen later for another arm stands beside it.
    variations = [Variation("training.learning_rate", values=(1e-2,))]
    later = tune(short, [baseline], variations, seeds=[7], folder=tmp_path)
    save_tuned(tmp_path, "compare", short, later)
    changed = apply_tuned(arms, "compare", path)
    assert changed[0] == with_settings(baseline, {"training.learning_rate": 1e-2})
    assert changed[1] == replace(rdrop, rdrop=replace(rdrop.rdrop, alpha=0.5))
    path.write_text("[]")
    with pytest.raises(ValueError, match="is not a file of `regdrop tune`"):
        apply_tuned(arms, "compare", path)


def test_a_search_of_less_does_not_drop_what_was_chosen_before(tmp_path, short):
    arms = [build_arms(short)[name] for name in ("baseline", "rdrop")]
    alpha = Variation("rdrop.alpha", values=(1, 3))
    rate = Variation("training.learning_rate", values=(1e-3, 1e-2))
    check_tuned(tmp_path, "compare", arms, [alpha])
    chosen = {"training.learning_rate": 1e-3}
    save_tuned(tmp_path, "compare", short, {"baseline": TunedArm(chosen, 0.9, 2)})
    check_tuned(tmp_path, "compare", arms[1:], [alpha])
    check_tuned(tmp_path, "compare", arms, [alpha, rate])
    with pytest.raises(ValueError, match=r"a choice of training.learning_rate for baseline"):
        check_tuned(tmp_path, "compare", arms, [alpha])


def test_settings_that_there_are_not_are_named_before_anything_runs(tmp_path, short, runs):
    arm = build_arms(short)["rdrop"]
    with pytest.raises(ValueError, match="rdrop has no setting 'beta'"):
        with_settings(arm, {"rdrop.beta": 1})
    for name, values, message in (
        ("training.max_steps", (8, 0), "max_steps must be at least 1, got 0"),
        ("training.learning_rate", (1e-3, "x"), "training.learning_rate must be a number, got 'x'"),
        ("rdrop.every_n_steps", (1.5,), "rdrop.every_n_steps cannot be 1.5|must be an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(short, [arm], [Variation(name, values)], seeds=[7], folder=tmp_path / "out")
    with pytest.raises(ValueError, match=r"nothing of what is varied \(rdrop.alpha\) matters"):
        tune(
            short,
            [build_arms(short)["alpha-0"]],
            [Variation("rdrop.alpha", (1,))],
            seeds=[7],
            folder=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", ["1,1.0", "1,1", "a,a"])
def test_a_value_is_tried_once(values):
    with pytest.raises(ValueError, match="the values of a variation must differ"):
        parse_variation(f"rdrop.alpha={values}")


def test_a_setting_is_varied_once(tmp_path, short):
    twice = [Variation("rdrop.alpha", values=(1,)), Variation("rdrop.alpha", values=(3,))]
    with pytest.raises(ValueError, match=r"varied once, got rdrop.alpha 2 times"):
        tune(short, [build_arms(short)["rdrop"]], twice, seeds=[7], folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arm", "name", "value"),
    [
        ("baseline-2x", "training.max_steps", 6),
        ("two-thirds-batch", "training.batch_size", 8),
        ("rdrop-one-backward", "rdrop.backward_passes", 2),
        ("alpha-1", "rdrop.alpha", 3),
        ("r3f", "rdrop.method", "rdrop"),
    ],
)
def test_what_makes_an_arm_is_not_varied(short, arm, name, value):
    alphas = {one.name: one for one in study_arms("alpha", short, [0, 1])}
    known = {**build_arms(short), **optional_arms(short), **alphas}
    with pytest.raises(ValueError, match=f"{name} must not be varied for {arm} "):
        varied_settings(short, [known[arm]], [Variation(name, values=(value,))])


@pytest.mark.parametrize(
    ("study", "name", "arm"),
    [("alpha", "rdrop.alpha", "alpha-1"), ("num-passes", "rdrop.num_passes", "passes-2")],
)
def test_what_makes_another_arm_of_the_study_is_not_varied(short, study, name, arm):
    """Nor for the arm whose value is the task's own."""
    task = replace(short, rdrop=replace(short.rdrop, alpha=1.0))
    arms = study_arms(study, task)
    one = [own for own in arms if own.name == arm]
    with pytest.raises(ValueError, match=f"{name} must not be varied for {arm}: .* another arm"):
        varied_settings(task, one, [Variation(name, values=(2, 3))], arms)
    # Two passes without the KL differ in alpha, which is not varied for them.
    five = build_arms(task)
    alpha = Variation("rdrop.alpha", values=(1, 3))
    assert varied_settings(task, [five["rdrop"]], [alpha], list(five.values()))


def test_the_weight_of_other_methods_and_the_odds_of_dropout_are_varied(short):
    arms = list(optional_arms(short).values())
    found = varied_settings(short, arms, [Variation("rdrop.alpha", values=(1, 3))])
    assert set(found) == set(optional_arms(short))


def test_an_alpha_that_rises_by_itself_is_a_value(short):
    variation = parse_variation("rdrop.alpha=auto,1")
    rdrop = build_arms(short)["rdrop"]
    assert varied_settings(short, [rdrop], [variation]) == {"rdrop": [variation]}
    assert with_settings(rdrop, {"rdrop.alpha": "auto"}).rdrop.alpha == "auto"


def test_a_better_earlier_choice_by_the_same_seeds_stays(tmp_path, short):
    """The task's figure is the NLL, of which less is better."""

    def choose(alpha, figure, seeds=(7,)):
        found = {"rdrop": TunedArm({"rdrop.alpha": alpha}, figure, 1, seeds)}
        return load_tuned(save_tuned(tmp_path, "compare", short, found), "compare")["rdrop"]

    assert choose(1, 0.5).settings == {"rdrop.alpha": 1}
    assert choose(3, 0.6).settings == {"rdrop.alpha": 1}
    assert choose(5, 0.4) == TunedArm({"rdrop.alpha": 5}, 0.4, 1, (7,))
    rdrop, alpha = build_arms(short)["rdrop"], Variation("rdrop.alpha", values=(1,))
    check_tuned(tmp_path, "compare", [rdrop], [alpha], seeds=[7])
    with pytest.raises(ValueError, match=r"for rdrop by the seeds 7, got 7, 8; choose by the same"):
        check_tuned(tmp_path, "compare", [rdrop], [alpha], seeds=[7, 8])


def test_a_choice_that_another_command_made_meanwhile_is_not_lost(tmp_path, short):
    first = {"rdrop": TunedArm({"training.learning_rate": 0.1}, 0.5, 1, (7,))}
    path = save_tuned(tmp_path, "compare", short, first)
    for other, message in (
        (TunedArm({"rdrop.alpha": 1}, 0.4, 1, (7,)), "a choice of training.learning_rate"),
        (TunedArm({"training.learning_rate": 0.2}, 0.4, 1, (8,)), "by the seeds 7, got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            save_tuned(tmp_path, "compare", short, {"rdrop": other})
    assert load_tuned(path, "compare") == first


def test_a_choice_says_of_what_it_is(tmp_path, short):
    found = {"rdrop": TunedArm({"rdrop.alpha": 1}, 0.5, 1, (7, 8)), "alpha-0": TunedArm()}
    path = save_tuned(tmp_path, "compare", short, found)

    def said(task, seeds):
        return " ".join(differing_choice(path, "compare", task, ["rdrop", "alpha-0"], seeds))

    assert said(short, [0, 1]) == ""
    assert "The seed 8 is among those by which" in said(short, [8, 9])
    assert "for the task short, not for long" in said(replace(short, name="long"), [0])
    longer = replace(short, training=replace(short.training, max_steps=12))
    assert "for runs of 6 steps, not of 12" in said(longer, [0])
    # An older version did not tell.
    content = json.loads(path.read_text())
    old = {"settings": {"rdrop.alpha": 1}, "validation": 0.5, "tried": 1}
    path.write_text(json.dumps({"study": content["study"], "arms": {"rdrop": old}}))
    assert said(longer, [7]) == ""


AUTO = {"rdrop.alpha": "auto"}


def choose_before(folder, task, settings, figure=0.5):
    """Write a choice as a version did whose alpha="auto" rose from 0 to 16."""
    path = save_tuned(folder, "compare", task, {"rdrop": TunedArm(settings, figure, 1, (7,))})
    content = json.loads(path.read_text())
    del content["arms"]["rdrop"]["auto"]
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("others", "before", "after"),
    [
        ({}, "alpha_start=0.0, alpha_max=16.0", "alpha_start=3.0, alpha_max=10.0"),
        ({"rdrop.alpha_max": 8.0}, "alpha_start=0.0", "alpha_start=3.0"),
        ({"rdrop.alpha_start": 0.0}, "alpha_max=16.0", "alpha_max=10.0"),
        ({"rdrop.alpha_start": 0.0, "rdrop.alpha_max": 8.0}, None, None),
        ({"rdrop.alpha_rule": "stall"}, None, None),
        ({"rdrop.alpha": 1}, None, None),
    ],
)
def test_a_choice_of_auto_says_what_that_was(tmp_path, short, others, before, after):
    path = choose_before(tmp_path, short, AUTO | others)
    said = differing_choice(path, "compare", short, ["rdrop", "alpha-0"], [0])
    expected = f'{path} was chosen for rdrop where alpha="auto" had {before}. It has {after} now.'
    assert said == ([expected] if before else [])


@pytest.mark.parametrize("figure", [0.6, 0.4])
def test_a_choice_beside_one_of_before_is_not_of_before(tmp_path, short, figure):
    """Nor is one of before of today where it stays, as the better one by the NLL."""
    path = choose_before(tmp_path, short, AUTO)
    now = {
        "rdrop": TunedArm(AUTO, figure, 1, (7,)),
        "rdrop-one-backward": TunedArm(AUTO, 0.5, 1, (7,)),
    }
    save_tuned(tmp_path, "compare", short, now)
    said = differing_choice(path, "compare", short, [*now], [0])
    assert len(said) == (figure > 0.5)
    assert all("was chosen for rdrop where" in line for line in said)


def test_an_arm_that_diverges_everywhere_does_not_lose_the_choice_of_others(
    tmp_path, short, record, monkeypatch
):
    def run_arms(task, arms, **options):
        return [
            record(arm.name, validation={"nll": float("nan") if "rdrop@" in arm.name else 0.5})
            for arm in arms
        ]

    monkeypatch.setattr(tuning, "run_arms", run_arms)
    arms = [build_arms(short)[name] for name in ("rdrop", "baseline")]
    variation = Variation("training.learning_rate", values=(1e-3, 1e-2))
    with pytest.raises(NoFiniteFigureError, match="no setting of rdrop that was varied") as caught:
        tune(short, arms, [variation], seeds=[7], folder=tmp_path)
    chosen = TunedArm({"training.learning_rate": 1e-3}, 0.5, 2, (7,))
    assert caught.value.chosen == {"baseline": chosen}
