"""Everything that README and docs show is run, or at least exists."""

import os
import re
import subprocess
import sys
from ast import literal_eval
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import regdrop
from models import image_rows, tiny_vit
from regdrop.commands import app

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *PAGES])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Logs are as long as what was tried.
LOGS = {
    "experiments.md",
    "experiments-alpha.md",
    "experiments-gpu.md",
    "experiments-tasks.md",
    "testing.md",
}
# Blocks of these are run by other tests, or need what is not installed here.
RUN_ELSEWHERE = {
    "docs/cluster.md",  # a Slurm cluster
    "docs/disagreement.md",  # tests/test_disagreement.py
    "docs/frameworks/fabric-and-pipelines.md",  # tests/test_fabric_and_pipelines.py
    "docs/frameworks/fastai-keras-and-others.md",  # by hand: none of them is installed here
    "docs/frameworks/several-gpus.md",  # tests/test_several_gpus.py
    "docs/frameworks/lightning.md",  # below, slow
    "docs/frameworks/sentence-transformers.md",  # tests/integrations/sentence_transformers
    "docs/frameworks/timm.md",  # examples/timm_task.py
    "docs/frameworks/trl.md",  # examples/trl_finetuning.py
    "docs/recipes-batches.md",  # below
    "docs/recipes.md",  # below
    "docs/use.md",  # tests/tasks/test_use.py
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.S | re.M)


def prose(path):
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.S | re.M)


def anchors(path):
    """Return what a link may name in a page, by GitHub's rule, and explicit ids."""
    text = prose(path)
    seen = set(re.findall(r'<a id="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-")
        seen.add(slug)
    return seen


WITH_CODE = [
    path for path in DOCUMENTS if blocks(path, "python") and name_of(path) not in RUN_ELSEWHERE
]


@pytest.mark.parametrize("path", WITH_CODE, ids=name_of)
def test_python_blocks_run_one_after_the_other(path, tmp_path):
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    classifier = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    setting = {
        "F": F,
        "x": x,
        "y": y,
        "labels": torch.randint(0, 2, (6, 3)).float(),
        "numbers": torch.randn(6),
        "batch": {"input_ids": x, "position_bias": torch.randn(6, 6)},
        "args": TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to=[]),
        "dataset": image_rows(),
        "MyTrainer": Trainer,
    }
    for block in blocks(path, "python"):
        is_trainer = "RDropTrainer(model" in block
        namespace = {**setting, "model": tiny_vit() if is_trainer else classifier.train()}
        # A block may go on from the one before, as its reader does.
        setting = {**namespace}
        exec(compile(block, name_of(path), "exec"), setting)
        if "trainer = RDropTrainer" in block:
            setting["trainer"].train()
        if "loss" in setting:
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


class GraphOfPyG(Graph):
    def forward(self, graph):
        return super().forward({"nodes": graph.x, "edges": graph.edge_index})


@pytest.mark.parametrize(("name", "count"), [("recipes.md", 6), ("recipes-batches.md", 7)])
def test_recipes_run(name, count):
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    dropout, classifier = nn.Dropout(0.5), nn.Linear(4, 3)
    embedding, tags = nn.Embedding(20, 5), torch.randint(0, 5, (3, 7))
    setting = {
        "x": x,
        "y": y,
        "labels": torch.randint(0, 2, (6, 3)).float(),
        "model": nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)),
        "segmenter": nn.Sequential(nn.Dropout(0.5), nn.Conv2d(1, 4, 3, padding=1)),
        "images": torch.randn(2, 1, 6, 6),
        "masks": torch.randint(0, 4, (2, 6, 6)),
        "recogniser": nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 6)),
        "recordings": [
            (
                *(torch.randn(2, 9, 4), torch.tensor([9, 7])),
                *(torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2])),
            )
        ],
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
        "gcn": GraphOfPyG(),
        "nodes": torch.randn(8, 4),
        "edges": torch.randint(0, 8, (2, 24)),
        "node_labels": torch.randint(0, 3, (8,)),
        "margin_head": lambda x, y: classifier(dropout(x)) - 0.5 * F.one_hot(y, 3),
        "rewards": lambda x: classifier(dropout(x))[:, 0],
    }
    seen = 0
    for block in blocks(ROOT / "docs" / name, "python"):
        setting.pop("loss", None)
        exec(compile(block, name, "exec"), setting)
        if "loss" in setting:
            seen += 1
            assert setting["loss"].isfinite()
        if "both_heads" in setting:
            check_two_heads(setting.pop("both_heads"))
        if "binary_cross_entropy_terms" in block:
            check_binary_focal_loss(setting)
    assert seen == count


