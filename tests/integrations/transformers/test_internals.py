"""What is used of transformers beside its public interface is there, under the names used here."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from transformers import Seq2SeqTrainer, Trainer

import regdrop
from models import text_rows, tiny_bert
from regdrop.integrations.transformers import RDropTrainer, internals
from training import build

PACKAGE = Path(regdrop.__file__).parent
REFLECTION = ("getattr", "setattr", "hasattr", "delattr")
LISTED = {*internals.METHODS, *internals.ATTRIBUTES, *internals.GENERATION_ATTRIBUTES}


@pytest.fixture
def fresh():
    internals.missing_internals.cache_clear()
    yield
    internals.missing_internals.cache_clear()


def test_this_version_has_all_of_them():
    assert internals.missing_internals() == ()


def own_names(kind):
    """Return the private names of a class of transformers, methods and what it sets on itself."""
    set_names = re.findall(r"self\.(_[a-z]\w*)\s*(?::[^=]+)?= ", inspect.getsource(kind))
    return {name for name in [*vars(kind), *set_names] if re.match(r"_[a-z]", name)}


def used_names(tree):
    """Yield the names that code reads or sets on objects, by a dot or a text, or defines there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ClassDef):
            yield from (part.name for part in node.body if isinstance(part, ast.FunctionDef))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in REFLECTION:
            yield from (part.value for part in node.args[1:2] if isinstance(part, ast.Constant))


def test_every_private_name_of_the_trainer_that_is_used_is_listed():
    """A name of the Trainer's own that is used anywhere in the package and not listed fails."""
    private = own_names(Trainer) | own_names(Seq2SeqTrainer)
    assert "_load_best_model" in private
    used = {
        (name, path.name)
        for path in PACKAGE.rglob("*.py")
        for name in used_names(ast.parse(path.read_text(encoding="utf-8")))
        if name in private
    }
    # The trial is the Trainer's only where a search runs; the setup of it is listed.
    assert {name for name, _ in used} - {"_trial"} <= LISTED, used
    # A trainer brings its batches to the device, and generates, by the Trainer's own names.
    elsewhere = {(name, file) for name, file in used if file != "internals.py"}
    assert elsewhere == {
        ("_gen_kwargs", "generation_trainer.py"),
        ("_prepare_inputs", "generation_trainer.py"),
        ("_prepare_inputs", "trainer.py"),
    }


@pytest.mark.usefixtures("fresh")
def test_a_renamed_method_is_said_when_a_trainer_is_built(tmp_path, monkeypatch):
    monkeypatch.delattr(Trainer, "_load_best_model")
    with pytest.raises(RuntimeError, match=r"does not have Trainer\._load_best_model\(\), which"):
        build(tmp_path, tiny_bert(), text_rows(), kind=RDropTrainer)


@pytest.mark.usefixtures("fresh")
def test_a_renamed_argument_is_said(monkeypatch):
    def save_model(self, output_dir=None, internal=False):
        """Stand for another version's."""

    monkeypatch.setattr(Trainer, "save_model", save_model)
    assert internals.missing_internals() == ("Trainer.save_model(output_dir, _internal_call)",)


@pytest.mark.usefixtures("fresh")
def test_an_argument_that_is_gone_is_said(monkeypatch):
    monkeypatch.setattr(internals, "ARGUMENTS", ("of_another_version",))
    assert internals.missing_internals() == ("TrainingArguments.of_another_version",)
