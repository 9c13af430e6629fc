"""Names that went away are there for two minor releases, with a warning that says the new one."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("regdrop.suggestion", "regdrop.prefix_search", "suggest_prefix"),
        ("regdrop.conventions", "regdrop.alpha_conventions", "convert_alpha"),
        (
            "regdrop.tasks.adaptive_input",
            "regdrop.tasks.language_modelling.adaptive_input",
            "AdaptiveInputForCausalLM",
        ),
    ],
)
def test_a_module_under_its_old_name_warns_and_is_the_new_one(old, new, name, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        module = importlib.import_module(old)
    assert getattr(module, name) is getattr(importlib.import_module(new), name)
