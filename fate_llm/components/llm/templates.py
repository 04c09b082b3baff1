"""From a record to token ids and a loss mask: the chat, Alpaca and plain templates.

Rules:
1. Training and generation see the same text: `encode_prompt` is what `encode` shows before the last answer.
2. The loss is on assistants' turns only, with the token that ends each of them; all other labels are -100.
3. A record without input never gets an input section, and a record without system turn never gets the
   default system prompt that some chat templates add (it costs tokens and says nothing about the data).
4. An answer is never cut. What must go goes from the left of the prompt; an answer that does not fit is
   skipped, and `encode_dataset` says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from fate_llm.core.errors import ConfigurationError, DataError, ModelError
from fate_llm.core.names import nearest

from .records import Record, Turn, prompt_and_answer

if TYPE_CHECKING:
    import torch

__all__ = [
    "IGNORED",
    "TEMPLATES",
    "Encoded",
    "EncodedDataset",
    "Formatter",
    "Rendered",
    "TrainOn",
    "choose_template",
    "collate",
    "encode",
    "encode_dataset",
    "encode_prompt",
]

IGNORED = -100
TEMPLATES = ("auto", "chat", "alpaca", "plain")

TrainOn = Literal["all", "last"]


class Encoded(TypedDict):
    """Token ids of one example, and the labels beside them: the same ids, or -100 where there is no loss."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True, repr=False)
class Rendered:
    """A record as text. Positions are characters of `text`, in order.

    spans: the parts [start, end) trained on. breaks: where an EOS id goes, because the text itself has
    no mark that ends a turn there. leading: whether a BOS id goes first, because the text itself has none.
    """

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    breaks: tuple[int, ...] = ()
    leading: bool = False


@dataclass(slots=True, repr=False)
class EncodedDataset:
    """All examples of a data set that fit, and what did not.

    skipped: ids of records whose answer alone is longer than allowed.
    cut: examples that lost some of their prompt (or, for plain text, of their end).
    """

    rows: list[Encoded] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    cut: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def loss_tokens(self) -> int:
        """Tokens whose prediction counts (the first token of an example is never predicted)."""
        return sum(label != IGNORED for row in self.rows for label in row["labels"][1:])

    def __repr__(self) -> str:
        return f"EncodedDataset({len(self.rows)} rows, {len(self.skipped)} skipped, {self.cut} cut)"


def choose_template(template: str, tokenizer: Any) -> str:
    """`auto` resolved: `chat` when the tokenizer has a chat template, else `alpaca`.

    Raises:
        ConfigurationError: no such template, or `chat` with a tokenizer that has no chat template.
    """
    if template not in TEMPLATES:
        raise ConfigurationError(f"no template is called {template!r}", hint=nearest(template, TEMPLATES))
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "auto":
        return "chat" if has_chat else "alpaca"
    if template == "chat" and not has_chat:
        raise ConfigurationError("template `chat`: this tokenizer has no chat template", hint="Use alpaca or plain.")
    return template


