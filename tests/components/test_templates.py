from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_llm.components.llm.records import Record, Turn
from fate_llm.components.llm.templates import (
    IGNORED,
    Formatter,
    choose_template,
    collate,
    encode,
    encode_dataset,
    encode_prompt,
)
from fate_llm.core.errors import ConfigurationError, DataError, ModelError
from tests.components.real_model import real_model_folder
from tests.components.tiny_tokenizer import CHATML, SPECIAL, byte_tokenizer

BOS_INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
UNMARKED = (
    "{% for m in messages %}{{ '\n' + m['role'] + ':\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nassistant:\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = "{{ raise_exception('no turns today') }}"


@pytest.fixture(scope="module")
def chatml() -> Any:
    return byte_tokenizer(CHATML)


@pytest.fixture(scope="module")
def bare() -> Any:
    return byte_tokenizer(None)


def dialogue(*texts: str, system: str | None = None) -> Record:
    first = (Turn("system", system),) if system is not None else ()
    spoken = tuple(Turn("user" if at % 2 == 0 else "assistant", text) for at, text in enumerate(texts))
    return Record("1", turns=first + spoken)


def trained(row: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != IGNORED]))


def shown(row: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode(row["input_ids"]))


# --- Which template -----------------------------------------------------------------------------------------


def test_auto_is_chat_where_there_is_a_chat_template(chatml: Any, bare: Any) -> None:
    assert choose_template("auto", chatml) == "chat"
    assert choose_template("auto", bare) == "alpaca"
    assert choose_template("plain", chatml) == "plain"


def test_unknown_and_impossible_templates_are_refused(bare: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        choose_template("alpacca", bare)
    assert "alpaca" in caught.value.hint
    with pytest.raises(ConfigurationError, match="no chat template"):
        choose_template("chat", bare)
    with pytest.raises(ConfigurationError, match="train_on"):
        Formatter(bare, "plain", train_on="some")  # type: ignore[arg-type]


# --- Chat ---------------------------------------------------------------------------------------------------


def test_chat_trains_on_the_answer_and_its_end_mark(chatml: Any) -> None:
    row = encode(dialogue("Where is it?", "Over there."), chatml, "chat", 200)
    assert row is not None
    assert trained(row, chatml) == "Over there.<|im_end|>"
    assert shown(row, chatml) == (
        "<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\nOver there.<|im_end|>"
    )


def test_the_default_system_prompt_is_left_out_and_a_given_one_stays(chatml: Any) -> None:
    row = encode(dialogue("a", "b"), chatml, "chat", 200)
    assert row is not None and "default assistant" not in shown(row, chatml)
    row = encode(dialogue("a", "b", system="Be kind"), chatml, "chat", 200)
    assert row is not None and shown(row, chatml).startswith("<|im_start|>system\nBe kind<|im_end|>\n")


def test_all_assistant_turns_are_trained_on_or_only_the_last(chatml: Any) -> None:
    record = dialogue("one", "uno", "two", "dos", "three", "tres")
    row = encode(record, chatml, "chat", 400)
    assert row is not None and trained(row, chatml) == "uno<|im_end|>dos<|im_end|>tres<|im_end|>"
    row = encode(record, chatml, "chat", 400, train_on="last")
    assert row is not None and trained(row, chatml) == "tres<|im_end|>"


def test_an_answer_equal_to_its_question_is_not_mixed_up(chatml: Any) -> None:
    row = encode(dialogue("same", "same", "same", "same"), chatml, "chat", 400)
    assert row is not None
    positions = [at for at, label in enumerate(row["labels"]) if label != IGNORED]
    text = shown(row, chatml)
    assert trained(row, chatml) == "same<|im_end|>same<|im_end|>"
    assert text.count("same") == 4
    assert positions[0] > text.index("assistant\n") // 10


def test_a_template_with_bos_keeps_it_once() -> None:
    tokenizer = byte_tokenizer(BOS_INST, adds_bos=True)
    row = encode(dialogue("hi", "ho"), tokenizer, "chat", 100)
    assert row is not None
    assert shown(row, tokenizer) == "<s>[INST] hi [/INST]ho</s>"
    assert trained(row, tokenizer) == "ho</s>"


def test_bos_before_a_default_system_prompt_stays() -> None:
    tokenizer = byte_tokenizer("{{ bos_token }}" + CHATML)
    row = encode(dialogue("hi", "ho"), tokenizer, "chat", 100)
    assert row is not None
    assert shown(row, tokenizer).startswith("<s><|im_start|>user\nhi")


def test_a_chat_template_without_end_marks_gets_eos() -> None:
    tokenizer = byte_tokenizer(UNMARKED)
    row = encode(dialogue("a", "b", "c", "d"), tokenizer, "chat", 100)
    assert row is not None
    assert trained(row, tokenizer) == "b</s>d</s>"


def test_a_template_that_rewrites_earlier_turns_is_refused_for_all_and_works_for_last() -> None:
    tokenizer = byte_tokenizer(FORGETFUL)
    record = dialogue("a", "b", "c", "d")
    with pytest.raises(ModelError, match="rewrites earlier turns"):
        encode(record, tokenizer, "chat", 100)
    row = encode(record, tokenizer, "chat", 100, train_on="last")
    assert row is not None and trained(row, tokenizer) == "d<|im_end|>"


def test_what_the_template_refuses_is_a_data_error() -> None:
    with pytest.raises(DataError, match="refuses the turns user, assistant: no turns today"):
        encode(dialogue("a", "b"), byte_tokenizer(STRICT), "chat", 100)


# --- Alpaca and plain ---------------------------------------------------------------------------------------


def test_alpaca_without_input_has_no_input_section(bare: Any) -> None:
    row = encode(Record.from_instruction("1", "Add.", "4"), bare, "alpaca", 500)
    assert row is not None
    assert shown(row, bare) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd.\n\n### Response:\n4</s>"
    )
    assert "Input" not in shown(row, bare) and "None" not in shown(row, bare)
    assert trained(row, bare) == "4</s>"


