"""A federation of three tiny banks on disk, and a pipeline over it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.brokers import broker  # noqa: F401
from tests.components.tiny_model import make_tiny_model, write_records

PARTIES = {"guest": "bank-a", "hosts": ["bank-b", "bank-c"], "arbiter": "consortium"}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def pipeline(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """The quickstart's shape on tiny data: change it, then write it with `write_pipeline`."""
    for letter, count in (("a", 24), ("b", 20), ("c", 16)):
        write_records(tmp_path / f"{letter}.jsonl", count, word=f"bank{letter}")
    return {
        "version": 1,
        "name": "tiny",
        "parties": dict(PARTIES),
        "tasks": {
            "data": {
                "component": "reader",
                "params": {"path": "a.jsonl", "fields": {"instruction": "question", "output": "answer"}},
            },
            "split": {
                "component": "splitter",
                "inputs": {"data": "data.dataset"},
                "params": {"test": 0.25, "stratify": "category"},
            },
            "tune": {
                "component": "homo_llm_trainer",
                "inputs": {"train": "split.train", "test": "split.test"},
                "params": {
                    "model": {"path": str(tiny_model)},
                    "rounds": 2,
                    "local_steps": 2,
                    "batch_size": 4,
                    "learning_rate": 0.01,
                },
            },
            "evaluate": {
                "component": "evaluator",
                "inputs": {"model": "tune.model", "data": "split.test"},
                "params": {"max_new_tokens": 4},
            },
        },
        "overrides": {
            "bank-b": {"data": {"params": {"path": "b.jsonl"}}},
            "bank-c": {"data": {"params": {"path": "c.jsonl"}}},
        },
        "job": {"seed": 7, "round_deadline": "60s"},
    }


@pytest.fixture
def write_pipeline(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(data: dict[str, Any], name: str = "tiny.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(copy.deepcopy(data), sort_keys=False))
        return path

    return write
