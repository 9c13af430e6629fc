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


def test_every_private_name_of_the_trainer_that_is_used_is_listed():
    """A name of the Trainer's own that is used anywhere in the package and not listed fails."""
    private = own_names(Trainer) | own_names(Seq2SeqTrainer)
    assert "_load_best_model" in private
    used = {}
    for path in [*PACKAGE.glob("integrations/transformers/*.py"), *PACKAGE.glob("tasks/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in private:
                used[node.attr] = path.name
            elif isinstance(node, ast.FunctionDef) and node.name in private:
                used[node.name] = path.name
    # The trial is the Trainer's only where a search runs; the setup of it is listed.
    assert set(used) - {"_trial"} <= LISTED, used
    where = {used[name] for name in used if name != "_gen_kwargs"}
    assert where <= {"internals.py", "generation_trainer.py", "trainer.py"}, used


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
