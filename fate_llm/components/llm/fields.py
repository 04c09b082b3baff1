"""Which field of a file is the question, which the answer: the mapping, found or given, and its use on a row.

Rules:
1. One style is in force: question and answer (with or without input), chat messages, or plain text.
2. A given name is never replaced by a found one; two styles that fit equally well are an error, not a choice.
3. A missing field, a wrong type, an empty question or answer is a fault of the row, never an empty text or
   `None`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import Field, model_validator

from fate_llm.core.errors import DataError
from fate_llm.core.interfaces import Frozen
from fate_llm.core.names import nearest

from .records import ROLES, Record, Turn, TurnRole
from .sources import RowFault, kind_of

__all__ = ["Columns", "FieldNames", "Mapper", "find_columns"]

_NAME_LIKE = re.compile(r"[^\W\d][\w.\-]{0,39}(?: [\w.\-]{1,20})?")  # one word or two; records have more
_USER = ("instruction", "prompt", "question")
_ASSISTANT = ("output", "response", "answer")
_PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
)
_INPUTS = ("input", "context")
_MESSAGES = ("messages", "conversations")
_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}


class FieldNames(Frozen):
    """Our names on the left, the file's on the right. Name one style; what is left out is looked for."""

    instruction: str | None = Field(default=None, min_length=1, description="Field with the question or order.")
    input: str | None = Field(
        default=None, min_length=1, description="Field with the Alpaca-style input; may be empty."
    )
    output: str | None = Field(default=None, min_length=1, description="Field with the answer to `instruction`.")
    prompt: str | None = Field(
        default=None, min_length=1, description="Same as `instruction`, for prompt/response files."
    )
    response: str | None = Field(default=None, min_length=1, description="Same as `output`, for prompt/response files.")
    question: str | None = Field(
        default=None, min_length=1, description="Same as `instruction`, for question/answer files."
    )
    answer: str | None = Field(default=None, min_length=1, description="Same as `output`, for question/answer files.")
    messages: str | None = Field(
        default=None, min_length=1, description="Field with a list of {role, content} messages."
    )
    text: str | None = Field(
        default=None, min_length=1, description="Field with plain text, all of which is trained on."
    )
    category: str | None = Field(
        default=None, min_length=1, description="Field with the category splits are stratified by."
    )
    key: str | None = Field(
        default=None, min_length=1, description="Field whose equal values a partition keeps together."
    )

    @model_validator(mode="after")
    def _one_style(self) -> FieldNames:
        pair = [name for name in (*_USER, *_ASSISTANT) if getattr(self, name)]
        for group in (_USER, _ASSISTANT):
            given = [name for name in group if getattr(self, name)]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} mean the same; name one of them")
        if sum(bool(style) for style in (pair or self.input, self.messages, self.text)) > 1:
            raise ValueError("name one style: question and answer, messages, or text")
        return self

    @property
    def user(self) -> str | None:
        return self.instruction or self.prompt or self.question

    @property
    def assistant(self) -> str | None:
        return self.output or self.response or self.answer


@dataclass(frozen=True, slots=True)
class Columns:
    """The mapping in force, in the file's names. inputs: looked at in order, the first that is there counts.

    named: fields the user asked for that a row may lack; one that no row has is an error in the end.
    """

    user: str | None = None
    assistant: str | None = None
    messages: str | None = None
    text: str | None = None
    inputs: tuple[str, ...] = ()
    category: str = "category"
    key: str | None = None
    named: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, str]:
        """Our name to the file's name, for `dataset.json`."""
        names = {
            "instruction": self.user,
            "output": self.assistant,
            "messages": self.messages,
            "text": self.text,
        }
        optional = {"input": " or ".join(self.inputs), "category": self.category, "key": self.key}
        return {ours: theirs for ours, theirs in {**names, **optional}.items() if theirs}


def find_columns(names: FieldNames, found: Sequence[str], *, file: str, answers_optional: bool = False) -> Columns:
    """The mapping for a file whose first record has the fields `found`.

    answers_optional: the field of the answer may be missing; a named question's answer defaults to `answer`.

    Raises:
        DataError: a given name is not there, nothing fits, or more than one style fits.
    """
    if answers_optional and names.user is not None:
        found = [*found, names.assistant or "answer"]
        names = names.model_copy(update={"output": names.assistant or "answer", "response": None, "answer": None})
    for given in (names.user, names.assistant, names.messages, names.text):
        if given is not None and given not in found:
            known = [name for name in found if _NAME_LIKE.fullmatch(name)]
            raise DataError(f"{file}: no field is called {given!r}", hint=nearest(given, known))
    named = tuple(name for name in (names.input, names.category, names.key) if name is not None)
    rest: dict[str, Any] = {"category": names.category or "category", "key": names.key, "named": named}
    if names.messages or names.text:
        return Columns(messages=names.messages, text=names.text, **rest)
    styles = _fitting(names, found)
    if len(styles) != 1:
        raise _not_one(styles, found, file)
    if "user" in styles[0]:
        rest["inputs"] = (names.input,) if names.input else _INPUTS
    return Columns(**{**styles[0], **rest})


