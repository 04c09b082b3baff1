from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.components.llm.text_metrics import bleu, bleu_tokens, exact_match, normalise, rouge, words
from fate_llm.core.errors import DataError

SAME = [
    "The desk is open.",
    "yes",
    "利率是多少。",
    "好",
    "エスクロー口座はどこですか。",
    "ธนาคารเปิดกี่โมง",
    "Где мой счёт?",
    "أين حسابي؟",
    "मेरा खाता कहाँ है",
    "계좌가 어디 있나요",
    "🙂🙂",
    "?!",
    "",
]

ascii_text = st.text(st.sampled_from("abcAB 019.,-'!?$/\"()_:;"), max_size=40)
latin = st.lists(
    st.sampled_from(["the", "cat", "sat", "on", "3.5", "don't", "well-known,", "(yes)", "$4", "No.", "x"]),
    max_size=14,
)


# --- Exact match --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("Desk: Escrow.", "desk:  escrow", True),
        (" yes \n", "Yes!", True),
        ("ﬁne", "fine", True),
        ("Straße", "STRASSE", True),
        ("利率。", "利率", True),
        ("ABC", "abc", True),
        ("a.b", "ab", False),
        ("no", "not", False),
        ("?", "!", False),
        ("?", "?", True),
        ("", "", True),
        ("", "a", False),
        ("", "?", False),
    ],
)
def test_exact_match_looks_past_case_and_space(prediction: str, reference: str, same: bool) -> None:
    assert exact_match(prediction, reference) is same
    assert exact_match(reference, prediction) is same


@given(st.text())
def test_space_around_a_text_does_not_count(text: str) -> None:
    assert exact_match(f"  {text}\n", text)
    assert normalise(text) == normalise(f"\t{text}")


# --- Identical, empty, different ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", SAME)
def test_identical_texts_score_one_in_every_script(text: str) -> None:
    assert rouge(text, text) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert bleu([text], [text]) == 1.0
    assert exact_match(text, text)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_any_identical_texts_score_one(texts: list[str]) -> None:
    assert all(score == 1.0 for text in texts for score in rouge(text, text).values())
    assert bleu(texts, texts) == 1.0


def test_an_empty_text_scores_nothing_against_another() -> None:
    assert rouge("", "a b") == rouge("a b", "") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    assert bleu([""], ["a b"]) == bleu(["a b"], [""]) == 0.0
    assert rouge("?", "!")["rouge1"] == 0.0


def test_nothing_in_common_scores_zero() -> None:
    assert bleu(["a b c"], ["d e f"]) == 0.0
    assert set(rouge("a b c", "d e f").values()) == {0.0}


def test_bleu_needs_pairs() -> None:
    with pytest.raises(DataError, match="as many references"):
        bleu(["a"], [])
    with pytest.raises(DataError, match="0, 0"):
        bleu([], [])


@given(ascii_text, ascii_text)
def test_scores_lie_between_zero_and_one(one: str, two: str) -> None:
    for score in (*rouge(one, two).values(), bleu([one], [two])):
        assert 0.0 <= score <= 1.0


@given(ascii_text, ascii_text)
def test_rouge_f1_is_symmetric(one: str, two: str) -> None:
    assert rouge(one, two) == rouge(two, one)


# --- Words --------------------------------------------------------------------------------------------------


def test_words_of_scripts_with_and_without_spaces() -> None:
    assert words("Don't pay $3.50, ok?") == ["don", "t", "pay", "3", "50", "ok"]
    assert words("利率 is 5%") == ["利", "率", "is", "5"]
    assert words("กี่โมง") == ["กี่", "โ", "ม", "ง"]
    assert words("खाता") == ["खाता"]
    assert words("é") == ["é"]
    assert words("snake_case") == ["snake", "case"]
    assert bleu_tokens("利率是3.5%。") == ["利", "率", "是", "3.5", "%", "。"]


def test_half_of_a_chinese_answer_is_worth_half() -> None:
    scores = rouge("利率", "利率上升")
    assert scores["rouge1"] == pytest.approx(2 * 2 / 6)
    assert scores["rougeL"] == pytest.approx(2 * 2 / 6)
    assert 0 < bleu(["利率是百分之三"], ["利率是百分之五"]) < 1


# --- Against the packages people know -----------------------------------------------------------------------


@settings(deadline=None)  # the first example imports the package
@given(ascii_text, ascii_text)
def test_rouge_is_that_of_rouge_score_for_ascii(one: str, two: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    theirs = scorer.score(two, one)
    ours = rouge(one, two)
    if not words(one) or not words(two) or words(one) == words(two):
        return  # rule 1 and 3: identical texts are 1 here, 0 there when they are too short for pairs
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name].fmeasure, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(latin, latin), min_size=1, max_size=4))
def test_bleu_is_that_of_sacrebleu_for_ascii(drawn: list[tuple[list[str], list[str]]]) -> None:
    metrics = pytest.importorskip("sacrebleu.metrics")
    ours = [" ".join(one) for one, _ in drawn]
    theirs = [" ".join(two) for _, two in drawn]
    if not any(ours) or not any(theirs):
        return  # rule 3
    scorer = metrics.BLEU(tokenize="13a", smooth_method="exp", effective_order=True)
    assert bleu(ours, theirs) == pytest.approx(scorer.corpus_score(ours, [theirs]).score / 100, abs=1e-9)


@settings(deadline=None)
@given(ascii_text)
def test_ascii_tokens_are_those_of_13a(text: str) -> None:
    tokenizer = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    assert bleu_tokens(text) == tokenizer(text).split()
