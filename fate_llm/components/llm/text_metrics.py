"""Scores of generated text against a reference, the same for every script.

Rules:
1. Identical texts score exactly 1, in any script, whatever their length.
2. Words of scripts that write no spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) are single characters
   with their marks; everything else is split at what is no letter, digit or mark.
3. Two empty texts are identical (1); one empty text scores 0.
4. For texts in ASCII, ROUGE is that of the package `rouge-score` (no stemming) and BLEU that of `sacrebleu`
   (13a tokens, exponential smoothing, effective order), as shares of 1. Beyond ASCII both of these drop or
   join letters that count here.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

from fate_llm.core.errors import DataError

__all__ = [
    "RougeScores",
    "bleu",
    "bleu_counts",
    "bleu_of",
    "bleu_tokens",
    "exact_match",
    "normalise",
    "rouge",
    "words",
]

MAX_ORDER = 4

RougeScores = dict[str, float]

# first and last code point of scripts without spaces between words
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # ideographic iteration marks and zero
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana extensions
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han, compatibility
    (0x20000, 0x3FFFF),  # Han, supplementary planes
)


def normalise(text: str) -> str:
    """What exact match compares: NFKC, case folded, white space collapsed, punctuation at the end taken off.

    A text of nothing but punctuation keeps it, so that `?` and `!` stay different.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    end = len(folded)
    while end and (folded[end - 1].isspace() or unicodedata.category(folded[end - 1]).startswith("P")):
        end -= 1
    return folded[:end] or folded


def exact_match(prediction: str, reference: str) -> bool:
    """True when both texts are the same after `normalise`."""
    return normalise(prediction) == normalise(reference)


@lru_cache(maxsize=65536)
def _kind(sign: str) -> str:
    """`mark`, `alone` (a character that is a word), `word` (part of one), or empty (between words)."""
    category = unicodedata.category(sign)
    if category[0] == "M":
        return "mark"
    if category[0] not in "LN":
        return ""
    return "alone" if any(first <= ord(sign) <= last for first, last in _UNSPACED) else "word"


def words(text: str) -> list[str]:
    """Lower-case words for ROUGE (see rule 2); punctuation and symbols are left out."""
    found: list[str] = []
    before = ""
    for sign in unicodedata.normalize("NFKC", text).casefold():
        kind = _kind(sign)
        if kind == "mark" and before:
            found[-1] += sign
            continue
        kind = "word" if kind == "mark" else kind
        if kind == "word" and before == "word":
            found[-1] += sign
        elif kind:
            found.append(sign)
        before = kind
    return found


def rouge(prediction: str, reference: str) -> RougeScores:
    """{"rouge1", "rouge2", "rougeL"}: F1 of common words, of pairs, of the longest common subsequence."""
    ours, theirs = words(prediction), words(reference)
    if not ours or not theirs or ours == theirs:
        # no words to compare, or nothing to compute: too short for pairs is still identical
        same = ours == theirs and (bool(ours) or exact_match(prediction, reference))
        return dict.fromkeys(("rouge1", "rouge2", "rougeL"), float(same))
    common = _longest_common(ours, theirs)
    return {
        "rouge1": _overlap(_grams(ours, 1), _grams(theirs, 1)),
        "rouge2": _overlap(_grams(ours, 2), _grams(theirs, 2)),
        "rougeL": _f1(common, len(ours), len(theirs)),
    }


def _grams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[at : at + order]) for at in range(len(tokens) - order + 1))


def _overlap(ours: Counter[tuple[str, ...]], theirs: Counter[tuple[str, ...]]) -> float:
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _longest_common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest common subsequence; time is the product of the lengths, memory one row."""
    row = [0] * (len(theirs) + 1)
    for token in ours:
        corner = 0
        for at, other in enumerate(theirs, start=1):
            above = row[at]
            row[at] = corner + 1 if token == other else max(above, row[at - 1])
            corner = above
    return row[-1]


# the four rules of the mteval-13a tokeniser
_BLEU_RULES = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ENTITIES = (
    ("<skipped>", ""),
    ("-\n", ""),
    ("\n", " "),
    ("&quot;", '"'),
    ("&amp;", "&"),
    ("&lt;", "<"),
    ("&gt;", ">"),
)


def bleu_tokens(text: str) -> list[str]:
    """Tokens for BLEU: case kept, punctuation apart (mteval-13a), scripts without spaces by character."""
    for old, new in _ENTITIES:
        text = text.replace(old, new)
    spread: list[str] = []
    for sign in unicodedata.normalize("NFC", text):
        if _kind(sign) == "alone" or (ord(sign) > 127 and unicodedata.category(sign)[0] in "PS"):
            spread += [" ", sign, " "]
        elif _kind(sign) == "mark" and spread[-2:-1] and spread[-1] == " " and _kind(spread[-2][0]) == "alone":
            spread[-2] += sign
        else:
            spread.append(sign)
    text = f" {''.join(spread)} "
    for rule, replacement in _BLEU_RULES:
        text = rule.sub(replacement, text)
    return text.split()


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU of order 4, 0 to 1, one reference each; an order without any match is smoothed
    exponentially.

    Orders that no prediction is long enough for do not count (effective order).

    Raises:
        DataError: no texts, or not as many references as predictions.
    """
    if len(predictions) != len(references) or not predictions:
        raise DataError(f"BLEU needs as many references as predictions: {len(predictions)}, {len(references)}")
    counts = [bleu_counts(one, two) for one, two in zip(predictions, references, strict=True)]
    return bleu_of({name: sum(each[name] for each in counts) for name in counts[0]})


def bleu_counts(prediction: str, reference: str) -> dict[str, int]:
    """What one pair adds to a corpus BLEU: match1.., total1.., ours, theirs. Counts add up over parties."""
    one, two = bleu_tokens(prediction), bleu_tokens(reference)
    counts = {"ours": len(one), "theirs": len(two)}
    for order in range(1, MAX_ORDER + 1):
        grams = _grams(one, order)
        counts[f"match{order}"] = (grams & _grams(two, order)).total()
        counts[f"total{order}"] = grams.total()
    return counts


def bleu_of(counts: Mapping[str, float]) -> float:
    """Corpus BLEU, 0 to 1, of counts added up over all pairs."""
    ours, theirs = counts["ours"], counts["theirs"]
    if ours == 0 or theirs == 0:
        return float(ours == theirs)
    matches = [counts[f"match{order}"] for order in range(1, MAX_ORDER + 1)]
    totals = [counts[f"total{order}"] for order in range(1, MAX_ORDER + 1)]
    return _brevity(ours, theirs) * _geometric_mean(matches, totals)


def _brevity(ours: float, theirs: float) -> float:
    return 1.0 if ours >= theirs else math.exp(1 - theirs / ours)


def _geometric_mean(matches: Sequence[float], totals: Sequence[float]) -> float:
    """Mean of the precisions of the orders there are; the k-th without a match is 1 / (2^k total)."""
    if not any(matches):
        return 0.0
    logs, halved = [], 1.0
    for match, total in zip(matches, totals, strict=True):
        if total == 0:
            break
        if match == 0:
            halved *= 2
        logs.append(math.log(match / total if match else 1 / (halved * total)))
    return math.exp(sum(logs) / len(logs))
