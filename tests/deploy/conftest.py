"""A copy of the files that can be spoiled: each check has to notice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .program import ROOT

CONTEXT = ("deploy", ".dockerignore", "constraints.txt", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture
def spoiled(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """A root with everything that images and deployments are made of, one text in one file replaced."""

    def spoil(file: str, old: str, new: str) -> Path:
        root = tmp_path / "root"
        for name in CONTEXT:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", "demo-run"))
            else:
                shutil.copy2(source, root / name)
        (root / "fate_llm").mkdir()
        path = root / file
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{file} has no {old!r}: the mutant changes nothing"
        path.write_text(text.replace(old, new), encoding="utf-8")
        return root

    return spoil