def test_alpaca_with_input_has_one(bare: Any) -> None:
    row = encode(Record.from_instruction("1", "Add.", "4", input="1 3"), bare, "alpaca", 500)
    assert row is not None
    assert "paired with an input" in shown(row, bare)
    assert shown(row, bare).endswith("### Instruction:\nAdd.\n\n### Input:\n1 3\n\n### Response:\n4</s>")


def test_alpaca_over_several_turns_ends_each_answer_with_eos(bare: Any) -> None:
    record = dialogue("one", "uno.", "two", "dos.", system="Speak Spanish")
    row = encode(record, bare, "alpaca", 500)
    assert row is not None
    assert trained(row, bare) == "uno.</s>dos.</s>"
    assert shown(row, bare).startswith("Speak Spanish\n\n### Instruction:\none\n\n### Response:\nuno.</s>\n\n###")
    last = encode(record, bare, "alpaca", 500, train_on="last")
    assert last is not None
    assert last["input_ids"] == row["input_ids"]
    assert trained(last, bare) == "dos.</s>"


def test_plain_is_question_and_answer_on_lines(bare: Any) -> None:
    row = encode(Record.from_instruction("1", "Add", "4", input="1 3"), bare, "plain", 500)
    assert row is not None
    assert shown(row, bare) == "Add\n\n1 3\n4</s>"


def test_plain_text_is_trained_on_whole(bare: Any) -> None:
    row = encode(Record("1", text="a tale"), bare, "auto", 500)
    assert row is not None
    assert row["labels"] == row["input_ids"]
    assert shown(row, bare) == "a tale</s>"


def test_bos_is_added_where_the_tokenizer_adds_it_and_is_not_trained_on() -> None:
    tokenizer = byte_tokenizer(None, adds_bos=True)
    for record in (Record("1", text="tale"), Record.from_instruction("1", "a", "b")):
        row = encode(record, tokenizer, "plain", 500)
        assert row is not None
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1
        assert row["labels"][0] == IGNORED


# --- Generation sees what training saw ----------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: not any(mark in text for mark in SPECIAL)
)


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(texts, min_size=2, max_size=6).filter(lambda found: len(found) % 2 == 0))
def test_the_prompt_is_what_stands_before_the_last_answer(chatml: Any, template: str, spoken: list[str]) -> None:
    formatter = Formatter(chatml, template, train_on="last")
    record = dialogue(*spoken)
    row = formatter.encode(record, 10_000)
    assert row is not None
    prompt = formatter.encode_prompt(record)
    assert row["input_ids"][: len(prompt)] == prompt
    assert set(row["labels"][: len(prompt)]) <= {IGNORED}
    assert IGNORED not in row["labels"][len(prompt) :]


