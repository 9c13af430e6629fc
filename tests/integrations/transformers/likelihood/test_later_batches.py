"""What the first batch does not show of a loss: it is that of the plain Trainer all the same."""

import logging
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, Trainer, TrainerCallback

from regdrop import RDropConfig
from regdrop.integrations.transformers import RDropTrainer, RDropTrainerMixin
from training import (
    NamedRows,
    Plain,
    assert_same_outcome,
    assert_same_run,
    logged,
    number_rows,
    outcome,
    said,
    train,
)

sys.path.insert(0, str(Path(__file__).parents[2]))

from sharded_runs import in_two_processes

ONE_PASS = RDropConfig(alpha=0.0, num_passes=1)
SIZE, BATCH = 24, 4


def plain_model(criterion, width=3, dropout=0.0, **options):
    return Plain(criterion, width, dropout=dropout, **options)


def run(folder, model, data, kind=RDropTrainer, rdrop=ONE_PASS, **options):
    sizes = {"max_steps": 6, "per_device_train_batch_size": BATCH, "remove_unused_columns": False}
    rdrop = rdrop if issubclass(kind, RDropTrainerMixin) else None
    return train(folder, model, data, rdrop, kind, **{**sizes, **options})


def assert_is_plain(folder, make, data, **options):
    """Assert that one pass without the divergence trains as the plain Trainer does."""
    ours = run(folder, make(), data, **options)
    assert_same_run(ours, run(folder, make(), data, Trainer, **options))
    return ours


def masked(criterion, mark, scores, labels):
    scores = scores.squeeze(-1) if scores.shape[-1] == 1 else scores
    known = ~labels.isnan() & (labels != mark)
    return criterion(scores[known], labels[known])


def marked(labels, mark):
    """Mark one label of every row behind the second batch as missing."""
    labels = labels.clone()
    for row in range(2 * BATCH, SIZE):
        labels[row].view(-1)[row % labels[row].numel()] = mark
    return labels


YES_OR_NO = torch.arange(SIZE * 3).view(SIZE, 3).remainder(2).float()
NUMBERS = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("criterion", "labels", "mark"),
    [
        (F.binary_cross_entropy_with_logits, YES_OR_NO, -1.0),
        (F.binary_cross_entropy_with_logits, YES_OR_NO, -100.0),
        (F.binary_cross_entropy_with_logits, YES_OR_NO, torch.nan),
        (F.mse_loss, NUMBERS, -100.0),
        (F.mse_loss, NUMBERS, torch.nan),
    ],
)
def test_a_mark_of_missing_labels_that_comes_later(tmp_path, caplog, criterion, labels, mark):
    make = partial(plain_model, partial(masked, criterion, mark))
    data = number_rows(marked(labels, mark), SIZE)
    with caplog.at_level(logging.WARNING):
        assert_is_plain(tmp_path, make, data)
    assert "in step 2 its labels are none that" in said(caplog)[1]
    # Their divergence is that of the labels that are there.
    dropped = partial(plain_model, partial(masked, criterion, mark), dropout=0.3)
    trainer = run(tmp_path, dropped(), data, rdrop=RDropConfig(alpha=1.0), max_steps=3)
    assert all(0 < kl < 1 for kl in logged(trainer, "kl"))
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("ignored", [-1, 255])
def test_an_ignored_class_that_comes_later(tmp_path, caplog, ignored):
    labels = torch.arange(SIZE) % 3
    labels[2 * BATCH :: 3] = ignored
    make = partial(plain_model, partial(F.cross_entropy, ignore_index=ignored))
    with caplog.at_level(logging.WARNING):
        assert_is_plain(tmp_path, make, number_rows(labels, SIZE))
    assert "in step 2 its labels are none that cross entropy has" in said(caplog)[1]
    assert f"but for {ignored}" in said(caplog)[1]


