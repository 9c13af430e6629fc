"""The Trainer under FSDP2 in two processes on a CPU learns what one process does, as DDP's."""

import sys
from pathlib import Path

import pytest
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from regdrop import RDropConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from sharded_runs import MODELS, assert_same, build, in_one_process, in_two_processes, result

CASES = [
    ("bert", RDropConfig(alpha=3.0)),
    ("bert", RDropConfig(alpha=3.0, passes="sequential")),
    ("bert", RDropConfig(alpha=3.0, backward_passes=1)),
    ("gpt2", RDropConfig(alpha=3.0)),
]
FUSED = RDropConfig(alpha=3.0, fused_linear=True)


def sharded(folder, name, rdrop):
    """Run under FSDP2.

    accelerate (as of 1.15) asks for FSDP only where its list of distributed types has the kind of
    device, and CPU is not in it, so that it would silently run DDP. What it does from there on is
    its own.
    """
    trainer = build(folder, name, rdrop, ddp_backend="gloo")
    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[MODELS[name][2]],
    )
    trainer.is_fsdp_enabled = True
    found = result(trainer)
    assert type(trainer.model).__name__.startswith("FSDP")
    return found


def all_cases(folder):
    found = [sharded(folder, *case) for case in CASES]
    with pytest.raises(ValueError, match=r"fused_linear=True does not work.*over processes"):
        sharded(folder, "gpt2", FUSED)
    return found


@pytest.mark.long
def test_fsdp2_is_ddp_and_refuses_to_fuse_a_sharded_layer(tmp_path):
    for found, case in zip(in_two_processes(tmp_path, all_cases), CASES, strict=True):
        assert_same(found, in_one_process(tmp_path, *case))
