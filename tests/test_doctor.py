"""`regdrop doctor` on what other frameworks make."""

import pytest
from typer.testing import CliRunner

from regdrop.commands import app
from text_data import write_encoder

SCRIPT = """
import lightning.pytorch as pl
from torch import nn


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.25), nn.Linear(8, 3))
"""


def test_doctor_on_a_lightning_module(tmp_path, monkeypatch):
    (tmp_path / "lightning_script.py").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["doctor", "lightning_script:Module"])
    assert result.exit_code == 0, result.output
    assert "Module: sources of dropout" in result.output
    assert "network.1" in result.output
    assert "0.25" in result.output


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_doctor_on_a_folder_of_sentence_transformers(tmp_path, rate):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    rates = {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
    transformer = modules.Transformer(str(write_encoder(tmp_path / "encoder", **rates)))
    model = SentenceTransformer(modules=[transformer, modules.Pooling(16)], device="cpu")
    model.save(str(tmp_path / "saved"))
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "saved")])
    assert result.exit_code == (0 if rate else 1), result.output
    assert "SentenceTransformer: sources of dropout" in result.output
    assert ("Raise a dropout rate" in result.output) is not bool(rate)


def test_doctor_names_a_model_that_is_not_there(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = CliRunner().invoke(app, ["doctor", "nosuchfolder"])
    assert result.exit_code == 2
    assert "model 'nosuchfolder' is no folder here" in " ".join(result.output.split())


def test_doctor_names_a_folder_without_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["doctor", "empty"])
    assert result.exit_code == 2
    assert "model 'empty' is a folder here and cannot be loaded" in " ".join(result.output.split())
