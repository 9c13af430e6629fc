"""The Trainer under DeepSpeed learns what one process does, as DDP's, where passes are stacked."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from sharded_runs import assert_same, build, in_one_process, in_two_processes, result

from regdrop import RDropConfig

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        find_spec("deepspeed") is None,
        reason="DeepSpeed is tested apart: make test-all installs it into .venv/apart and runs "
        "PYTHONPATH=.venv/apart/deepspeed pytest tests/integrations/apart_deepspeed",
    ),
]


FUSED = RDropConfig(alpha=3.0, fused_linear=True)


def under_deepspeed(folder, name, stage, rdrop=None):
    os.environ.update(DS_ACCELERATOR="cpu", DS_IGNORE_CUDA_DETECTION="1")
    config = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.03}},
        "zero_allow_untested_optimizer": True,
    }
    trainer = build(folder, name, rdrop, deepspeed=config)
    found = result(trainer)
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    return found


def bert(folder):
    for changes in ({"passes": "sequential"}, {"backward_passes": 1}):
        with pytest.raises(ValueError, match="DeepSpeed takes one forward for each backward"):
            under_deepspeed(folder, "bert", 0, RDropConfig(alpha=3.0, **changes))
    return under_deepspeed(folder, "bert", 0)


def gpt2(folder):
    return under_deepspeed(folder, "gpt2", 2)


@pytest.mark.parametrize("run", [bert, gpt2])
def test_stacked_passes_are_those_of_ddp_and_several_forwards_are_refused(tmp_path, run):
    assert_same(in_two_processes(tmp_path, run), in_one_process(tmp_path, run.__name__))


def fused_gpt2(folder):
    with pytest.raises(ValueError, match=r"fused_linear=True does not work.*over processes"):
        under_deepspeed(folder, "gpt2", 3, FUSED)
    return [under_deepspeed(folder, "gpt2", stage, FUSED) for stage in (0, 1, 2)]


def test_the_fused_layer_is_the_same_where_each_process_holds_it_whole(tmp_path):
    expected = in_one_process(tmp_path, "gpt2")
    for found in in_two_processes(tmp_path, fused_gpt2):
        assert_same(found, expected)
