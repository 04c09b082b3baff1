"""A model's card: README.md with the YAML front matter that the Hugging Face hub reads, and its lineage as tables.

https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from fate_llm.pipelines.dialect import dump

__all__ = ["model_card"]

_USE = {
    "adapter": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")""",
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")""",
}


def model_card(model: Mapping[str, Any], *, form: Literal["adapter", "merged", "full"] | str) -> str:
    """The card of a registered model. model: `ModelRecord` as data. form: what lies beside the card."""
    title = f"{model['name']}, version {model['version']}"
    what = {
        "adapter": "A LoRA adapter (PEFT)",
        "merged": "A model: a trained adapter merged into its base model,",
        "full": "A whole model",
    }[form]
    parties = _joined(model["parties"])
    parts = [
        f"---\n{dump(_front_matter(model, form))}---",
        f"# {_cell(title)}",
        f"{what} trained together by {parties} with fate_llm, without any of them showing its data to the others."
        " `lineage.json` holds what this card says, for programs.",
        "## Lineage\n\n" + _table(("what", "value"), _lineage(model)),
        "## Data\n\n" + _data(model["data"], model["party"]),
        "## Privacy and ownership\n\n" + _protection(model),
    ]
    if numbers := _numbers(model["metrics"]):
        parts.append("## Metrics\n\n" + _table(("measure", "value"), numbers))
    parts.append(f"## Use\n\n```python\n{_USE['adapter' if form == 'adapter' else 'merged']}\n```")
    return "\n\n".join(parts) + "\n"


def _front_matter(model: Mapping[str, Any], form: str) -> dict[str, Any]:
    found: dict[str, Any] = {"library_name": "peft" if form == "adapter" else "transformers"}
    if hub := model["base"].get("hub"):
        found["base_model"] = hub
        found["base_model_relation"] = {"adapter": "adapter", "merged": "finetune", "full": "finetune"}[form]
    found["pipeline_tag"] = "text-generation"
    found["tags"] = ["federated-learning", "fate_llm", *(["lora"] if form == "adapter" else [])]
    return found


def _lineage(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    created = datetime.fromtimestamp(model["created"], UTC).isoformat(timespec="seconds")
    rows = [
        ("model digest (SHA-256)", model["digest"]),
        ("kind", model["kind"]),
        ("base model", ", ".join(f"{key}: {value}" for key, value in sorted(model["base"].items()))),
        ("job", model["job"]),
        ("task", model["task"]),
        ("parties", ", ".join(model["parties"])),
        ("registered by", model["party"]),
        ("registered at", created),
        ("job specification (SHA-256)", model["specification"] or "not known"),
        ("policy of the registering party (SHA-256)", model["policy"] or "not known"),
    ]
    return [(name, str(value)) for name, value in rows]


def _data(data: Sequence[Mapping[str, Any]], party: str) -> str:
    if not data:
        return "No fingerprints of data sets were recorded."
    rows = sorted(
        (one["party"] or party, one["name"], one["digest"], "" if one["records"] is None else str(one["records"]))
        for one in data
    )
    return _table(("party", "data set", "SHA-256", "records"), rows)


def _protection(model: Mapping[str, Any]) -> str:
    marks = model["watermarks"]
    spent = "no differential privacy" if model["privacy"] == "none" else model["privacy"]
    return f"Privacy spent: {_cell(str(spent))}. Watermark certificates: {len(marks) or 'none'}."


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Single numbers by dotted name; the rows of rounds are in lineage.json."""
    found: list[tuple[str, str]] = []
    for name, value in sorted(metrics.items()):
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append((f"{prefix}{name}", str(value)))
        elif isinstance(value, float) and math.isfinite(value):
            found.append((f"{prefix}{name}", f"{value:.6g}"))
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _joined(names: Sequence[str]) -> str:
    return ", ".join(_cell(name) for name in names)


def _cell(text: str) -> str:
    """Text that stays text: no markup, no link, no end of the line or of the cell."""
    plain = " ".join(text.split())
    return "".join(f"&#{ord(char)};" if char in "\\`*[]<>|&!#" else char for char in plain)
