"""BLEU by sacrebleu, from statistics of single sentences, so that any part can be scored."""

from collections.abc import Sequence

import numpy as np

# Matched and possible n-grams, n = 1 to 4, and the lengths of output and reference.
BLEU_STATISTICS = 10


def default_tokenizer(language: str) -> str:
    """Return sacrebleu's tokenizer for a target language."""
    return {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}.get(language, "13a")


def sentence_statistics(
    outputs: Sequence[str], references: Sequence[str], *, tokenize: str, lowercase: bool
) -> np.ndarray:
    """Return the statistics of each sentence, (sentences, 10).

    Args:
        outputs: Translations.
        references: One reference each.
        tokenize: Name of sacrebleu's tokenizer.
        lowercase: Whether case is ignored.

    Raises:
        ValueError: If there are not as many outputs as references.
    """
    from sacrebleu.metrics import BLEU

    if len(outputs) != len(references):
        raise ValueError(
            f"outputs must be as many as references, got {len(outputs)} and {len(references)}"
        )
    metric = BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True)
    rows = []
    for output, reference in zip(outputs, references, strict=True):
        score = metric.sentence_score(output, [reference])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.asarray(rows, dtype=np.float64).reshape(-1, BLEU_STATISTICS)


def bleu(statistics: np.ndarray) -> float:
    """Return the corpus BLEU between 0 and 1 of sentences with these statistics."""
    from sacrebleu.metrics import BLEU

    sums = [int(x) for x in statistics.sum(0)]
    score = BLEU.compute_bleu(
        correct=sums[:4], total=sums[4:8], sys_len=sums[8], ref_len=sums[9], smooth_method="exp"
    )
    return float(score.score) / 100


def bleu_signature(*, tokenize: str, lowercase: bool) -> str:
    """Return sacrebleu's signature of the corpus score."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=tokenize, lowercase=lowercase)
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature())