class Formatter:
    """Shows records to a model: one tokenizer, one template, one choice of what is trained on.

    tokenizer: a Hugging Face tokenizer. template: `auto`, `chat`, `alpaca` or `plain`.
    train_on: `all` assistants' turns or the `last` one.

    Raises:
        ConfigurationError: as `choose_template`, or an unknown `train_on`.
    """

    def __init__(self, tokenizer: Any, template: str = "auto", *, train_on: TrainOn = "all") -> None:
        if train_on not in ("all", "last"):
            raise ConfigurationError(f"train_on: {train_on!r}", hint="valid: all, last")
        self.tokenizer = tokenizer
        self.template = choose_template(template, tokenizer)
        self.train_on = train_on
        self._preamble = _default_preamble(tokenizer) if self.template == "chat" else ""
        self._bos = _leading_bos(tokenizer)

    def render(self, record: Record) -> Rendered:
        """The whole record as text; it ends where the last answer ends.

        Raises:
            DataError: no answer at the end, or the chat template refuses the turns.
            ModelError: the chat template rewrites earlier turns, so that no mask would be right.
        """
        _, answer = prompt_and_answer(record)
        if record.text is not None:
            return Rendered(answer, ((0, len(answer)),), (len(answer),), leading=True)
        if self.template == "chat":
            return self._render_chat(record.turns)
        pieces = _pieces(record.turns, self.template)[:-1]
        return self._join(pieces)

    def render_prompt(self, record: Record) -> Rendered:
        """What a model is shown before it writes the last answer, without spans; empty for plain text."""
        before, _ = prompt_and_answer(record)
        if record.text is not None:
            return Rendered("", leading=True)
        if self.template == "chat":
            return Rendered(self._chat_text(before, prompt=True))
        joined = self._join([*_pieces(before, self.template), (_OPEN[self.template], False)])
        return Rendered(joined.text, (), joined.breaks, leading=True)

    def encode(self, record: Record, max_length: int) -> Encoded | None:
        """Ids and labels of at most `max_length` tokens, or None when the last answer does not fit.

        The last answer needs all of its tokens, its end mark and one token of prompt. What is cut goes from
        the left (after a BOS id); an earlier answer that is cut in the middle is no longer trained on. Plain
        text is cut at its end.
        """
        return self.fit(record, max_length)[0]

    def fit(self, record: Record, max_length: int) -> tuple[Encoded | None, bool]:
        """As `encode`, with whether something was cut."""
        ids, mask = self._tokens(self.render(record))
        cut = len(ids) > max_length
        if cut and record.text is not None:
            ids, mask = ids[:max_length], mask[:max_length]
        elif cut:
            if not self._answer_fits(ids, mask, max_length):
                return None, False
            ids, mask = self._cut_left(ids, mask, max_length)
        labels = [token if ours else IGNORED for token, ours in zip(ids, mask, strict=True)]
        return Encoded(input_ids=ids, labels=labels), cut

    def length(self, record: Record) -> int:
        """Tokens of the whole example, uncut."""
        return len(self._tokens(self.render(record))[0])

    def encode_prompt(self, record: Record, max_length: int | None = None) -> list[int]:
        """Ids of everything before the last answer, for generation, cut from the left to `max_length`."""
        ids, mask = self._tokens(self.render_prompt(record))
        if max_length is None or len(ids) <= max_length:
            return ids
        return self._cut_left(ids, mask, max_length)[0]

    def _join(self, pieces: Sequence[tuple[str, bool]]) -> Rendered:
        text, spans = "", []
        for piece, ours in pieces:
            if ours:
                spans.append((len(text), len(text) + len(piece)))
            text += piece
        breaks = tuple(end for _, end in spans)
        return Rendered(text, tuple(spans if self.train_on == "all" else spans[-1:]), breaks, leading=True)

    def _chat_text(self, turns: Sequence[Turn], *, prompt: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        text = _apply(self.tokenizer, messages, prompt=prompt)
        if turns and turns[0].role == "system":
            return text
        bos = getattr(self.tokenizer, "bos_token", None) or ""
        rest = text.removeprefix(self._preamble)
        # the preamble may hold the BOS token besides the default system prompt; that one stays
        keeps_bos = bool(bos) and self._preamble.startswith(bos) and not rest.startswith(bos)
        return bos + rest if keeps_bos else rest

    def _render_chat(self, turns: Sequence[Turn]) -> Rendered:
        whole = self._chat_text(turns)
        answers = [at for at, turn in enumerate(turns) if turn.role == "assistant"]
        trained = answers if self.train_on == "all" else answers[-1:]
        spans = tuple(self._chat_span(turns, at, whole) for at in trained)
        start, end = spans[-1]
        unmarked = whole[start:end].strip() == turns[-1].content.strip()
        return Rendered(whole[:end], spans, tuple(stop for _, stop in spans) if unmarked else ())

    def _chat_span(self, turns: Sequence[Turn], at: int, whole: str) -> tuple[int, int]:
        """Where turn `at` lies in the whole text: its content and its end mark, without white space after."""
        before = self._chat_text(turns[:at], prompt=True)
        upto = self._chat_text(turns[: at + 1])
        if not (whole.startswith(upto) and upto.startswith(before)):
            raise ModelError(
                "the model's chat template rewrites earlier turns, so no loss mask over all turns is right",
                hint="Use train_on: last, or template: alpaca.",
            )
        content_end = min(len(before) + len(turns[at].content), len(upto))
        return len(before), max(len(upto.rstrip()), content_end)

    def _tokens(self, rendered: Rendered) -> tuple[list[int], list[bool]]:
        """Ids, and for each whether it is trained on."""
        ids = list(self._bos) if rendered.leading else []
        mask = [False] * len(ids)
        trained_ends = {end for _, end in rendered.spans}
        start = 0
        for stop in dict.fromkeys((*rendered.breaks, len(rendered.text))):
            spans = [(a - start, b - start) for a, b in rendered.spans if start <= a and b <= stop]
            piece, ours = _tokenise(self.tokenizer, rendered.text[start:stop], spans)
            ids, mask, start = ids + piece, mask + ours, stop
            if stop in rendered.breaks and self.tokenizer.eos_token_id is not None:
                ids.append(int(self.tokenizer.eos_token_id))
                mask.append(stop in trained_ends)
        return ids, mask

    def _answer_fits(self, ids: list[int], mask: list[bool], max_length: int) -> bool:
        answer = next((back for back, ours in enumerate(reversed(mask)) if not ours), len(mask))
        return answer + len(self._kept(ids)) + 1 <= max_length

    def _kept(self, ids: list[int]) -> list[int]:
        """The BOS id when the example starts with one: it stays in front of whatever is cut."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return ids[:1] if bos is not None and ids[:1] == [bos] and self._bos else []

    def _cut_left(self, ids: list[int], mask: list[bool], max_length: int) -> tuple[list[int], list[bool]]:
        kept = self._kept(ids)
        first = len(ids) - (max_length - len(kept))
        rest = mask[first:]
        if mask[first - 1] and rest[0]:
            broken = next((at for at, ours in enumerate(rest) if not ours), len(rest))
            rest = [False] * broken + rest[broken:]
        return kept + ids[first:], [False] * len(kept) + rest


def encode(
    record: Record, tokenizer: Any, template: str, max_length: int, *, train_on: TrainOn = "all"
) -> Encoded | None:
    """`Formatter.encode` for one record; make a `Formatter` for many."""
    return Formatter(tokenizer, template, train_on=train_on).encode(record, max_length)


def encode_prompt(
    record: Record, tokenizer: Any, template: str = "auto", *, max_length: int | None = None
) -> list[int]:
    """`Formatter.encode_prompt` for one record."""
    return Formatter(tokenizer, template).encode_prompt(record, max_length)


def encode_dataset(
    records: Iterable[Record], tokenizer: Any, template: str, max_length: int, *, train_on: TrainOn = "all"
) -> EncodedDataset:
    """Encode all records; those whose answer does not fit are left out and named in `skipped`."""
    formatter, found = Formatter(tokenizer, template, train_on=train_on), EncodedDataset()
    for record in records:
        row, cut = formatter.fit(record, max_length)
        if row is None:
            found.skipped.append(record.id)
        else:
            found.rows.append(row)
            found.cut += cut
    return found


def collate(batch: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad a batch on the right to its longest example.

    Returns int64 tensors of shape [batch, longest]: input_ids (padded with `pad_id`), attention_mask (1 on
    tokens, 0 on padding) and labels (padded with -100).
    """
    import torch

    longest = max(len(row["input_ids"]) for row in batch)

    def padded(rows: Iterable[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.int64)

    return {
        "input_ids": padded((row["input_ids"] for row in batch), pad_id),
        "attention_mask": padded(([1] * len(row["input_ids"]) for row in batch), 0),
        "labels": padded((row["labels"] for row in batch), IGNORED),
    }


# --- Text of the templates ----------------------------------------------------------------------------------

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_OPEN = {"alpaca": "### Response:\n", "plain": ""}
_CLOSE = {"alpaca": "\n\n", "plain": "\n"}


def _pieces(turns: Sequence[Turn], template: str) -> list[tuple[str, bool]]:
    """Pieces of text, each with whether an assistant wrote it. The last piece only closes the last turn."""
    pieces: list[tuple[str, bool]] = []
    if template == "alpaca" and not (turns and turns[0].role == "system"):
        with_input = any(turn.input is not None for turn in turns)
        pieces.append((_ALPACA_WITH_INPUT if with_input else _ALPACA_WITHOUT_INPUT, False))
    for turn in turns:
        if turn.role == "assistant":
            pieces += [(_OPEN[template], False), (turn.content, True), (_CLOSE[template], False)]
        elif turn.role == "system":
            pieces.append((turn.content + _CLOSE[template], False))
        else:
            pieces.append((_user_piece(turn, template), False))
    return pieces


def _user_piece(turn: Turn, template: str) -> str:
    if template == "plain":
        return turn.content + "\n"
    section = "" if turn.input is None else f"### Input:\n{turn.input}\n\n"
    return f"### Instruction:\n{turn.instruction}\n\n{section}"


def _apply(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    # The boundary to programs of the model's makers: a template raises what it likes.
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the model's chat template refuses the turns {roles}: {error}") from error


def _default_preamble(tokenizer: Any) -> str:
    """What the chat template puts before a first user turn: BOS, a default system prompt, or nothing.

    A later user turn comes without it, so the difference between a first and a later one is the preamble.
    """
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    try:
        first = _apply(tokenizer, [user])
        two, three = _apply(tokenizer, [user, assistant]), _apply(tokenizer, [user, assistant, user])
    except DataError:
        return ""
    later = three.removeprefix(two)
    if later == three or not first.endswith(later):
        return ""
    return first[: len(first) - len(later)]


def _leading_bos(tokenizer: Any) -> list[int]:
    """[BOS id] when this tokenizer starts a text with it, else []."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [int(bos)] if bos is not None and list(tokenizer("a").input_ids)[:1] == [bos] else []


# --- Tokens -------------------------------------------------------------------------------------------------


def _tokenise(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Ids of a text, and for each whether it lies in a span.

    When a token would reach over the edge of a span (or the tokenizer has no offsets), the text is tokenised
    in pieces instead: generation sees the prompt's tokens alone, so training must see the same ones.
    """
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = [(int(start), int(end)) for start, end in found["offset_mapping"]]
        edges = [edge for span in spans for edge in span]
        if not any(start < edge < end for start, end in offsets for edge in edges):
            return list(found["input_ids"]), [_inside(token, spans) for token in offsets]
    return _in_pieces(tokenizer, text, spans)


def _inside(token: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    return any(start <= token[0] and token[1] <= end and token[0] < end for start, end in spans)


def _in_pieces(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
    for start, end in pairwise(edges):
        piece = list(tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"])
        ids += piece
        mask += [_inside((start, end), spans)] * len(piece)
    return ids, mask
