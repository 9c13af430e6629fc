"""The site as it is built: its answers are found by search, and its links lead out of docs/."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

# Questions of a newcomer: where the answer stands, and words that it holds.
ANSWERS = {
    "alpha/#in-five-steps": "factors|coarse grid",
    "frameworks/#lora-and-other-adapters-peft": "LoRA works",
    "cost/#on-a-gpu": "1.7 to 1.85",
    "recipes/#two-heads": "both_heads",
    "frameworks/several-gpus/": "torchrun --nnodes",
    "install/#extras-and-lower-bounds": "torch&gt;=2.5|torch>=2.5",
    "cost/#which-kernel-runs": "regdrop doctor --environment",
    "other-implementations/#from-the-official-bert-code": "alpha of 16",
    "will-it-help/#by-task-size-and-signs-of-overfitting": "try it",
    "troubleshooting/#the-kl-is-0": "lora_dropout",
}


def build(folder, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build(tmp_path_factory.mktemp("site"), REPOSITORY_URL="")


@pytest.fixture(scope="module")
def entries(site):
    index = json.loads((site / "search/search_index.json").read_text("utf-8"))
    return {entry["location"]: entry for entry in index["docs"]}


@pytest.mark.parametrize("place", ANSWERS)
def test_the_answer_stands_where_search_leads(entries, place):
    assert re.search(ANSWERS[place], entries[place]["text"])


def test_the_guide_comes_before_the_log_in_search(entries):
    def boost(name):
        return entries[name].get("boost", 1)

    assert boost("troubleshooting/") > boost("cost/") > boost("install/") > boost("experiments/")
    assert boost("ko/cost/") < boost("cost/")


def test_the_api_shows_the_docstrings(entries):
    found = entries["api/losses/#regdrop.rdrop_cross_entropy"]["text"]
    assert "ignore_index" in found
    assert "2106.14448" in found


def test_the_site_holds_what_it_links_to(site):
    page = (site / "will-it-help/index.html").read_text("utf-8")
    assert 'href="../files/results/iwslt-size/report.md.txt"' in page
    assert (site / "files/results/iwslt-size/report.md.txt").is_file()
    assert (site / "contributing/index.html").is_file()
    assert "0.2.0" in (site / "changelog/index.html").read_text("utf-8")


def test_with_a_repository_links_lead_there(tmp_path):
    site = build(tmp_path, REPOSITORY_URL="https://example.org/regdrop")
    page = (site / "will-it-help/index.html").read_text("utf-8")
    assert 'href="https://example.org/regdrop/blob/main/results/iwslt-size/report.md"' in page
    page = (site / "experiments/index.html").read_text("utf-8")
    assert 'href="https://example.org/regdrop/tree/main/results/ptb-part-choice"' in page
    assert 'src="../files/results/digits/curves_by_step.png"' in page
