import pytest

from regdrop.experiments.reporting.verdict import verdict


@pytest.fixture
def compared(record):
    """Return records from accuracies by arm; R-Drop's take 15 seconds, the others' 10."""

    def make(**accuracies):
        return [
            record(name, seed, value, seconds=15.0 if name == "rdrop" else 10.0)
            for arm, values in accuracies.items()
            for name in [arm.replace("_", "-")]
            for seed, value in enumerate(values)
        ]

    return make


def test_a_gain_is_said_with_its_interval_its_controls_and_its_cost(compared):
    runs = compared(
        rdrop=[0.93, 0.94, 0.95],
        baseline=[0.90, 0.92, 0.91],
        baseline_2x=[0.90, 0.91, 0.92],
        alpha_0=[0.92, 0.94, 0.96],
        matched_dropout=[0.91, 0.90, 0.92],
    )
    assert verdict(runs) == (
        "R-Drop raises the test accuracy (%) from 91.00 to 94.00, by 3.00 ± 2.48 (95 % interval "
        "over 3 seeds), and is clearly better than twice the updates or more dropout, but not "
        "clearly better than two passes without the KL; training takes 1.5 times as long, "
        "prediction no longer."
    )


def test_without_controls_none_are_beaten(compared):
    text = verdict(compared(rdrop=[0.93, 0.94, 0.95], baseline=[0.90, 0.92, 0.91]))
    assert "better" not in text


def test_a_lower_figure_can_be_the_better_one(record):
    runs = [
        record(arm, seed, test={"nll": nll + seed / 100}, seconds=10.0)
        for arm, nll in (("baseline", 0.5), ("rdrop", 0.3), ("alpha-0", 0.2))
        for seed in range(3)
    ]
    text = verdict(runs)
    assert text.startswith("R-Drop lowers the test NLL from 0.510 to 0.310, by 0.200 ± 0.000")
    # Clearly worse than a control is not better than it.
    assert "but not clearly better than two passes without the KL" in text


@pytest.mark.parametrize(
    ("rdrop", "words"),
    [
        ([0.90, 0.93, 0.91], "shows no clear gain here: its test accuracy (%) is 91.33"),
        ([0.80, 0.82, 0.81], "is clearly worse here: its test accuracy (%) is 81.00"),
    ],
)
def test_where_there_is_no_gain_none_is_claimed(compared, rdrop, words):
    text = verdict(compared(rdrop=rdrop, baseline=[0.90, 0.92, 0.91], alpha_0=[0.7, 0.7, 0.7]))
    assert words in text
    assert "better" not in text


def test_one_seed_tells_nothing(compared):
    text = verdict(compared(rdrop=[0.95], baseline=[0.90], alpha_0=[0.90]))
    assert "95.00 where the baseline's is 90.00" in text
    assert "chance" in text
    assert "±" not in text


def test_only_seeds_of_both_count(compared, record):
    runs = compared(rdrop=[0.93, 0.94, 0.95], baseline=[0.90, 0.92, 0.91])
    odd = [record("rdrop", 7, 0.1), record("baseline", 8, 0.2), record("alpha-0", 9, 0.3)]
    assert verdict([*runs, *odd]) == verdict(runs)
    assert verdict(odd) is None
    assert verdict(compared(rdrop=[0.9, 0.8])) is None
