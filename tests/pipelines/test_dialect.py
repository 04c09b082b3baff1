"""The YAML dialect: what a scalar is, what is refused, and that writing and reading agree."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.pipelines.dialect import MAX_BYTES, MAX_VALUES, Mark, Source, dotted, dump, has_step, parse
from fate_llm.pipelines.loader import load_text


def only_fault(source: Source) -> tuple[str, int | None]:
    """Code and line of the one fault."""
    assert len(source.faults) == 1, source.faults
    return source.faults[0].code, source.faults[0].line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.0e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-2.", -2.0),
        ("12", 12),
        ("-12", -12),
        ("+3", 3),
        ("007", 7),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("10m", "10m"),
        ("'12'", "12"),
        ('"true"', "true"),
        ("!!str 12", "12"),
        ("!!int 12", 12),
        ("一二", "一二"),
        ("١٢", "١٢"),
    ],
)
def test_a_scalar_is_what_it_looks_like(text: str, value: object) -> None:
    # When one value is read
    source = parse(f"key: {text}\n", "f.yaml")
    # Then it has the value and the type of YAML 1.2 and JSON
    assert source.faults == []
    assert source.data == {"key": value}
    assert type(source.data["key"]) is type(value)


def test_json_is_read_as_it_is() -> None:
    source = parse('{"a": [1, 1e-3, "x", null, true], "b": {}}', None)
    assert source.data == {"a": [1, 1e-3, "x", None, True], "b": {}}


def test_every_value_has_its_line() -> None:
    # Given keys and list items on lines of their own
    source = parse("a:\n  b: 1\n  c:\n    - x\n    - y: 2\n", "f.yaml")
    # Then each is marked where it is written
    assert source.marks == {
        (): Mark("f.yaml", 1),
        ("a",): Mark("f.yaml", 1),
        ("a", "b"): Mark("f.yaml", 2),
        ("a", "c"): Mark("f.yaml", 3),
        ("a", "c", 0): Mark("f.yaml", 4),
        ("a", "c", 1): Mark("f.yaml", 5),
        ("a", "c", 1, "y"): Mark("f.yaml", 5),
    }


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("a: 1\nb: [1, 2\n", "yaml_syntax", 3),
        ("a: 1\n\tb: 2\n", "yaml_syntax", 2),
        ("a: 1\n---\nb: 2\n", "yaml_syntax", 2),
        ("a: *nowhere\n", "yaml_syntax", 1),
        ("a: 1\nb: \x07\n", "yaml_syntax", 2),
        ("a: !!python/object/apply:os.system [ls]\n", "yaml_tag", 1),
        ("a: 1\nb: !mine {c: 1}\n", "yaml_tag", 2),
        ("a: !!binary aGk=\n", "yaml_tag", 1),
        ("a: !!timestamp 2024-01-01\n", "yaml_tag", 1),
        ("a: !!set {x}\n", "yaml_tag", 1),
        ("a: 1\n1: x\n", "yaml_key", 2),
        ("a: 1\n[x]: y\n", "yaml_key", 2),
        ("true: y\n", "yaml_key", 1),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "yaml_key", 3),
        ("a: .inf\n", "yaml_number", 1),
        ("a: 1\nb: -.inf\n", "yaml_number", 2),
        ("a: .nan\n", "yaml_number", 1),
        ("a: 1e999\n", "yaml_number", 1),
        ("a: 99999999999999999999\n", "yaml_number", 1),
        (f"a: {'9' * 6000}\n", "yaml_number", 1),
        ("a: !!int twelve\n", "yaml_number", 1),
        ("a: !!bool perhaps\n", "yaml_number", 1),
        ("a: 1\nb: 2\na: 3\n", "duplicate_key", 3),
    ],
)
def test_what_is_refused_has_a_code_and_a_line(text: str, code: str, line: int) -> None:
    assert only_fault(parse(text, "f.yaml")) == (code, line)


def test_a_duplicate_names_the_first_and_keeps_its_value() -> None:
    source = parse("a: {x: 1,\n    x: 2}\n", "f.yaml")
    assert "line 1" in source.faults[0].message
    assert source.faults[0].path == "a.x"
    assert source.data == {"a": {"x": 1}}


def test_faults_of_one_text_come_together() -> None:
    source = parse("a: .nan\nb: !x 1\nc: 1\nc: 2\n3: 4\n", "f.yaml")
    assert [fault.line for fault in source.faults] == [1, 2, 4, 5]


def test_too_many_bytes_are_refused_unread() -> None:
    assert only_fault(parse("a: " + "x" * MAX_BYTES, "f.yaml")) == ("file_too_large", None)


def test_an_alias_bomb_stops_early() -> None:
    # Given nine levels of ten aliases each, a thousand million values when expanded
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    # When it is read
    source = parse("\n".join(lines), "f.yaml")
    # Then it is refused at the bound
    assert only_fault(source)[0] == "file_too_large"
    assert source.data is None
    assert len(source.marks) <= MAX_VALUES + 1


def test_an_alias_within_itself_is_refused() -> None:
    assert only_fault(parse("a: &a [*a]\n", "f.yaml"))[0] == "file_too_large"


@pytest.mark.parametrize("size", [60, 1000])
def test_deep_nesting_is_refused(size: int) -> None:
    source = parse("a: " + "[" * size + "]" * size, "f.yaml")
    assert only_fault(source)[0] in {"file_too_large", "yaml_syntax"}


def test_an_alias_as_a_value_is_a_copy() -> None:
    source = parse("a: &x {b: 1}\nc: *x\n", None)
    assert source.data == {"a": {"b": 1}, "c": {"b": 1}}
    assert source.data["a"] is not source.data["c"]


def test_paths_are_shown_as_people_write_them() -> None:
    assert dotted(("parties", "hosts", 1)) == "parties.hosts[1]"
    assert dotted(("tasks", "a.b", "params")) == "tasks.a.b.params"
    assert dotted(()) == ""


@pytest.mark.parametrize(
    ("where", "step", "there"),
    [
        ({"a": 1}, "a", True),
        ({"a": 1}, "b", False),
        ([1], 0, True),
        ([1], 1, False),
        ([1], -1, False),
        ([1], "a", False),
        ("text", 0, False),
        (None, "a", False),
    ],
)
def test_steps_lead_into_mappings_and_lists_only(where: object, step: object, there: bool) -> None:
    assert has_step(where, step) is there


@pytest.mark.parametrize(
    "text",
    [
        "1e-3",
        "08",
        "007",
        "no",
        "yes",
        "on",
        "null",
        "~",
        "",
        "1:30",
        "2024-01-01",
        "0o17",
        "1_000",
        "<<",
        "=",
        "- a",
    ],
)
def test_text_that_looks_otherwise_is_quoted_for_every_dialect(text: str) -> None:
    # Given a text that some reader of YAML takes for a number, a truth or nothing
    written = dump({"key": text})
    # Then both ours and PyYAML's YAML 1.1 read it as text
    assert parse(written, None).data == {"key": text}
    assert yaml.safe_load(written) == {"key": text}


def test_dump_keeps_order_and_writes_no_anchors() -> None:
    shared = {"x": 1}
    assert dump({"b": shared, "a": shared, "c": [1, 2]}) == "b: {x: 1}\na: {x: 1}\nc: [1, 2]\n"


def test_dump_escapes_what_the_loader_would_fill_in() -> None:
    written = dump({"name": "${HOME} and $${x}"})
    assert "$${HOME}" in written
    assert load_text(written).data == {"name": "${HOME} and $${x}"}


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**63), max_value=2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(data=st.dictionaries(st.text(alphabet=st.characters(exclude_categories=["Cs"])), PLAIN, min_size=1, max_size=5))
def test_what_is_written_is_read_back(data: dict[str, Any]) -> None:
    # When any plain values are written and read
    written = dump(data)
    read = load_text(written)
    # Then they are the same, in the same order, and the text is stable
    assert read.faults == []
    assert read.data == data
    assert list(read.data) == list(data)
    assert dump(read.data) == written


@settings(max_examples=150, deadline=None)
@given(text=st.text() | st.text(alphabet="{}[]:,-&*!|>'\"#%@` \n\tab1.<?$\\xu0"))
def test_no_text_makes_the_reader_fail(text: str) -> None:
    # When any text at all is read, it gives values or faults, and never raises
    source = parse(text, "f.yaml")
    assert all(fault.code and fault.message for fault in source.faults)
