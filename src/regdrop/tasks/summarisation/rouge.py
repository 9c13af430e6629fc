"""ROUGE by rouge-score, with stemming: one row a summary, so that any part can be scored."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeLsum")
# After the end of a sentence, whatever quotes or brackets close it; Chinese has no space there.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[\u3002\uff01\uff1f])")
# Letters of scripts without spaces between words, by blocks of Unicode: Thai, Lao, Tibetan and
# Burmese; Khmer; Japanese; Chinese.
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
)
_BEYOND_ASCII = re.compile(r"[^\W\x00-\x7f]")
# Categories of letters and of the marks on them.
_LETTERS = ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc")


class _Words:
    """A tokenizer for rouge-score, whose own knows a to z and 0 to 9 alone."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        kept = "".join(
            x if unicodedata.category(x) in ("Nd", *_LETTERS) else " "
            for x in unicodedata.normalize("NFC", text).lower()
        )
        words: list[str] = []
        for word in _UNSPACED.sub(r" \g<0> ", kept).split():
            words += self._english.tokenize(word) if word.isascii() else [word]
        return words


def rouge_statistics(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the F1 of ROUGE-1, ROUGE-2 and ROUGE-L of each summary, (summaries, 3).

    Where references have letters beyond ASCII, words are runs of letters and digits of any script,
    and a script without spaces has words of one character; else they are rouge-score's own. Of
    several references the best counts, for each figure. ROUGE-L is that of whole summaries
    (Lin 2004, section 3.2), whose sentences are their lines, or end where they seem to.

    Args:
        outputs: Summaries.
        references: For each summary one reference or more.

    Raises:
        ValueError: If there are not as many outputs as references, or an output has none.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if len(outputs) != len(references) or not all(references):
        raise ValueError(
            f"each of {len(outputs)} outputs must have a reference, got {len(references)} lists"
        )
    english = RougeScorer(list(ROUGE), use_stemmer=True)
    any_script = RougeScorer(list(ROUGE), tokenizer=_Words())
    rows = []
    for output, targets in zip(outputs, references, strict=True):
        is_beyond = any(_BEYOND_ASCII.search(target) for target in targets)
        scorer = any_script if is_beyond else english
        best = scorer.score_multi([_lines(target) for target in targets], _lines(output))
        rows.append([best[name].fmeasure for name in ROUGE])
    return np.asarray(rows, dtype=np.float64).reshape(-1, len(ROUGE))


def _lines(text: str) -> str:
    """Return a text with a sentence a line."""
    return text if "\n" in text.strip() else _SENTENCE_END.sub("\n", text.strip())
