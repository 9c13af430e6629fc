"""Steps of a loop of one's own whose model returns more than logits, against loops by hand."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import SequenceClassifierOutput

from regdrop import RDropConfig, rdrop_step, symmetric_kl
from regdrop.loss import cross_entropy_terms

SIZE, FEATURES, CLASSES = 4, 5, 3
Y = torch.tensor([0, 2, 1, 1])
WAYS = [
    {},
    {"passes": "sequential"},
    {"backward_passes": 1},
    {"num_passes": 3, "backward_passes": 2},
    {"fraction": 0.5},
    {"fraction": 0.5, "passes": "sequential", "backward_passes": 1},
    {"every_n_steps": 2, "monitor_steps": 1},
]
# Ways whose outputs are those of several forwards, or cut.
SEVERAL = [way for way in WAYS if way]


def network():
    torch.manual_seed(1)
    layers = nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES)
    return nn.Sequential(*layers).double()


def inputs():
    return torch.randn(SIZE, FEATURES, dtype=torch.float64)


def gradient(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def run(model, x, y, terms, way, forward=None):
    """Return the output of a step, which is one of a single pass where that is measured apart."""
    torch.manual_seed(7)
    step = 1 if "monitor_steps" in way else 0
    forward = model if forward is None else forward
    return rdrop_step(forward, x, y, config=RDropConfig(alpha=1.4, **way), step=step, loss=terms)


def plain_terms(logits, target, *, num_passes):
    return cross_entropy_terms(logits, target, num_passes=num_passes)


# --- packed sequences -----------------------------------------------------------------------------


class Tagger(nn.Module):
    """It reads packed sequences and returns packed scores of every word."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.rnn = nn.LSTM(FEATURES, CLASSES, batch_first=True, dtype=torch.float64)

    def forward(self, words):
        return self.rnn(words._replace(data=F.dropout(words.data, 0.3)))[0]


LENGTHS = 2, 4, 1


def sentences():
    words = [torch.randn(length, FEATURES, dtype=torch.float64) for length in LENGTHS]
    tags = torch.full((len(LENGTHS), max(LENGTHS)), -100)
    for row, length in zip(tags, LENGTHS, strict=True):
        row[:length] = torch.randint(0, CLASSES, (length,))
    return pack_sequence(words, enforce_sorted=False), tags


def packed_terms(scores, tags, *, num_passes):
    padded, _ = pad_packed_sequence(scores, batch_first=True, total_length=max(LENGTHS))
    return cross_entropy_terms(padded, tags, num_passes=num_passes)


def padded_passes(model, words, graded):
    """Return the scores of two passes by hand; the one without a gradient runs first."""
    passes = []
    for is_graded in sorted([True, graded == 2]):
        with torch.set_grad_enabled(is_graded):
            passes.append(pad_packed_sequence(model(words), batch_first=True)[0])
    return passes if graded == 2 else passes[::-1]


@pytest.mark.parametrize("graded", [1, 2])
def test_packed_outputs_of_several_forwards(graded):
    model, (words, tags) = Tagger(), sentences()
    way = {"passes": "sequential", "backward_passes": graded}
    output = run(model, words, tags, packed_terms, way)
    torch.manual_seed(7)
    first, second = padded_passes(model, words, graded)
    if graded == 1:  # twice the gradient of one
        first = 2 * first - first.detach()
    nll = sum(F.cross_entropy(p.flatten(0, 1), tags.flatten()) for p in (first, second)) / 2
    both = torch.cat([first, second])
    loss = nll + 1.4 / 2 * symmetric_kl(both, mask=tags != -100)
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradient(output.loss, model), gradient(loss, model))


