"""A framework that is not installed is named together with the extra that brings it."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("sentence_transformers", "sentence_transformers", "sentence-transformers"),
        ("lightning", "lightning", "lightning"),
        ("transformers", "accelerate", "transformers"),
        ("timm", "timm", "timm"),
        ("trl", "trl", "trl"),
    ],
)
def test_missing_package_is_named_with_its_extra(monkeypatch, module, package, extra):
    name = f"regdrop.integrations.{module}"
    for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    for loaded in [key for key in sys.modules if key.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"missing: pip install 'regdrop\[{extra}\]'"):
        importlib.import_module(name)
