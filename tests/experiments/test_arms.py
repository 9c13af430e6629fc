from dataclasses import asdict

from regdrop import RDropConfig
from regdrop.experiments import build_arms
from regdrop.tasks.image_presets import DIGITS


def test_five_arms_differ_in_what_their_names_say():
    arms = build_arms(DIGITS)
    assert list(arms) == ["baseline", "baseline-2x", "alpha-0", "rdrop", "rdrop-one-backward"]
    single = RDropConfig(alpha=0, num_passes=1, monitor_steps=DIGITS.training.logging_steps)
    assert arms["baseline"].rdrop == arms["baseline-2x"].rdrop == single
    assert (arms["alpha-0"].rdrop.alpha, arms["alpha-0"].rdrop.num_passes) == (0, 2)
    assert arms["rdrop"].rdrop.alpha == DIGITS.rdrop.alpha > 0
    assert arms["rdrop"].rdrop.backward_passes is None
    assert arms["rdrop-one-backward"].rdrop.backward_passes == 1
    assert {arm.rdrop.scale for arm in arms.values()} == {"mean"}


def test_equal_compute_means_twice_the_updates_and_nothing_else():
    arms = build_arms(DIGITS)
    once, twice = (asdict(arms[name].training) for name in ("baseline", "baseline-2x"))
    assert twice.pop("max_steps") == 2 * once.pop("max_steps")
    assert once == twice
    assert all(arms[name].training == DIGITS.training for name in ("alpha-0", "rdrop"))