def check_binary_focal_loss(setting):
    """The mean of both passes' focal losses, and half of alpha times the KL of each label."""
    labels, likelihoods = setting["labels"], []
    p = setting["logits"].sigmoid()
    for own in p.chunk(2):
        right = torch.where(labels == 1, own, 1 - own)
        likelihoods.append(-((1 - right) ** 2 * right.log()).mean())
    p, q = (torch.stack([own, 1 - own]) for own in p.chunk(2))
    kl = ((p - q) * (p / q).log()).sum(0).mean() / 2
    expected = sum(likelihoods) / 2 + setting["alpha"] / 2 * kl
    torch.testing.assert_close(setting["loss"], expected)
    assert kl > 0


def check_two_heads(both_heads):
    """Each head's mean is over its own labels, of which any may be absent."""
    outputs = {"intent": torch.randn(6, 4).double(), "slots": torch.randn(6, 5, 4).double()}
    target = {"intent": torch.tensor([1, 2, 3]), "slots": torch.randint(0, 4, (3, 5))}
    for absent in ([], ["slots"], ["intent"], ["slots", "intent"]):
        for name in absent:
            target[name] = torch.full_like(target[name], -100)
        target["slots"][0, 2:] = target["intent"][:1] = -100
        found = regdrop.loss.combine_terms(
            both_heads(outputs, target, num_passes=2), alpha=1.5, num_passes=2
        )
        heads = [
            regdrop.rdrop_cross_entropy(outputs[name], target[name], alpha=1.5, impl="eager")
            for name in ("intent", "slots")
        ]
        torch.testing.assert_close(found.loss, sum(head.loss for head in heads))
        assert found.loss.isfinite()
        if absent:
            continue
        # In micro-batches of one and two items, by the totals of the window.
        totals = {name: (labels != -100).sum() for name, labels in target.items()}
        parts = [[0, 3], [1, 2, 4, 5]]
        micro_batches = [
            both_heads(
                {name: logits[part] for name, logits in outputs.items()},
                {name: labels[part[: len(part) // 2]] for name, labels in target.items()},
                num_passes=2,
                totals=totals,
            )
            for part in parts
        ]
        losses = [
            regdrop.loss.combine_terms(terms, alpha=1.5, num_passes=2).loss
            for terms in micro_batches
        ]
        torch.testing.assert_close(sum(losses), found.loss)


@pytest.mark.slow
def test_the_lightning_page_defines_a_module():
    setting = {}
    for block in blocks(ROOT / "docs/frameworks/lightning.md", "python"):
        exec(compile(block, "lightning.md", "exec"), setting)
    batch = {"words": 1, "tags": 2, "other": 3}
    assert setting["Tagger"]().rdrop_batch(batch) == (1, 2)


def test_every_page_with_code_is_run():
    found = {name_of(path) for path in DOCUMENTS if blocks(path, "python")}
    assert found >= RUN_ELSEWHERE
    assert {name_of(path) for path in WITH_CODE} == found - RUN_ELSEWHERE
    assert len(WITH_CODE) >= 11


def test_commands_and_their_options_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    commands = typer.main.get_command(app).commands
    lines = [
        line.removeprefix("$ ").split("  #")[0]
        for path in DOCUMENTS
        for language in ("bash", "console")
        for block in blocks(path, language)
        for line in block.splitlines()
    ]
    assert any(line.startswith("make demo") for line in lines)
    for line in lines:
        words = line.split()
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        elif words[:1] == ["regdrop"]:
            assert words[1] in commands, line
            options = {name for p in commands[words[1]].params for name in p.opts}
            given = {word.split("=")[0] for word in words if word.startswith("--")}
            assert given <= options, line
        elif words[:1] == ["python"]:
            assert (ROOT / words[1]).exists(), line


def test_links_lead_somewhere_with_their_anchors():
    for path in DOCUMENTS:
        for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)", prose(path)):
            leads_to = (path.parent / target).resolve() if target else path
            assert leads_to.exists(), f"{path.name}: {target}"
            if anchor and leads_to.suffix == ".md":
                assert anchor[1:] in anchors(leads_to), f"{path.name}: {target}{anchor}"


def test_pages_are_short_and_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    for path in PAGES:
        name = path.relative_to(ROOT / "docs").as_posix()
        assert name in navigation, name
        lines = path.read_text("utf-8").splitlines()
        assert name in LOGS or len(lines) <= 120, f"{name}: {len(lines)} lines"
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 120


# What is read aloud: no sentence of it holds more than two numbers. Tables, code and formulas hold
# more.
READ_ALOUD = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
READ_ALOUD += [path for path in PAGES if path.relative_to(ROOT / "docs").as_posix() not in LOGS]


@pytest.mark.parametrize("path", READ_ALOUD, ids=name_of)
def test_no_sentence_has_more_than_two_numbers(path):
    text = re.sub(r"^([|#]|    ).*$", "", prose(path), flags=re.M)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
    for sentence in re.split(r"(?<=[.:?!;])\s+|\n\s*[-\d]+\.? |\n\n", text):
        numbers = re.findall(r"(?<![\w.])[+−-]?\d[\d.,]*(?!\w)", sentence)
        assert len(numbers) <= 2, sentence


def test_every_public_name_has_its_docstring_on_a_page():
    pages = "".join(path.read_text("utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    shown = {line.rsplit(".", 1)[1] for line in re.findall(r"^::: (\S+)$", pages, re.M)}
    assert set(regdrop.__all__) - {"__version__"} <= shown


def test_every_option_stands_in_the_table_with_its_default():
    page = (ROOT / "docs/api/training.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", page, re.M)
    options = [(field.name, field.default) for field in fields(regdrop.RDropConfig)]
    assert [(name, literal_eval(default)) for name, default in rows] == options


def test_the_matrix_of_frameworks_has_every_option():
    page = (ROOT / "docs/frameworks.md").read_text("utf-8")
    table = re.search(r"^\| option \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.M)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table[1].splitlines()]
    named = re.findall(r"`(\w+)", "".join(option for option, *_ in rows))
    options = {field.name for field in fields(regdrop.RDropConfig)}
    assert set(named) - options == {"RDropConfig", "share_prefix", "gradient_checkpointing"}
    assert options <= set(named)
    for option, own_loop, *cells in rows:
        assert len(cells) == 5, option
        assert set(cells) <= set("✓○–✗"), option
        assert own_loop in set("✓○–✗") or re.search("[a-z]", own_loop), option


def test_lower_bounds_are_those_of_the_package():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    rows = re.findall(
        r"^\| (?:`([a-z-]+)`)? ?\|.*\| (.*) \|$", prose(ROOT / "docs/install.md"), re.M
    )
    named = {extra: re.findall(r"`([^`]+)`", bounds) for extra, bounds in rows if "`" in bounds}
    assert set(named) == {"", *extras} - {"dev", "docs"}
    for extra, bounds in named.items():
        assert bounds
        assert set(bounds) <= {*project["dependencies"], *extras.get(extra, [])}, extra


def test_versions_tried_are_those_of_the_constraints():
    page = prose(ROOT / "docs/install.md")
    pins = re.findall(r"^([a-z-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    names = {"torch", "transformers", "accelerate", "lightning", "timm", "trl", "peft"}
    names |= {"sentence-transformers", "deepspeed"}
    names |= {"skorch", "pytorch-ignite", "torch-geometric", "tensordict"}
    for name, version in pins:
        if name in names:
            assert f"| {name} | {version} |" in page, name


def test_no_document_holds_a_placeholder():
    for path in DOCUMENTS:
        assert not re.search(r"@[A-Z]+@|TODO|FIXME|XXX", path.read_text("utf-8")), path.name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) < 60


# One compares three ways of training; of the others a test takes the first steps by hand.
LONG = ("unlabelled_data", "trl_finetuning", "transformers_trainer", "sentence_embeddings")


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.long] if path.stem in LONG else [], id=path.stem)
        for path in EXAMPLES
    ],
)
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