@pytest.mark.parametrize("width", [1, 3])
def test_the_weight_of_a_yes_that_no_first_label_is(tmp_path, width):
    labels = YES_OR_NO[:, :width].long()
    labels[:BATCH] = 0

    def weighted(scores, labels):
        weight = torch.tensor(5.0)
        return F.binary_cross_entropy_with_logits(scores, labels.float(), pos_weight=weight)

    assert_is_plain(tmp_path, partial(plain_model, weighted, width), number_rows(labels, SIZE))


class Weighing(Plain):
    """Weighs its rows by a column."""

    def forward(self, x, labels=None, weight=None):
        scores = self.head(self.body(x))
        if labels is None:
            return {"scores": scores}
        loss = (weight * F.cross_entropy(scores, labels, reduction="none")).mean()
        return {"loss": loss, "scores": scores}


@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_weights_of_rows_that_are_all_one_at_first(tmp_path, caplog, kind):
    weight = torch.ones(SIZE, dtype=kind)
    weight[BATCH:] = 0 if kind == torch.bool else 3
    columns = number_rows(torch.arange(SIZE) % 3, SIZE).columns
    with caplog.at_level(logging.WARNING):
        data = NamedRows(**columns, weight=weight)
        assert_is_plain(tmp_path, partial(Weighing, None, dropout=0.0), data)
    assert "own loss is none that regdrop knows" in said(caplog)[0]


def test_a_column_that_the_model_reads_is_none_of_the_loss(tmp_path, caplog):
    class Scaling(Plain):
        def forward(self, x, labels=None, scale=None):
            return super().forward(x * scale[:, None], labels=labels)

    columns = number_rows(torch.arange(SIZE) % 3, SIZE).columns
    data = NamedRows(**columns, scale=torch.ones(SIZE))
    with caplog.at_level(logging.WARNING):
        assert_is_plain(tmp_path, partial(Scaling, F.cross_entropy, dropout=0.0), data)
    assert "is cross entropy, which is minimised" in said(caplog)[0]


class Later(TrainerCallback):
    """Changes a trainer at the end of a step or of an epoch."""

    def __init__(self, act, step=None, epoch=None):
        self.act, self.step, self.epoch = act, step, epoch

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()

    def on_epoch_end(self, args, state, control, **kwargs):
        if round(state.epoch) == self.epoch:
            self.act()


@pytest.mark.parametrize(("when", "steps"), [({"step": 3}, 6), ({"epoch": 16}, 102)])
def test_a_loss_that_changes_in_the_run(tmp_path, caplog, when, steps):
    def make_run(kind):
        class Growing(Plain):
            weight = 0.0

            def forward(self, x, **labels):
                output = super().forward(x, **labels)
                if "loss" in output:
                    output["loss"] = output["loss"] + self.weight * output["scores"].square().mean()
                return output

        model = Growing(F.cross_entropy, dropout=0.0)
        further = {"callbacks": [Later(partial(setattr, model, "weight", 2.0), **when)]}
        data = number_rows(torch.arange(SIZE) % 3, SIZE)
        rdrop = ONE_PASS if kind is RDropTrainer else None
        sizes = {"max_steps": steps, "per_device_train_batch_size": BATCH}
        return train(tmp_path, model, data, rdrop, kind, further, learning_rate=0.01, **sizes)

    with caplog.at_level(logging.WARNING):
        assert_same_run(make_run(RDropTrainer), make_run(Trainer))
    first = when.get("step", 96)
    assert f"in step {first} the loss of Growing is" in said(caplog)[1]


class GrowingByRow(Plain):
    """Minimises another loss from a step on, which only some rows show."""

    def forward(self, x, step, labels=None):
        scores = self.head(self.body(x))
        if labels is None:
            return {"scores": scores}
        entropy = F.cross_entropy(scores, labels, reduction="none")
        return {"loss": (entropy * torch.where(step > 5, 3.0, 1.0)).mean(), "scores": scores}


def grow(folder, size, **further):
    step = torch.arange(SIZE) // BATCH
    step[: 2 * BATCH] = 0
    columns = number_rows(torch.arange(SIZE) % 3, SIZE).columns
    data = NamedRows(**columns, step=step + 3)
    options = {"per_device_train_batch_size": size, "max_steps": 3, **further}
    trainer = run(folder, GrowingByRow(None, dropout=0.0), data, **options)
    return outcome(trainer), [source.own is not None for source in trainer._sources.values()]


