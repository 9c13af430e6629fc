"""Arguments of one name have one text: that of the table in docs/api.md, in every docstring."""

import inspect
import re
from pathlib import Path

import pytest

import regdrop.loss
from regdrop import (
    linear_rdrop_cross_entropy,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_l1_loss,
    rdrop_mse_loss,
    rdrop_smooth_l1_loss,
)
from regdrop.loss import linear_cross_entropy_loss

LOSSES = [
    linear_cross_entropy_loss,
    linear_rdrop_cross_entropy,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_l1_loss,
    rdrop_mse_loss,
    rdrop_smooth_l1_loss,
]
ROOT = Path(__file__).parents[2]


def shared_texts():
    section = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").split("## Arguments that")[1]
    rows = re.findall(r"^\| `(\w+)` \| (.*?)\.? \|$", section.split("\n## ")[0], re.MULTILINE)
    return dict(rows)


def documented(function):
    """Return the text of every argument of a docstring."""
    body = inspect.getdoc(function).split("Args:\n")[1].split("\n\n")[0]
    entries = re.split(r"\n(?=    \w+: )", body)
    return {
        name: " ".join(text.split())
        for name, text in (entry.strip().split(": ", 1) for entry in entries)
    }


def test_the_table_holds_what_several_losses_have():
    named = [name for loss in LOSSES for name in inspect.signature(loss).parameters]
    common = {name for name in named if named.count(name) == len(LOSSES)}
    assert {"alpha", "num_passes", "reduction", "scale", "num_items", "backward_passes"} <= common
    # Weights are those of classes or of elements.
    assert common - {"target", "weight"} <= set(shared_texts())
    assert set(shared_texts()) <= set(named)


@pytest.mark.parametrize("name", regdrop.loss.__all__)
def test_a_public_docstring_says_itself_what_it_is(name):
    found = getattr(regdrop.loss, name)
    texts = [inspect.getdoc(found) or ""]
    if inspect.isclass(found):
        texts += [inspect.getdoc(each) or "" for each in vars(found).values() if callable(each)]
        texts += [each.__doc__ or "" for each in vars(found).values() if isinstance(each, property)]
    elif name.endswith("_terms"):
        assert set(documented(found)) == set(inspect.signature(found).parameters)
    for text in texts:
        assert not re.search(r"\b[Ss]ee above|\bAs there\b|file's source", text), text


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_every_argument_is_described_by_its_own_docstring_as_the_table_has_it(loss):
    texts = documented(loss)
    assert set(texts) == set(inspect.signature(loss).parameters)
    shared = shared_texts()
    for name, text in texts.items():
        assert not re.search(r"\b[Ss]ee above|^As (in|there)\b", text), name
        if name in shared:
            assert text.startswith(shared[name]), f"{name}: {text}"