@pytest.mark.parametrize("passes", ["stacked", "sequential"])
def test_packed_outputs_of_a_part_of_the_batch(passes):
    model, (words, tags) = Tagger(), sentences()
    seen = []

    def forward(some):
        seen.append(model(some))
        return seen[-1]

    # One sentence of three, drawn as the step draws it.
    way = {"fraction": 0.3, "passes": passes}
    output = run(model, words, tags, packed_terms, way, forward)
    torch.manual_seed(7)
    item = torch.randperm(len(LENGTHS))[:1]
    rows = [pad_packed_sequence(some, True, total_length=max(LENGTHS))[0] for some in seen]
    rows = torch.cat(rows)
    nll = F.cross_entropy(rows[:3].flatten(0, 1), tags.flatten())
    both = torch.cat([rows[:3][item], rows[3:]])
    kl = symmetric_kl(both, mask=tags[item] != -100, reduction="sum") * 3 / sum(LENGTHS)
    loss = nll + 1.4 / 2 * kl
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradient(output.loss, model), gradient(loss, model))


def test_packed_outputs_are_measured():
    model, (words, tags) = Tagger(), sentences()
    way = {"every_n_steps": 2, "monitor_steps": 1}
    assert run(model, words, tags, packed_terms, way).kl > 0


# --- numbers --------------------------------------------------------------------------------------


def auxiliary_terms(outputs, target, *, num_passes):
    own = cross_entropy_terms(outputs["logits"], target, num_passes=num_passes)
    auxiliary = outputs["auxiliary"]
    if auxiliary.dim():
        auxiliary = auxiliary.view(num_passes, -1).mean(0)
    return own._replace(nll=own.nll + 3 * auxiliary)


@pytest.mark.parametrize("passes", ["stacked", "sequential"])
@pytest.mark.parametrize(
    ("num_passes", "backward_passes"), [(2, None), (2, 1), (3, None), (3, 2), (3, 1)]
)
def test_a_number_counts_like_the_mean_of_rows(num_passes, backward_passes, passes):
    model, x = network(), inputs()
    way = {"num_passes": num_passes, "backward_passes": backward_passes, "passes": passes}

    def step(is_number):
        def forward(x):
            logits = model(x)
            rows = logits.logsumexp(-1) ** 2
            return {"logits": logits, "auxiliary": rows.mean() if is_number else rows}

        output = run(model, x, Y, auxiliary_terms, way, forward)
        return output, gradient(output.loss, model)

    torch.testing.assert_close(step(True), step(False))


def test_a_number_against_a_loop_by_hand():
    """One of two passes has a gradient, and twice of it."""
    model, x = network(), inputs()

    def forward(x):
        logits = model(x)
        return {"logits": logits, "auxiliary": logits.square().mean() ** 2}

    output = run(model, x, Y, auxiliary_terms, {"backward_passes": 1}, forward)
    torch.manual_seed(7)
    with torch.no_grad():
        second = model(x)
    first = model(x)
    auxiliary = first.square().mean() ** 2
    value = (auxiliary + second.square().mean() ** 2) / 2
    auxiliary = auxiliary + (value - auxiliary).detach()
    first = 2 * first - first.detach()
    nll = (F.cross_entropy(first, Y) + F.cross_entropy(second, Y)) / 2 + 3 * auxiliary
    loss = nll + 1.4 / 2 * symmetric_kl(torch.cat([first, second]))
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradient(output.loss, model), gradient(loss, model))


@pytest.mark.parametrize("way", WAYS)
def test_numbers_and_texts_beside_the_logits_change_nothing(way):
    model, x, seen = network(), inputs(), []

    def forward(x):
        number = torch.tensor(3)
        more = {"int": 2, "tensor": number, "bool": number > 2, "float": 0.5, "text": "a"}
        return {"logits": model(x), "none": None, **more}

    def terms(outputs, target, *, num_passes):
        seen.append({name: value for name, value in outputs.items() if name != "logits"})
        return cross_entropy_terms(outputs["logits"], target, num_passes=num_passes)

    found = run(model, x, Y, terms, way, forward)
    plain = run(model, x, Y, plain_terms, way)
    torch.testing.assert_close(found, plain)
    expected = {"int": 2, "tensor": 3, "bool": True, "float": 0.5, "text": "a", "none": None}
    assert seen[0] == expected