def grow_in_one_of_two(folder):
    return grow(folder, BATCH, ddp_backend="gloo")


@pytest.mark.slow
def test_two_processes_change_to_another_loss_together(tmp_path):
    found, is_own = in_two_processes(tmp_path, grow_in_one_of_two)
    expected, is_own_alone = grow(tmp_path, 2 * BATCH)
    assert is_own == is_own_alone == [True]
    assert_same_outcome(found, expected)


def test_a_loss_that_the_trainer_is_given_in_the_run(tmp_path, caplog):
    def doubled(output, labels, num_items_in_batch=None):
        return 2 * F.cross_entropy(output["scores"], labels)

    def make_run(kind):
        class Told(kind):
            def on_third(self):
                self.compute_loss_func = doubled

        model, data = plain_model(F.cross_entropy), number_rows(torch.arange(SIZE) % 3, SIZE)
        later = Later(lambda: made[-1].on_third(), step=3)
        made = []

        class Kept(Told):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                made.append(self)

        sizes = {"max_steps": 5, "per_device_train_batch_size": BATCH}
        rdrop = ONE_PASS if kind is RDropTrainer else None
        return train(tmp_path, model, data, rdrop, Kept, {"callbacks": [later]}, **sizes)

    with caplog.at_level(logging.WARNING):
        assert_same_run(make_run(RDropTrainer), make_run(Trainer))
    assert "in step 3 the loss is that of compute_loss_func by now" in said(caplog)[1]


