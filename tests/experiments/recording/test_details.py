import io
import math

import numpy as np
import pytest

from regdrop.experiments.recording.details import Details, read_details, write_details


def saved(path, runs):
    with path.open("wb") as file:
        write_details(file, runs)
    return path


def table(*columns):
    return [list(row) for row in zip(*columns, strict=True)]


DRAWN = np.random.default_rng(0).lognormal(-4, 4, 500)
SIX_DIGITS = [float(f"{x:.6g}") for x in DRAWN]
COLUMNS = {
    "classes": [0.0, 255.0, 7.0],
    "counts": [0.0, -3.0, 40_000.0],
    "many": [2.0**31, 1e300, 5.0],
    "decimals": SIX_DIGITS,
    "negative decimals": [-x for x in SIX_DIGITS],
    "more digits than are written": DRAWN.tolist(),
    "powers of ten": [10.0**k for k in range(-9, 9)],
    "small ones": [1e-22, 1.23456e-30, 5e-324, 0.25],
    "zeros of both signs": [0.0, -0.0, 0.5],
    "no numbers": [math.nan, math.inf, -math.inf, 0.5],
    "none": [],
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_statistics_are_read_again_in_every_bit(tmp_path, column):
    runs = {"rdrop-seed0": Details([{"step": 1, "nll": 0.1 + 0.2}], {"test": table(column)})}
    # repr tells apart what == does not: zeros of both signs, whole numbers and floats.
    assert repr(read_details(saved(tmp_path / "x.npz", runs))) == repr(runs)


def test_runs_of_other_splits_sizes_and_statistics_share_a_file(tmp_path):
    runs = {
        "a": Details([], {"test": table([1.0, 2.0], [0.5, 0.25]), "far": table([3.0])}),
        "b": Details([{"step": 1, "kl": math.nan}], {}),
        "c": Details([], {"test": table([4.0, 5.0, 6.0]), "far": []}),
        "d": Details([], {"test": table([7.0], [0.125], [8.5])}),
    }
    assert repr(read_details(saved(tmp_path / "x.npz", runs))) == repr(runs)


def test_the_file_is_small_of_its_content_alone_and_numpys(tmp_path):
    rows = table([float(i % 10) for i in range(500)], SIX_DIGITS)
    runs = {f"run{i}": Details([], {"test": rows}) for i in range(5)}
    one, two = (saved(tmp_path / name, runs).read_bytes() for name in ("1.npz", "2.npz"))
    assert one == two
    # Six digits hold 20 bits, and what runs have in common is held once.
    assert len(one) < 500 * 6
    with np.load(io.BytesIO(one)) as archive:
        assert archive["test/0"].tolist() == [row[0] for row in rows] * 5


def test_no_file_holds_nothing_and_a_broken_one_is_named(tmp_path):
    assert read_details(tmp_path / "details.npz") == {}
    (tmp_path / "details.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"details\.npz cannot be read"):
        read_details(tmp_path / "details.npz")