def test_tokens_that_would_reach_over_the_edge_are_kept_apart(chatml: Any) -> None:
    # Given an answer that starts with a line end, which the tokenizer would join with the one before it
    row = encode(dialogue("q", "\n."), chatml, "plain", 100)
    assert row is not None
    assert trained(row, chatml) == "\n.<|im_end|>"
    assert encode_prompt(dialogue("q", "\n."), chatml, "plain") == row["input_ids"][:2]


def test_a_tokenizer_without_offsets_gives_the_same(chatml: Any) -> None:
    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(chatml, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return chatml(*args, **kwargs)

    record = dialogue("What is the matter?", "A lot, the end.", "More?", "No.")
    assert encode(record, Slow(), "chat", 400) == encode(record, chatml, "chat", 400)


# --- What does not fit --------------------------------------------------------------------------------------


def test_the_prompt_is_cut_from_the_left_and_the_answer_never(chatml: Any) -> None:
    record = dialogue("x" * 100, "answer")
    full = encode(record, chatml, "chat", 1000)
    cut = encode(record, chatml, "chat", 40)
    assert full is not None and cut is not None
    assert len(cut["input_ids"]) == 40
    assert cut["input_ids"] == full["input_ids"][-40:]
    assert trained(cut, chatml) == "answer<|im_end|>"


def test_bos_stays_in_front_when_the_prompt_is_cut() -> None:
    tokenizer = byte_tokenizer(None, adds_bos=True)
    row = encode(Record.from_instruction("1", "x" * 50, "yes"), tokenizer, "plain", 20)
    assert row is not None
    assert shown(row, tokenizer).startswith("<s>xxx") and len(row["input_ids"]) == 20
    prompt = encode_prompt(Record.from_instruction("1", "x" * 50, "yes"), tokenizer, "plain", max_length=10)
    assert len(prompt) == 10 and prompt[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("length", range(1, 12))
def test_an_answer_that_does_not_fit_with_some_prompt_is_left_out(chatml: Any, length: int) -> None:
    # "answer" is six tokens and its end mark one; at least one token of prompt is needed
    row = encode(dialogue("q", "answer"), chatml, "chat", length)
    assert (row is not None) == (length >= 8)
    if row is not None:
        assert trained(row, chatml) == "answer<|im_end|>"


def test_an_earlier_answer_that_is_cut_in_the_middle_is_not_trained_on(chatml: Any) -> None:
    record = dialogue("a", "first answer", "b", "second")
    full = encode(record, chatml, "chat", 1000)
    assert full is not None
    whole = len(full["input_ids"])
    start = full["labels"].index(chatml("f").input_ids[0])
    row = encode(record, chatml, "chat", whole - start - 3)
    assert row is not None
    assert trained(row, chatml) == "second<|im_end|>"
    row = encode(record, chatml, "chat", whole - start)
    assert row is not None
    assert trained(row, chatml) == "first answer<|im_end|>second<|im_end|>"


def test_a_data_set_reports_what_was_skipped_and_cut(chatml: Any) -> None:
    rows = [
        Record.from_instruction("short", "q", "ok"),
        Record.from_instruction("long prompt", "q" * 100, "ok"),
        Record.from_instruction("long answer", "q", "no" * 100),
        Record("long text", text="t" * 100),
    ]
    found = encode_dataset(rows, chatml, "chat", 50)
    assert found.skipped == ["long answer"]
    assert found.cut == 2
    assert [len(row["input_ids"]) for row in found.rows][1:] == [50, 50]
    assert found.tokens == sum(len(row["input_ids"]) for row in found.rows)
    assert found.loss_tokens == 3 + 3 + 49
    assert repr(found) == "EncodedDataset(3 rows, 1 skipped, 2 cut)"


# --- Batches ------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_to_its_longest() -> None:
    import torch

    batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}], 0)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_the_module_imports_no_torch() -> None:
    code = (
        "import sys, fate_llm.components.llm.templates, fate_llm.components.reader, "
        "fate_llm.components.splitter, fate_llm.components.pool;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- The real tokenizer -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_has_no_default_system_prompt_and_ends_its_answers() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model_folder())
    record = dialogue("Why did my escrow go up?", "Desk: Escrow Services. Bring: county tax bill.")
    row = encode(record, tokenizer, "auto", 200)
    assert row is not None
    assert "SmolLM" not in shown(row, tokenizer)
    assert trained(row, tokenizer) == "Desk: Escrow Services. Bring: county tax bill.<|im_end|>"
    prompt = encode_prompt(record, tokenizer)
    assert row["input_ids"][: len(prompt)] == prompt
    assert len(row["input_ids"]) <= 55
