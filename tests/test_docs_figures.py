"""The figures of README and guide are those of the records; pictures are drawn from them."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))

from draw import DRAWINGS, PICTURES
from measured import alpha, figures, steps_of_a_gpu

from regdrop.experiments.recording.record import load_records
from regdrop.experiments.statistics import estimate, paired_difference

ROOT = Path(__file__).parent.parent

# The study of each row of the README's table, in its order.
README_STUDIES = [
    ("multi30k-part-tuned", "BLEU, lower-cased"),
    ("ptb-part", "perplexity"),
    ("alice", "perplexity"),
    ("fashion-mnist-part", "accuracy (%)"),
    ("scitldr-part-tuned", "ROUGE-1"),
    ("minilm-cola-tuned", "Matthews"),
    ("minilm-sst2-part", "accuracy (%)"),
    ("iwslt-size", "BLEU, lower-cased"),
]
HELP_STUDIES = [
    ("multi30k-part-tuned", "BLEU, lower-cased"),
    ("iwslt-size", "BLEU, lower-cased"),
    ("ptb-part", "perplexity"),
    ("alice", "perplexity"),
    ("fashion-mnist-part", "accuracy (%)"),
    ("digits-tuned", "accuracy (%)"),
    ("scitldr-part-tuned", "ROUGE-1"),
    ("minilm-cola-tuned", "Matthews"),
    ("minilm-sst2-part", "accuracy (%)"),
]


def table(page, header):
    """Return the rows of the table of a page whose first line begins with a text."""
    lines = (ROOT / page).read_text("utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def numbers(text):
    return [float(n) for n in re.findall(r"[+-]?\d+(?:\.\d+)?", text.replace("−", "-"))]


def assert_rounded(text, *values):
    """Assert that a text holds these values, each rounded to the digits that it shows."""
    found = re.findall(r"[+-]?\d+(?:\.\d+)?", text.replace("−", "-"))
    assert len(found) == len(values), text
    for shown, value in zip(found, values, strict=True):
        digits = len(shown.partition(".")[2])
        assert abs(float(shown) - value) <= 0.501 * 10**-digits, (text, value)


def test_the_table_of_the_readme():
    rows = table("README.md", "| task and data")
    assert len(rows) == len(README_STUDIES) <= 8
    for (name, _, baseline, change, nll), (study, column) in zip(rows, README_STUDIES, strict=True):
        found = figures(study)
        assert_rounded(baseline, *found["baseline"][column][:2])
        assert_rounded(change, *found["rdrop"][column][2:])
        assert_rounded(nll, *found["rdrop"]["NLL"][2:])
        assert name


def test_the_decision_table():
    rows = table("docs/will-it-help.md", "| you train")
    for row, (study, column) in zip(rows, HELP_STUDIES, strict=True):
        change = row[3].removeprefix(re.match(r"\D+(?:-1 )?(?=[+−])", row[3])[0])
        assert_rounded(change, *figures(study)["rdrop"][column][2:])


def test_twice_the_updates():
    studies = (
        "multi30k-part-tuned",
        "ptb-part",
        "alice",
        "fashion-mnist-part",
        "scitldr-part-tuned",
        "minilm-cola-tuned",
        "minilm-sst2-part",
    )
    rows = table("docs/will-it-help.md", "| task | twice the updates")
    for row, study in zip(rows, studies, strict=True):
        for cell, arm in zip(row[1:], ("baseline-2x", "rdrop"), strict=True):
            assert_rounded(cell, *figures(study)[arm]["NLL"][2:])


def test_the_run_that_was_lost():
    found = figures("iwslt-size")
    rows = table("docs/will-it-help.md", "| arm")
    for row, arm in zip(rows, ("baseline", "alpha-0", "rdrop"), strict=True):
        assert_rounded(row[1], *found[arm]["BLEU, lower-cased"][:2])
        assert_rounded(row[2], *found[arm]["NLL"][:2])


def test_what_a_step_costs_on_a_gpu():
    variants = ["one pass", "one pass, our loss"]
    for way in ("exact, stacked", "one backward"):
        fused = way.removesuffix(", stacked") + ", fused with the last layer"
        variants += [way, fused]
    variants += ["official form, stacked"]
    measured = {(row["parameters"], row["variant"]): row for row in steps_of_a_gpu()}
    sizes = sorted({size for size, _ in measured})
    rows = table("docs/cost.md", "| way | 49 M")
    for row, variant in zip(rows, variants, strict=True):
        for i, size in enumerate(sizes):
            found = measured[size, variant]
            assert_rounded(row[1 + 2 * i], found["step"]["median"])
            assert_rounded(row[2 + 2 * i], found["peak_mebibytes"] / 1024)


def test_what_a_step_costs_on_a_cpu():
    record = json.loads((ROOT / "results/bench_step.json").read_text("utf-8"))
    measured = {(row["dtype"], row["variant"]): row["step"]["median"] for row in record["rows"]}
    variants = ["exact, stacked", "exact, stacked, C++", "one backward, C++"]
    rows = table("docs/cost.md", "| way | float32")
    for row, variant in zip(rows, [*variants, "official form, stacked"], strict=True):
        assert_rounded(row[1], measured["float32", variant])
        assert_rounded(row[2], measured["bfloat16 autocast", variant])


def test_the_alphas_that_were_chosen_here():
    rows = {row[0]: row[4] for row in table("docs/alpha.md", "| task | the paper")}
    assert numbers(rows["translation, from scratch"]) == [alpha("multi30k-part-tuned")]
    assert numbers(rows["summarisation"]) == [alpha("scitldr-part-tuned")]
    assert numbers(rows["language modelling"]) == [alpha("alice"), alpha("ptb-part")]
    assert numbers(rows["images"]) == [alpha("digits"), alpha("fashion-mnist-part")]
    glue = [alpha(study) for study in ("minilm-sst2-part", "minilm-mrpc-part")]
    assert numbers(rows["understanding (GLUE)"]) == glue
    assert glue[0] <= alpha("minilm-cola-tuned") <= glue[1]


# The rows of the log's table of regret, as the record names them.
REGRETS = [
    "baseline",
    "alpha-1",
    "alpha-3",
    "alpha-6",
    "alpha",
    "ramp-16",
    "ramp-16-below-8",
    "ramp-16-below-5-every-2",
    "narrow-ramp-10",
    "narrow-ramp-12",
    "stall-16",
    "ramp-from-stall-16",
    "ramp-from-stall-16-from-3",
    "ramp-from-stall-16-from-6",
]


# The names of its tasks on the pages.
STUDIED = {
    "ptb-part": "PTB",
    "multi30k-part-de-en": "Multi30k",
    "scitldr-part": "SciTLDR",
    "fashion-mnist-part": "Fashion-MNIST",
    "minilm-sst2-part": "SST-2",
    "digits": "digits",
    "minilm-cola": "CoLA",
}


# How the tables of the log name the arms of `sweep alpha-schedules`.
SHOWN_ARMS = {
    "baseline": "baseline",
    **{f"alpha {alpha}": f"alpha-{alpha}" for alpha in (0, 1, 3, 6, 10, 16)},
    "alpha 6, the best constant by validation": "alpha-6",
    "from 0 to 8": "ramp-8",
    "from 0 to 16": "ramp-16",
    "from 0 to 32": "ramp-32",
    "from 0 to 16, one pass below 8": "ramp-16-below-8",
    "from 0 to 16, one pass below 5, then every 2nd step": "ramp-16-below-5-every-2",
    '1, doubled on a stall, at most 16 (`"stall"`)': "stall-16",
    '`"stall"`': "stall-16",
    '`"stall"`, `"ramp-from-stall"`': "stall-16",
    '1 until the first stall, then a ramp (`"ramp-from-stall"`)': "ramp-from-stall-16",
    '`"ramp-from-stall"`': "ramp-from-stall-16",
    "the same from 3 (`alpha_min=3`)": "ramp-from-stall-16-from-3",
    "the same, `alpha_min=3`": "ramp-from-stall-16-from-3",
    '`"ramp-from-stall"`, `alpha_min=3`': "ramp-from-stall-16-from-3",
    "the same, on every 2nd step": "ramp-from-stall-16-from-3-every-2",
    "the same from 6": "ramp-from-stall-16-from-6",
    '`"ramp-from-stall"`, `alpha_min=6`': "ramp-from-stall-16-from-6",
    '`"stall"` from the best weights (`"restore"`)': "restore-16",
    '`"restore"`': "restore-16",
    '16 times the gap of the losses (`"gap"`)': "gap-16",
    '`"gap"`': "gap-16",
    'the KL of the best evaluation (`"kl-target"`)': "kl-target-16",
    '`"kl-target"`': "kl-target-16",
    "alpha 16 in the second half, one pass before": "late-start",
    "alpha 16 in the second half": "late-start",
    "one pass, dropout odds rising to 4 times": "rising-dropout-4",
}


def table_of_costs(task):
    """Return the cost of each arm in the report of a study."""
    page = f"results/{task}-alpha-schedules/report.md"
    lines = (ROOT / page).read_text("utf-8").splitlines()
    header = next(line for line in lines if line.startswith("| arm"))
    place = [cell.strip() for cell in header.strip("|").split("|")].index("cost")
    return [(row[0], row[place]) for row in table(page, header)]


SHOWN_METRICS = {
    "test perplexity": ("perplexity", 1),
    "test NLL": ("nll", 1),
    "test accuracy (%)": ("accuracy", 100),
    "test BLEU": ("bleu_lowercase", 100),
    "test ROUGE-1": ("rouge1", 100),
}


@pytest.mark.parametrize(
    ("section", "task", "beside"),
    [
        ("Language modelling", "ptb-part", "alpha-6"),
        ("Images", "fashion-mnist-part", "alpha-3"),
        ("SST-2", "minilm-sst2-part", "alpha-6"),
        ("Digits", "digits", "baseline"),
        ("Translation", "multi30k-part-de-en", "alpha-6"),
        ("Summarisation", "scitldr-part", "alpha-10"),
    ],
)
def test_the_log_of_rising_alphas(section, task, beside):
    """A cell has a mean over seeds, in brackets or in the next column the change by an arm."""
    text = (ROOT / "docs/experiments-alpha.md").read_text("utf-8")
    lines = text.split(f"\n## {section}\n")[1].split("\n## ")[0].splitlines()
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    )
    by_arm = {}
    for record in load_records(ROOT / f"results/{task}-alpha-schedules"):
        by_arm.setdefault(record.arm, {})[record.seed] = record.test
    costs = dict(table_of_costs(task))
    for shown, *cells in rows:
        for column, cell in zip(header[1:], cells, strict=True):
            if column == "cost":
                assert cell == costs[SHOWN_ARMS[shown]]
            if column in SHOWN_METRICS:
                metric, factor = SHOWN_METRICS[column]
            elif column != "difference to the best constant" or not cell:
                continue
            own, best = (
                {seed: test[metric] * factor for seed, test in by_arm[arm].items()}
                for arm in (SHOWN_ARMS[shown], beside)
            )
            found, change = estimate(list(own.values())), paired_difference(own, best)
            expected = (*found[:2], *change[:2])
            if column not in SHOWN_METRICS:
                assert_rounded(cell, *change[:2])
            else:
                assert_rounded(cell, *expected[: len(numbers(cell))])


def test_the_regret_of_alphas_that_rise():
    lines = (ROOT / "results/alpha_regret_nll.md").read_text("utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    # An arm stands in the first table, the constant that other tasks choose in the second alone.
    num_tasks = len(cells[0]) - 2
    found = {row[0]: row[1 : num_tasks + 2] for row in reversed(cells) if len(row) > num_tasks}
    rows = table("docs/experiments-alpha.md", "| arm | PTB | Multi30k")
    named = " | ".join(STUDIED[task] for task in cells[0][1:-1])
    assert f"| arm | {named} | mean |" in (ROOT / "docs/experiments-alpha.md").read_text("utf-8")
    for row, arm in zip(rows, REGRETS, strict=True):
        for shown, recorded in zip(row[1:-1], found[arm], strict=True):
            assert numbers(shown)[0] == numbers(recorded)[0]


def test_the_alphas_of_cola():
    """Three arms are those of the comparison, of the same seeds."""
    names = {"rdrop": "alpha-1", "baseline": "baseline", "alpha-0": "alpha-0"}
    compared = load_records(ROOT / "results/minilm-cola-tuned")
    by_arm = {}
    for record in [*compared, *load_records(ROOT / "results/minilm-cola-alpha-schedules")]:
        arm = names.get(record.arm, record.arm if record not in compared else None)
        if record.seed < 3 and arm is not None:
            by_arm.setdefault(arm, {})[record.seed] = record.test
    arms = ["baseline", *(f"alpha-{n}" for n in (0, 1, 3, 6, 10, 16)), "ramp-16", *REGRETS[8:10]]
    arms += [*REGRETS[6:8], *REGRETS[10:]]
    rows = table("docs/experiments-alpha.md", "| arm | test Matthews")
    for row, arm in zip(rows, arms, strict=True):
        for cell, metric, factor in zip(
            row[1:], ("matthews_correlation", "nll"), (100, 1), strict=False
        ):
            own, best = (
                {seed: test[metric] * factor for seed, test in by_arm[name].items()}
                for name in (arm, "alpha-6")
            )
            found = estimate(list(own.values()))
            change = paired_difference(own, best)
            further = [] if arm == "alpha-6" else [change.mean, change.half_width]
            assert_rounded(cell, found.mean, found.half_width, *further)
    lost = {}
    for arm in ("alpha-6", "narrow-ramp-10"):
        own, papers = (
            {seed: 100 * test["matthews_correlation"] for seed, test in by_arm[name].items()}
            for name in (arm, "alpha-1")
        )
        change = paired_difference(own, papers)
        assert change.mean + change.half_width < 0
        lost[arm] = round(-change.mean)
    text = " ".join((ROOT / "docs/alpha.md").read_text("utf-8").split())
    assert f"lost {lost['alpha-6']} points of Matthews" in text
    assert f'There "auto" lost {lost["narrow-ramp-10"]}.' in text


def test_the_ramps_that_begin_above_0_beside_the_best_constant():
    for row in table("docs/experiments-alpha.md", "| task | best constant"):
        (task,) = (task for task, name in STUDIED.items() if name == row[0])
        records = load_records(ROOT / f"results/{task}-alpha-schedules")
        by_arm = {arm: {} for arm in (f"alpha-{row[1]}", "narrow-ramp-10", "narrow-ramp-12")}
        for record in records:
            if record.arm in by_arm:
                by_arm[record.arm][record.seed] = record.test["nll"]
        constant = by_arm.pop(f"alpha-{row[1]}")
        for found, shown in zip(by_arm.values(), row[2:], strict=True):
            nll, change = estimate(list(found.values())), paired_difference(found, constant)
            assert_rounded(shown, nll.mean, nll.half_width, change.mean, change.half_width)


def test_the_cheaper_forms_of_the_narrow_ramp():
    ramps = ("every-2", "below-6.5", "below-5.2-every-2")
    arms = [f"narrow-ramp-10-{form}" for form in ramps] + ["alpha-6-every-2", "alpha-6-late-start"]
    parts = {}
    for task, best, *cells in table("docs/experiments-alpha.md", "| task | constant | ramp"):
        (folder,) = (folder for folder, name in STUDIED.items() if name == task)
        nll = {}
        for record in load_records(ROOT / f"results/{folder}-alpha-schedules"):
            nll.setdefault(record.arm, {})[record.seed] = record.test["nll"]
        constant = nll[f"alpha-{best}"]
        for arm, shown in zip(arms, cells, strict=True):
            found, change = estimate(list(nll[arm].values())), paired_difference(nll[arm], constant)
            assert len(nll[arm]) == 3
            assert_rounded(shown, found.mean, found.half_width, change.mean, change.half_width)
        least = sum(nll["baseline"].values()) / 3
        whole = least - sum(constant.values()) / 3
        parts[task] = [(least - sum(nll[arm].values()) / 3) / whole for arm in arms]
    for task, *cells in table("docs/experiments-alpha.md", "| task | ramp, every 2nd step |"):
        assert cells == [f"{100 * part:.0f} %" for part in parts[task]]
    # The goals: the whole gain at 1.5 steps, nine tenths at 1.34.
    whole = [sum(kept[form] >= 1 for kept in parts.values()) for form in (0, 1, 3, 4)]
    assert max(whole) == 2
    assert sum(kept[2] >= 0.9 for kept in parts.values()) == 3


def test_the_fresh_seeds_of_the_narrow_ramp():
    arms, seeds = ["alpha-3", "alpha-6", "alpha-10", "ramp-16", "narrow-ramp-10"], (3, 4)
    units = (ROOT / "results/alpha_regret_nll.md").read_text("utf-8").splitlines()
    header, unit = (
        next(line for line in units if line.startswith(f"| {name}")).strip("|").split("|")
        for name in ("arm", "unit")
    )
    unit_of = dict(zip((name.strip() for name in header), unit, strict=True))
    regrets = {arm: [] for arm in arms}
    for row in table("docs/experiments-alpha.md", "| task | alpha 3 | alpha 6 | alpha 10 | from 0"):
        (task,) = (task for task, name in STUDIED.items() if name == row[0])
        records = load_records(ROOT / f"results/alpha-fresh-seeds/{task}")
        nll = {(record.arm, record.seed): record.test["nll"] for record in records}
        assert len(nll) == len(records) == len(arms) * len(seeds)
        assert row[1:] == [", ".join(f"{nll[arm, seed]:.3f}" for seed in seeds) for arm in arms]
        for arm in arms:
            change = sum(nll[arm, seed] - nll["alpha-6", seed] for seed in seeds) / len(seeds)
            regrets[arm].append(change / float(unit_of[task]))
    text = " ".join((ROOT / "docs/experiments-alpha.md").read_text("utf-8").split())
    narrow, wide = (sum(regrets[arm]) / 5 for arm in ("narrow-ramp-10", "ramp-16"))
    assert narrow > 0  # what decides
    said = f"is {narrow:+.2f} for the ramp from 3 to 10 and {wide:+.2f} for the ramp to 16"
    assert said in text


def test_all_seeds_of_the_narrow_ramp_beside_a_constant_of_6():
    certain = {}
    for name, *cells in table("docs/experiments-alpha.md", "| task | alpha 3 | alpha 10 | from 0"):
        (task,) = (task for task in STUDIED if STUDIED[task] == name)
        folders = [
            ROOT / f"results/{task}-alpha-schedules",
            ROOT / f"results/alpha-fresh-seeds/{task}",
        ]
        nll = {}
        for record in [
            each for folder in folders if folder.exists() for each in load_records(folder)
        ]:
            nll.setdefault(record.arm, {})[record.seed] = record.test["nll"]
        for arm, cell in zip(
            ("alpha-3", "alpha-10", "ramp-16", "narrow-ramp-10"), cells, strict=True
        ):
            change = paired_difference(nll[arm], nll["alpha-6"])
            assert len(nll[arm]) == (3 if name == "CoLA" else 5)
            assert_rounded(cell, change.mean, change.half_width)
            if abs(change.mean) > change.half_width:
                certain.setdefault(arm, []).append((name, change.mean > 0))
    assert len(certain.pop("alpha-3")) == 3
    assert certain["narrow-ramp-10"] == [("PTB", False)]
    worse = [name for name, is_worse in certain["ramp-16"] if is_worse]
    assert worse == ["Multi30k", "SciTLDR", "Fashion-MNIST"]


def test_tasks_that_had_no_part_in_the_choice_of_the_narrow_ramp():
    folders = {"a book": "alice", "CIFAR-10": "cifar10-part", "MRPC": "minilm-mrpc-part"}
    arms = ["baseline", "alpha-1", "alpha-3", "alpha-6", "alpha-10", "narrow-ramp-10"]
    for name, *cells in table("docs/experiments-alpha.md", "| task | baseline | alpha 1 | alpha 3"):
        nll = {}
        for record in load_records(ROOT / f"results/alpha-unseen/{folders.pop(name)}"):
            nll.setdefault(record.arm, {})[record.seed] = record.test["nll"]
        for arm, cell in zip(arms, cells, strict=True):
            found, change = (
                estimate(list(nll[arm].values())),
                paired_difference(nll[arm], nll["alpha-6"]),
            )
            assert len(nll[arm]) == (5 if name == "a book" else 3)
            further = [] if arm == "alpha-6" else [change.mean, change.half_width]
            assert_rounded(cell, found.mean, found.half_width, *further)
        change = paired_difference(nll["narrow-ramp-10"], nll["alpha-6"])
        assert change.mean < change.half_width  # not worse for certain
        if name == "a book":
            assert change.mean + change.half_width < 0
            mean = {arm: estimate(list(runs.values())).mean for arm, runs in nll.items()}
            whole = mean["baseline"] - mean["alpha-3"]
            assert round(100 * (mean["baseline"] - mean["narrow-ramp-10"]) / whole) == 90
    assert not folders


MEASURED = {
    "images (digits)": "digits",
    "understanding (SST-2)": "minilm-sst2-part",
    "language modelling (PTB)": "ptb-part",
    "summarisation (SciTLDR)": "scitldr-part",
    "translation (Multi30k)": "multi30k-part-de-en",
}


def measured_disagreement(task, arm):
    """Return what `regdrop measure` found on training and on test items."""
    path = ROOT / f"results/measure-{task}/{arm}/measure-test.json"
    splits = json.loads(path.read_text("utf-8"))["splits"]
    return [splits[split] for split in ("train", "test")]


def gap(found):
    return found["submodel"]["nll"] - found["deployed"]["nll"]


def test_how_far_sub_models_are_apart():
    columns = {
        "EPKL": lambda found: found["epkl"],
        "mutual information": lambda found: found["kl_submodel_mean"],
        "2 E KL(G‖P) / EPKL": lambda found: 2 * found["kl_geometric_submodel"] / found["epkl"],
        "KL(G‖D)": lambda found: found["kl_geometric_deployed"],
        "gap": gap,
    }
    header = f"| task | arm | {' | '.join(columns)}"
    rows = table("docs/disagreement.md", header)
    assert len(rows) == 2 * len(MEASURED)
    for task, arm, *cells in rows:
        found = measured_disagreement(
            MEASURED[task], arm.partition(",")[0].lower().replace("-", "")
        )
        for cell, figure in zip(cells, columns.values(), strict=True):
            assert_rounded(cell, *map(figure, found))


def test_what_the_theory_says_was_measured():
    pairs = {
        task: [measured_disagreement(task, arm) for arm in ("baseline", "rdrop")]
        for task in MEASURED.values()
    }
    (_, before), (_, after) = pairs["ptb-part"]
    (_, sst2_before), (_, sst2_after) = pairs["minilm-sst2-part"]
    (translation, _), _ = pairs["multi30k-part-de-en"]
    text = " ".join((ROOT / "docs/theory.md").read_text("utf-8").split())
    for said in (
        f"took EPKL from {before['epkl']:.3f} to {after['epkl']:.3f} on PTB, the most",
        f"took it from {sst2_before['epkl']:.3f} to {sst2_after['epkl']:.3f}",
        f"from {before['kl_submodel_mean']:.3f} to {after['kl_submodel_mean']:.3f} on PTB",
        f"falls from {gap(before):.3f} to {gap(after):.3f}. It comes nearer to 0",
        f"goes from {gap(sst2_before):.3f} to −{-gap(sst2_after):.3f}",
        f"gap, {gap(translation):.3f}, is above its EPKL, {translation['epkl']:.3f}",
        f"falls from {before['kl_geometric_deployed']:.3f} to {after['kl_geometric_deployed']:.3f}",
    ):
        assert said in text, said
    held_out = [found[1] for pair in pairs.values() for found in pair]
    twice = [2 * found["kl_geometric_submodel"] / found["epkl"] for found in held_out]
    assert f"is {min(twice):.2f} to {max(twice):.2f} of EPKL" in text
    assert gap(translation) > translation["epkl"]
    falls = {task: before[1]["epkl"] / after[1]["epkl"] for task, (before, after) in pairs.items()}
    assert max(falls, key=falls.get) == "ptb-part"
    assert (
        sum(abs(gap(after)) < abs(gap(before)) for (_, before), (_, after) in pairs.values()) == 4
    )


def test_the_alpha_of_translation_is_the_choice_on_validation():
    chosen = json.loads((ROOT / "results/multi30k-part-tuned-tuning/tuned.json").read_text("utf-8"))
    assert chosen["arms"]["rdrop"]["settings"]["rdrop.alpha"] == alpha("multi30k-part-tuned")


def test_the_part_of_the_gain_that_rising_alphas_keep():
    text = (ROOT / "results/alpha_regret_nll.md").read_text("utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    tasks = cells[0]
    found = {row[0]: row for row in cells if any("%" in cell for cell in row)}
    arms = ("alpha-1", "alpha-6", "narrow-ramp-10", "ramp-16")
    for row in table("docs/rising-alpha.md", "| task | alpha 1"):
        (place,) = (tasks.index(task) for task, name in STUDIED.items() if name in row[0])
        shown = [numbers(cell)[0] for cell in row[1:]]
        assert shown == [numbers(found[arm][place])[0] for arm in arms]


@pytest.mark.parametrize("name", DRAWINGS)
def test_pictures_are_drawn_from_the_records(name):
    drawn = (PICTURES / name).read_text("utf-8")
    assert drawn == DRAWINGS[name](), "run python docs/draw.py"


def test_every_picture_is_shown_and_drawn():
    assert {path.name for path in PICTURES.glob("*.svg")} == set(DRAWINGS)
    pages = "".join(path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md"))
    for name in DRAWINGS:
        assert f"pictures/{name}" in pages
