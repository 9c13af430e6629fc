"""Everything that README and docs show is run, or at least exists."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from models import image_rows, tiny_vit
from regdrop.commands import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.S | re.M)


@pytest.mark.parametrize("name", ["README.md", "docs/guide.md"])
def test_python_blocks_run_one_after_the_other(name, tmp_path):
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    classifier = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    setting = {
        "F": F,
        "x": x,
        "y": y,
        "num_items": 6,
        "labels": torch.randint(0, 2, (6, 3)).float(),
        "numbers": torch.randn(6),
        "batch": {"input_ids": x, "position_bias": torch.randn(6, 6)},
        "args": TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to=[]),
        "dataset": image_rows(),
        "MyTrainer": Trainer,
    }
    found = blocks(ROOT / name, "python")
    assert len(found) >= 3
    for block in found:
        is_trainer = "RDropTrainer(model" in block
        namespace = {**setting, "model": tiny_vit() if is_trainer else classifier.train()}
        # A block may go on from the one before, as its reader does.
        setting = {**namespace}
        exec(compile(block, name, "exec"), setting)
        if "trainer = RDropTrainer" in block:
            setting["trainer"].train()
    assert setting["loss"].isfinite()


class TwoHeads(nn.Module):
    """A word tagger that also classifies its sentence."""

    def __init__(self):
        super().__init__()
        self.words, self.dropout = nn.Embedding(20, 8), nn.Dropout(0.5)
        self.intent, self.slots = nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, words):
        states = self.dropout(self.words(words))
        return {"intent": self.intent(states.mean(1)), "slots": self.slots(states)}


class Graph(nn.Module):
    """Sums over neighbours."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout = nn.Linear(8, 3), nn.Dropout(0.5)

    def forward(self, batch):
        nodes, edges = batch["nodes"], batch["edges"]
        sums = torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]])
        return self.layer(self.dropout(torch.cat([nodes, sums], 1)))


def test_python_blocks_about_models_run():
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    dropout, classifier = nn.Dropout(0.5), nn.Linear(4, 3)
    embedding, tags = nn.Embedding(20, 5), torch.randint(0, 5, (3, 7))
    setting = {
        "x": x,
        "y": y,
        "model": nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)),
        "segmenter": nn.Sequential(nn.Dropout(0.5), nn.Conv2d(1, 4, 3, padding=1)),
        "images": torch.randn(2, 1, 6, 6),
        "masks": torch.randint(0, 4, (2, 6, 6)),
        "recogniser": nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 6)),
        "sounds": torch.randn(2, 9, 4),
        "transcripts": torch.tensor([[1, 2, 3], [4, 5, -100]]),
        "tagger": nn.Sequential(embedding, dropout),
        "sentences": torch.randint(0, 20, (3, 7)),
        "tags": tags,
        "log_likelihood": lambda scores, tags: (
            -F.cross_entropy(scores.transpose(1, 2), tags, reduction="none").sum(1)
        ),
        "two_heads": TwoHeads(),
        "words": torch.randint(0, 20, (3, 7)),
        "intents": torch.randint(0, 3, (3,)),
        "slot_labels": tags,
        "encoder": nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 8)),
        "graph_network": Graph(),
        "nodes": torch.randn(8, 4),
        "edges": torch.randint(0, 8, (2, 24)),
        "node_labels": torch.randint(0, 3, (8,)),
        "margin_head": lambda x, y: classifier(dropout(x)) - 0.5 * F.one_hot(y, 3),
        "rewards": lambda x: classifier(dropout(x))[:, 0],
    }
    seen = 0
    for block in blocks(ROOT / "docs/models.md", "python"):
        setting.pop("loss", None)
        exec(compile(block, "docs/models.md", "exec"), setting)
        if "loss" in setting:
            seen += 1
            assert setting["loss"].isfinite()
    assert seen >= 11


def test_commands_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    lines = [
        line for path in DOCUMENTS for block in blocks(path, "bash") for line in block.splitlines()
    ]
    assert any(line.startswith("make demo") for line in lines)
    for line in lines:
        words = line.split()
        if words[:1] == ["make"]:
            assert words[1] in targets
        elif words[:1] == ["regdrop"]:
            assert words[1] in commands
        elif words[:1] == ["python"]:
            assert (ROOT / words[1]).exists()


def test_links_and_the_tree_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
    tree = re.search(
        r"^```\nsrc/regdrop/\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M
    )
    for line in tree.group(1).splitlines():
        name = line.split()[0]
        folder = ROOT / "src" / "regdrop" if line.startswith("  ") else ROOT
        assert (folder / name).exists(), name


def test_no_document_holds_a_placeholder():
    for path in DOCUMENTS:
        assert not re.search(r"@[A-Z]+@|TODO|FIXME|XXX", path.read_text("utf-8")), path.name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_and_learn(path, tmp_path):
    if path.stem == "timm_task" and find_spec("timm") is None:
        pytest.skip("timm is installed apart: tests/integrations/apart_timm runs its example")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    accuracy = re.findall(r"accuracy'?:? '?([0-9.]+)", done.stdout)
    assert float(accuracy[-1]) > 0.85, done.stdout
    assert "kl" in done.stdout
