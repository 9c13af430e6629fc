import pytest
import torch
from safetensors.torch import load_file, save_file

from models import tiny_bert, tiny_vit
from regdrop.integrations.transformers.run.checkpoints import load_renamed_weights


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("shards", [1, 2])
def test_renamed_weights_are_loaded_in_place(tmp_path, shards):
    saved, model = changed(tiny_vit()), tiny_vit()
    size = sum(p.numel() * 4 for p in saved.parameters())
    saved.save_pretrained(tmp_path, max_shard_size=size // shards + 1)
    parameters = list(model.parameters())
    assert load_renamed_weights(model, tmp_path)
    for before, now, wanted in zip(parameters, model.parameters(), saved.parameters(), strict=True):
        assert before is now
        assert torch.equal(now, wanted)


def test_weights_by_their_own_names_are_left_to_the_trainer(tmp_path):
    model = tiny_bert()
    before = [p.clone() for p in model.parameters()]
    changed(tiny_bert()).save_pretrained(tmp_path)
    assert not load_renamed_weights(model, tmp_path)
    assert not load_renamed_weights(model, tmp_path / "nothing")
    assert all(map(torch.equal, before, model.parameters()))


def test_a_module_that_is_no_model_of_the_library_is_left_to_the_trainer(tmp_path):
    save_file({"other": torch.ones(1)}, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")
    assert not load_renamed_weights(torch.nn.Linear(1, 1), tmp_path)
