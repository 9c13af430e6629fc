import subprocess
import sys

import pytest

from regdrop.tasks.notices import say_once
from regdrop.tasks.translation import bleu as bleu_module
from regdrop.tasks.translation.bleu import (
    bleu,
    bleu_signature,
    default_tokenizer,
    sentence_statistics,
)

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


@pytest.mark.parametrize(
    ("tokenizer", "languages"),
    [
        ("13a", ("de", "en", "fra", "deu_Latn", "English")),
        ("zh", ("zh", "ZH", "zh_CN", "zh-cn", "zh-Hant-TW", "zho", "zho_Hans", "cmn")),
        ("char", ("th", "tha_Thai", "lo", "km", "khm", "my")),
    ],
)
def test_a_tokenizer_is_of_the_language_however_its_column_is_named(tokenizer, languages):
    assert {default_tokenizer(language) for language in languages} == {tokenizer}


def test_a_language_whose_words_cannot_be_found_is_scored_by_characters(monkeypatch, caplog):
    say_once.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(bleu_module, "find_spec", lambda name: None)
        found = [default_tokenizer(x) for x in ("ja", "jpn_Jpan", "ko_KR", "zh", "de")]
    assert found == ["char", "char", "char", "zh", "13a"]
    assert "BLEU of 'ja' is of characters (tok:char)" in caplog.text
    assert "pip install 'sacrebleu[ko]'" in caplog.text
    monkeypatch.setattr(bleu_module, "find_spec", lambda name: object())
    assert [default_tokenizer(x) for x in ("ja", "kor")] == ["ja-mecab", "ko-mecab"]
    outputs = sentence_statistics(["猫が走る"], ["猫が寝る"], tokenize="char", lowercase=False)
    assert outputs[0, :4].tolist() == [3, 1, 0, 0]