def _fitting(names: FieldNames, found: Sequence[str]) -> list[dict[str, str]]:
    """Every style that the fields allow, given what the user has named."""
    users = [names.user] if names.user else list(dict.fromkeys(user for user, _ in _PAIRS if user in found))
    if names.user or names.assistant:
        others = list(dict.fromkeys(answer for _, answer in _PAIRS if answer in found))
        answers = [names.assistant] if names.assistant else others
        return [{"user": user, "assistant": answer} for user in users for answer in answers if user != answer]
    pairs = [{"user": u, "assistant": a} for u, a in _PAIRS if u in found and a in found]
    if names.input:
        return pairs
    messages = [{"messages": name} for name in _MESSAGES if name in found]
    return pairs + messages + ([{"text": "text"}] if "text" in found else [])


def _shown(found: Sequence[str]) -> str:
    """Names of fields for people. What looks like a record (a file without a header) is counted, not shown."""
    names = sorted(name for name in found if _NAME_LIKE.fullmatch(name))
    others = len(found) - len(names)
    return ", ".join([*names[:20], *([f"{others} that do not look like names"] if others else [])]) or "none"


def _not_one(styles: list[dict[str, str]], found: Sequence[str], file: str) -> DataError:
    fields = _shown(found)
    if not styles:
        what = f"{file}: no question and answer, messages or text among the fields {fields}"
    else:
        fits = "; ".join(" and ".join(style.values()) for style in styles)
        what = f"{file}: more than one reading fits the fields {fields}: {fits}"
    return DataError(what, hint="Say which with `fields`, as in {instruction: question, output: answer}.")


class _Wrong(Exception):
    """A fault of the row at hand: (field, found, valid)."""


class Mapper:
    """Makes records of rows. Remembers which of the named optional fields were ever seen."""

    def __init__(self, columns: Columns, *, file: str, answers_optional: bool = False) -> None:
        self.columns, self.file, self._answers_optional = columns, file, answers_optional
        self._unseen = set(columns.named)

    @property
    def unseen(self) -> list[str]:
        """Fields that were asked for and that no row had."""
        return sorted(self._unseen)

    def record(self, number: int, row: Mapping[str, Any]) -> Record | RowFault:
        """The record of a row, or what is wrong with it."""
        self._unseen.difference_update(row)
        columns, id = self.columns, str(number)
        try:
            category, key = _label(row, columns.category), _label(row, columns.key)
            if columns.text is not None:
                return Record(id, text=_text(row, columns.text), category=category, key=key)
            if columns.messages is not None:
                return Record(id, turns=_turns(row, columns.messages), category=category, key=key)
            question, answer = _text(row, str(columns.user)), self._answer(row, str(columns.assistant))
            given = _input(row, columns.inputs)
        except _Wrong as wrong:
            return RowFault(self.file, number, *wrong.args)
        return Record.from_instruction(id, question, answer, input=given, category=category, key=key)

    def _answer(self, row: Mapping[str, Any], name: str) -> str:
        """The answer; the empty text where none is needed and none is given."""
        if self._answers_optional and row.get(name) in (None, ""):
            return ""
        return _text(row, name)


def _text(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise _Wrong(name, "no such field", "text")
    value = row[name]
    if not isinstance(value, str):
        raise _Wrong(name, kind_of(value), "text")
    if not value.strip():
        raise _Wrong(name, "empty text", "text that is not empty")
    return _encodable(value, name)


def _encodable(value: str, name: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Wrong(name, "half of a surrogate pair", "text that UTF-8 can hold") from error
    return value


def _input(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    for name in names:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise _Wrong(name, kind_of(value), "text or nothing")
        if value:
            return _encodable(value, name)
    return None


def _label(row: Mapping[str, Any], name: str | None) -> str | None:
    value = None if name is None else row.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str | int):
        raise _Wrong(str(name), kind_of(value), "text, a whole number or nothing")
    return _encodable(str(value), str(name))


def _turns(row: Mapping[str, Any], name: str) -> tuple[Turn, ...]:
    messages = row.get(name)
    if not isinstance(messages, list) or not messages:
        raise _Wrong(name, "an empty list" if messages == [] else kind_of(messages), "a list of messages")
    turns = tuple(_turn(message, f"{name}[{at}]") for at, message in enumerate(messages))
    spoken = turns[1:] if turns[0].role == "system" else turns
    roles = ["user" if at % 2 == 0 else "assistant" for at in range(len(spoken))]
    if len(spoken) % 2 or not spoken or [turn.role for turn in spoken] != roles:
        found = "the roles " + ", ".join(turn.role for turn in turns[:8])
        raise _Wrong(name, found, "user and assistant in turn, the assistant last, a system message only first")
    return turns


def _turn(message: Any, place: str) -> Turn:
    if not isinstance(message, Mapping):
        raise _Wrong(place, kind_of(message), "an object with role and content")
    role = message.get("role", _SHAREGPT.get(str(message.get("from"))))
    if role not in ROLES:
        raise _Wrong(f"{place}.role", "another role" if isinstance(role, str) else kind_of(role), ", ".join(ROLES))
    name = "content" if "content" in message else "value" if "value" in message else "content"
    content = _text({f"{place}.{name}": message[name]} if name in message else {}, f"{place}.{name}")
    return Turn(cast(TurnRole, role), content)