# --- rows -----------------------------------------------------------------------------------------


def logits_terms(outputs, target, *, num_passes):
    return cross_entropy_terms(outputs["logits"], target, num_passes=num_passes)


@pytest.mark.parametrize("way", SEVERAL)
def test_rows_that_are_none_of_the_items_are_refused_by_name(way):
    model = network()
    with pytest.raises(ValueError, match=r"forward must return output\['load'\] with one row an"):
        run(
            *(model, inputs(), Y, logits_terms, way),
            lambda x: {"logits": model(x), "load": torch.ones(7)},
        )


def test_one_forward_is_handed_on_as_it_is():
    model = network()

    def terms(outputs, target, *, num_passes):
        assert len(outputs["load"]) == 7
        return logits_terms(outputs, target, num_passes=num_passes)

    run(model, inputs(), Y, terms, {}, lambda x: {"logits": model(x), "load": torch.ones(7)})


@pytest.mark.parametrize("way", [way for way in SEVERAL if "fraction" not in way])
def test_rows_may_be_those_of_the_target(way):
    """Words that are chosen of all items."""
    model, x, words = network(), inputs(), torch.tensor([0, 0, 1, 2, 2, 2, 3])
    target = torch.randint(0, CLASSES, (7,))

    def forward(x):
        chosen = torch.cat([words + SIZE * i for i in range(len(x) // SIZE)])
        return {"logits": model(x)[chosen], "states": x}

    assert run(model, x, target, logits_terms, way, forward).kl > 0


# --- types ----------------------------------------------------------------------------------------


@dataclass
class Scores:
    logits: torch.Tensor
    hidden_states: tuple


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Scores, SimpleNamespace, SequenceClassifierOutput])
def test_an_output_keeps_its_type(kind, way):
    model, x = network(), inputs()

    def terms(outputs, target, *, num_passes):
        assert type(outputs) is kind
        assert len(outputs.hidden_states[1]) == len(outputs.logits)
        return cross_entropy_terms(outputs.logits, target, num_passes=num_passes)

    found = run(model, x, Y, terms, way, lambda x: kind(logits=model(x), hidden_states=(x, x)))
    plain = run(model, x, Y, plain_terms, way)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradient(found.loss, model), gradient(plain.loss, model))


@pytest.mark.parametrize("way", SEVERAL)
def test_a_cache_is_refused_by_name_with_the_way_out(way):
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model, words = GPT2LMHeadModel(config), torch.randint(0, 11, (SIZE, 6))

    def terms(outputs, target, *, num_passes):
        return cross_entropy_terms(outputs.logits, target, num_passes=num_passes)

    batch = {"input_ids": words}
    with pytest.raises(TypeError, match=r"\['past_key_values'\]: DynamicCache; .* use_cache=False"):
        run(model, batch, words, terms, way, lambda batch: model(**batch))
    run(model, batch, words, terms, way, lambda batch: model(**batch, use_cache=False))


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_counts_of_terms_may_be_integers(way):
    model, x = network(), inputs()

    def counted(outputs, target, *, num_passes):
        terms = cross_entropy_terms(outputs, target, num_passes=num_passes)
        return terms._replace(nll_count=len(target), kl_count=len(target))

    found, expected = run(model, x, Y, counted, way), run(model, x, Y, plain_terms, way)
    torch.testing.assert_close(found, expected)
    assert found.kl > 0


def test_a_measured_divergence_of_a_small_weight_is_that_of_a_step():
    """A total weight below 1 is no count of items."""
    model, x = network().eval(), inputs()

    def weighed(outputs, target, *, num_passes):
        terms = cross_entropy_terms(outputs, target, num_passes=num_passes)
        kl = torch.full_like(terms.kl, 0.25 if num_passes > 1 else 0.0)
        return terms._replace(kl=kl * 0.1, kl_count=torch.tensor(0.4))

    way = {"every_n_steps": 2, "monitor_steps": 1}
    assert run(model, x, Y, weighed, way).kl.item() == pytest.approx(0.25)
