"""ROUGE by rouge-score, with stemming: one row a summary, so that any part can be scored."""

import re
from collections.abc import Sequence

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeLsum")
# After the end of a sentence, whatever quotes or brackets close it.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


def rouge_statistics(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the F1 of ROUGE-1, ROUGE-2 and ROUGE-L of each summary, (summaries, 3).

    Of several references the best counts, for each figure. ROUGE-L is that of whole summaries
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
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    rows = []
    for output, targets in zip(outputs, references, strict=True):
        best = scorer.score_multi([_lines(target) for target in targets], _lines(output))
        rows.append([best[name].fmeasure for name in ROUGE])
    return np.asarray(rows, dtype=np.float64).reshape(-1, len(ROUGE))


def _lines(text: str) -> str:
    """Return a text with a sentence a line."""
    return text if "\n" in text.strip() else _SENTENCE_END.sub("\n", text.strip())