@pytest.mark.filterwarnings("ignore:the KL between passes is exactly 0")
def test_rows_that_depend_on_each_other_from_a_later_step_on(tmp_path, caplog):
    seen = []

    class Contrasting(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            output = model(**inputs)
            scores, loss = output["scores"], output["loss"]
            if self.state.global_step >= 2:
                alike = F.normalize(scores) @ F.normalize(scores).T
                loss = loss + F.cross_entropy(alike, torch.arange(len(scores)))
                seen.append(len(scores))
            return (loss, output) if return_outputs else loss

    class Ours(RDropTrainerMixin, Contrasting):
        pass

    data = number_rows(torch.arange(SIZE) % 3, SIZE)
    plain = run(tmp_path, plain_model(F.cross_entropy), data, Contrasting, max_steps=4)
    tiny = plain_model(F.cross_entropy, dropout=1e-9)
    seen.clear()
    with caplog.at_level(logging.WARNING):
        ours = run(tmp_path, tiny, data, Ours, rdrop=RDropConfig(alpha=0.0), max_steps=4)
    assert_same_run(ours, plain)
    assert "in step 2 its rows depend on each other by now" in said(caplog)[1]
    assert seen[-2:] == [BATCH, BATCH]


class TwoTasks(Plain):
    """Classes where its labels are whole numbers, else one number a row."""

    def __init__(self, dropout=0.0):
        super().__init__(None, dropout=dropout)
        self.regression = nn.Linear(8, 1)

    def forward(self, x, task, labels=None):
        hidden = self.body(x)
        is_class = task[0] == 0
        logits = self.head(hidden) if is_class else self.regression(hidden)
        if labels is None:
            return {"logits": logits}
        loss = (
            F.cross_entropy(logits, labels) if is_class else F.mse_loss(logits.squeeze(-1), labels)
        )
        return {"loss": loss, "logits": logits}


class TaskRows(torch.utils.data.Dataset):
    """Batches of one task and of another in turn."""

    def __init__(self, first):
        self.x = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(1))
        self.first = first

    def __len__(self):
        return SIZE

    def __getitem__(self, row):
        task = (row // BATCH + self.first) % 2
        labels = torch.tensor(row % 3) if task == 0 else torch.tensor(row / SIZE)
        return {"x": self.x[row], "task": torch.tensor(task), "labels": labels}


@pytest.mark.parametrize("likelihood", ["auto", "model"])
@pytest.mark.parametrize("first", [0, 1])
def test_batches_of_two_tasks_in_turn(tmp_path, first, likelihood):
    rdrop = RDropConfig(alpha=0.0, num_passes=1, likelihood=likelihood)
    assert_is_plain(tmp_path, TwoTasks, TaskRows(first), rdrop=rdrop)
    model, kept = TwoTasks(dropout=0.3), []

    def keep(module, args, output):
        if module.training and torch.is_grad_enabled():
            kept.append(output["logits"].detach())

    model.register_forward_hook(keep)
    rdrop = RDropConfig(alpha=1.0, likelihood=likelihood)
    trainer = run(tmp_path, model, TaskRows(first), rdrop=rdrop)
    expected = []
    for logits in [x for x in kept if len(x) == 2 * BATCH][-6:]:
        p, q = logits.chunk(2)
        if logits.shape[-1] == 1:
            expected.append((p - q).square().mean())
        else:
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            expected.append(((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2)
    kl = torch.tensor(logged(trainer, "kl"))
    torch.testing.assert_close(kl, torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_chance_that_no_rate_shows_is_no_dependence_of_rows(tmp_path, caplog):
    class Noisy(Plain):
        def forward(self, x, labels=None):
            scores = self.head(F.dropout(self.body(x), 0.1, self.training))
            if labels is None:
                return {"scores": scores}
            focal = F.cross_entropy(scores, labels, reduction="none").square().mean()
            return {"loss": focal, "scores": scores}

    data = number_rows(torch.arange(SIZE) % 3, SIZE)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, Noisy(None, dropout=0.1), data, rdrop=RDropConfig(), max_steps=40)
    assert len(said(caplog)) == 1


class GrowingLater(Plain):
    """Adds a number to its loss from its fifth update on."""

    updates = 0

    def forward(self, x, **labels):
        output = super().forward(x, **labels)
        if "loss" in output:
            output["loss"] = output["loss"] + (self.updates > 4)
        return output


@pytest.mark.parametrize(
    ("options", "is_kept"),
    [
        ({"class_weight": (1.0, 2.0, 3.0)}, True),
        ({"unlabelled_index": -1}, True),
        ({"impl": "eager"}, False),
    ],
)
def test_options_of_a_known_loss_end_no_run(tmp_path, caplog, options, is_kept):
    model = GrowingLater(F.cross_entropy, dropout=0.0)

    class Counting(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            model.updates += 1

    rdrop = RDropConfig(alpha=0.0, num_passes=1, **options)
    data = number_rows(torch.arange(SIZE) % 3, SIZE)
    further = {"callbacks": [Counting()]}
    sizes = {"max_steps": 12, "per_device_train_batch_size": BATCH}
    with caplog.at_level(logging.WARNING):
        trainer = train(tmp_path, model, data, rdrop, RDropTrainer, further, **sizes)
    assert len(logged(trainer, "loss")) == 12
    found = [line for line in said(caplog) if "in step 5" in line]
    assert len(found) == 1
    assert ("the latter is kept" in found[0]) == is_kept


def test_a_loss_of_experts_that_is_left_out_is_no_other_loss(tmp_path, caplog):
    class Experts(Plain):
        def forward(self, x, **labels):
            return {**super().forward(x, **labels), "aux_loss": torch.tensor(1.0)}

    model = Experts(F.cross_entropy, dropout=0.0)
    model.config = BertConfig(router_aux_loss_coef=0.1)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, model, number_rows(torch.arange(SIZE) % 3, SIZE))
    assert len(said(caplog)) == 1


def test_an_ordinary_number_is_no_mark(tmp_path, caplog):
    labels = torch.where(torch.arange(SIZE) < 2 * BATCH, 1.0, -100.0)[:, None].expand(SIZE, 3)
    with caplog.at_level(logging.WARNING):
        assert_is_plain(
            tmp_path,
            partial(plain_model, F.mse_loss),
            number_rows(labels, SIZE),
            learning_rate=1e-4,
        )
    assert len(said(caplog)) == 1
