import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("bench_*.py"))


def numbers(value):
    if isinstance(value, dict):
        return [x for child in value.values() for x in numbers(child)]
    if isinstance(value, list):
        return [x for child in value for x in numbers(child)]
    return [value] if isinstance(value, float) else []


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmarks_run_and_write_their_record(path, tmp_path):
    output = tmp_path / "record.json"
    command = [sys.executable, str(path), "--quick", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["command"] == f"python benchmarks/{path.name} --quick"
    assert {"versions", "hardware", "date"} <= set(record)
    assert min(numbers(record)) > 0
    table = output.with_suffix(".csv").read_text().splitlines()
    assert len(table) == 1 + len(record["rows"])


@pytest.mark.long
@pytest.mark.slow
def test_what_is_for_a_gpu_runs_on_a_cpu_in_a_tiny_form(tmp_path):
    command = [sys.executable, str(BENCHMARKS[0].parent / "gpu.py"), "--seconds", "900"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--quick", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    record = json.loads((tmp_path / "record.json").read_text())
    sections = record["sections"]
    assert set(sections) == {
        "accuracy",
        "runtime",
        "compiled",
        "trainer",
        "tests",
        "loss",
        "fused_linear",
        "step",
        "training",
        "compiled_loss",
    }
    checks = [check for found in sections.values() for check in found["checks"]]
    assert {check["status"] for check in checks} == {"ok", "skipped"}
    assert all(sections[name]["rows"] for name in ("loss", "fused_linear", "step", "training"))
    [table, *_] = (tmp_path / "tables.md").read_text().split("\n\nloss and gradient")
    assert table.strip() in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, str(BENCHMARKS[0].parent / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("this needs a GPU")


def test_the_table_tells_what_failed_and_which_aims_are_missed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS[0].parent))
    from gpu_table import render, render_figures

    def row(variant, items, share):
        facts = {"items": items, "classes": 32_000, "dtype": "bfloat16", "variant": variant}
        return {**facts, "share_of_copy_bandwidth": {"median": share}, "peak_logits_pairs": 3.0}

    checks = [
        {"check": "a", "status": "ok", "detail": ""},
        {"check": "b", "status": "FAIL", "detail": "off by 3"},
        {"check": "c", "status": "skipped", "detail": ""},
    ]
    rows = [
        row("triton, in place", 4096, 0.7),
        row("triton, in place", 16_384, 0.9),
        row("triton, in place", 256, 0.1),  # too few rows for the aim
        row("triton", 4096, 0.1),
        {"items": 8, "classes": 2, "dtype": "float32", "variant": "triton", "failed": "why"},
    ]
    record = {
        "date": "2026-01-01",
        "hardware": {"accelerator": "card"},
        "versions": {"torch": "2"},
        "sections": {
            "accuracy": {"checks": checks, "rows": []},
            "loss": {"checks": [], "rows": rows},
        },
    }

    def cells(table):
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]

    lines = cells(render(record))
    assert ["checks of accuracy", "1 of 2, 1 skipped", "all", "FAIL"] in lines
    assert ["b", "off by 3", "", "FAIL"] in lines
    [share] = [
        line for line in lines if line[:1] == ["Triton in place, share of the copy bandwidth"]
    ]
    assert share[1:] == ["70 % at 2 x 4096 x 32,000 bfloat16; 1 of 2", "at least 80 %", "missed"]
    assert not any("single-pass steps" in line[0] for line in lines if line)
    figures = cells(render_figures(record))
    assert ["at", "triton, in place", "triton"] in figures
    assert ["2 x 4096 x 32,000 bfloat16", "3", "3"] in figures
    assert ["2 x 256 x 32,000 bfloat16", "3", ""] in figures


def test_findings_of_a_section_that_stops_are_kept(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS[0].parent))
    from gpu_findings import Findings, UnavailableError

    def wrong():
        raise ValueError("off by 3\nmore")

    def elsewhere():
        raise UnavailableError("needs a GPU")

    path = tmp_path / "accuracy.json"
    findings = Findings(path, "cpu", True, 60)
    findings.check("good", lambda: "seen")
    findings.check("bad", wrong)
    findings.check("elsewhere", elsewhere)
    found = [(c["check"], c["status"], c["detail"]) for c in json.loads(path.read_text())["checks"]]
    assert found == [
        ("good", "ok", "seen"),
        ("bad", "FAIL", "ValueError: off by 3"),
        ("elsewhere", "skipped", "needs a GPU"),
    ]


def test_a_section_that_runs_out_of_time_has_not_failed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS[0].parent))
    import gpu
    from gpu_table import check_lines

    # It waits for its turn, which does not come.
    section = gpu.Section("step", tmp_path, ["--device", "cpu", "--quick"])
    section.deadline = 0.0
    found = section.finish()
    [check] = found["checks"]
    assert (check["check"], check["status"]) == ("step ends", "skipped")
    assert check["detail"].startswith("its time was over")
    lines = list(check_lines("step", found["checks"]))
    assert lines[0] == ("checks of step", "0 of 0, 1 skipped", "all", "ok")
    assert lines[1][3] == "skipped"


def test_a_curve_that_was_cut_short_tells_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS[0].parent))
    import gpu_training
    from gpu_findings import Findings, UnavailableError

    findings = Findings(tmp_path / "training.json", "cpu", True, 60)
    curves = {}
    way = gpu_training.WAYS[gpu_training.DEFINITION]
    words = gpu_training.read_words()
    with pytest.raises(UnavailableError, match="10 steps alone"):
        gpu_training.fit(findings, gpu_training.DEFINITION, way, words, 0.0, curves)
    with pytest.raises(UnavailableError, match="no curve of fused and eager"):
        gpu_training.compare(curves, "fused")
