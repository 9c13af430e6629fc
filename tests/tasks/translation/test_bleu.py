import subprocess
import sys

import pytest

from regdrop.tasks.translation.bleu import bleu, bleu_signature, sentence_statistics

OUTPUTS = ["The cat sat on the mat .", "a dog runs in the PARK", "two men", ""]
REFERENCES = [
    "The cat sat on a mat.",
    "A dog runs in the park.",
    "Two men are talking, it seems.",
    "Nothing was said.",
]


@pytest.mark.parametrize("lowercase", [False, True])
def test_bleu_is_that_of_sacrebleus_command(tmp_path, lowercase):
    (tmp_path / "out").write_text("\n".join(OUTPUTS) + "\n")
    (tmp_path / "ref").write_text("\n".join(REFERENCES) + "\n")
    command = [
        sys.executable,
        "-m",
        "sacrebleu",
        str(tmp_path / "ref"),
        "-i",
        str(tmp_path / "out"),
    ]
    command += ["-m", "bleu", "-b", "-w", "8", *(["-lc"] if lowercase else [])]
    expected = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = sentence_statistics(OUTPUTS, REFERENCES, tokenize="13a", lowercase=lowercase)
    assert found.shape == (4, 10)
    assert 100 * bleu(found) == pytest.approx(expected, abs=1e-6)
    assert expected > 5


def test_bleu_by_hand():
    """3 of 4 words, 2 of 3 pairs, 1 of 2 triples, no quadruple (1/2 by smoothing), no brevity."""
    statistics = sentence_statistics(["a b c x"], ["a b c d"], tokenize="none", lowercase=False)
    assert statistics.tolist() == [[3, 2, 1, 0, 4, 3, 2, 1, 4, 4]]
    assert bleu(statistics) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_signatures_say_what_was_counted():
    assert "case:mixed" in bleu_signature(tokenize="13a", lowercase=False)
    signature = bleu_signature(tokenize="zh", lowercase=True)
    assert "case:lc" in signature
    assert "tok:zh" in signature


def test_as_many_outputs_as_references():
    with pytest.raises(ValueError, match="outputs must be as many as references, got 1 and 2"):
        sentence_statistics(["a"], ["a", "b"], tokenize="13a", lowercase=False)
