import json
from types import SimpleNamespace

import pytest

from regdrop.experiments.recording import history
from regdrop.experiments.recording.history import DivergedError, HistoryCallback


class Clock:
    """A clock that goes on when it is told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def go(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(history.time, "perf_counter", clock)
    return clock


def state_at(step):
    return SimpleNamespace(global_step=step, is_world_process_zero=True)


def test_seconds_are_those_of_training_without_evaluations_and_checkpoints(tmp_path, clock):
    callback = HistoryCallback(tmp_path / "history.jsonl")
    callback.on_train_begin(None, state_at(0), None)
    for step in (1, 2):
        clock.go(3.0)
        callback.on_step_end(None, state_at(step), None)
        callback.on_log(None, state_at(step), None, logs={"loss": 1.0})
        clock.go(50.0)  # the evaluation
        callback.on_evaluate(None, state_at(step), None, metrics={"eval_nll": 0.5})
        clock.go(700.0)  # the checkpoint
        callback.on_save(None, state_at(step), None)
    assert callback.seconds == 6.0
    assert [e["seconds"] for e in callback.entries] == [3.0, 3.0, 6.0, 6.0]
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == callback.entries


def test_a_resumed_history_has_what_was_before_its_checkpoint_and_goes_on_from_its_time(
    tmp_path, clock
):
    path = tmp_path / "history.jsonl"
    entries = [{"loss": 1.0, "step": step, "seconds": 3.0 * step} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"loss": 1.0, "st')
    clock.go(1000.0)
    callback = HistoryCallback(path)
    callback.on_train_begin(None, state_at(2), None)
    assert callback.entries == entries[:2]
    clock.go(4.0)
    callback.on_step_end(None, state_at(3), None)
    assert callback.seconds == 10.0


@pytest.mark.parametrize("name", ["loss", "train_loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_whether_it_is_of_a_log_or_of_the_whole_run(
    tmp_path, name, value
):
    callback = HistoryCallback(tmp_path / "history.jsonl")
    with pytest.raises(DivergedError, match=f"the training loss is {value} at step 7: "):
        callback.on_log(None, state_at(7), None, logs={name: value, "grad_norm": 1.0})


def test_a_gradient_that_a_scaled_loss_makes_infinite_is_no_divergence(tmp_path):
    callback = HistoryCallback(tmp_path / "history.jsonl")
    callback.on_log(None, state_at(7), None, logs={"loss": 1.0, "grad_norm": float("inf")})
    assert callback.entries[-1]["grad_norm"] == float("inf")


def test_a_validation_metric_that_is_no_number_ends_the_run(tmp_path):
    callback = HistoryCallback(tmp_path / "history.jsonl")
    with pytest.raises(DivergedError, match=r"validation nll is nan at step 7: .* Lower"):
        callback.on_evaluate(None, state_at(7), None, metrics={"eval_nll": float("nan")})
