"""The example of docs/kvm-library.md is run from the page, and says what the page says it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "kvm-library.md"


def block(language: str) -> str:
    """The page's first code block in `language`."""
    found = re.search(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.kvm
def test_the_page_says_what_its_example_prints() -> None:
    example = subprocess.run(
        [sys.executable, "-W", "error", "-c", block("python")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (block("text"), "", 0) == (example.stdout, example.stderr, example.returncode)


def test_the_example_is_about_25_lines() -> None:
    lines = [line for line in block("python").splitlines() if line.strip()]
    assert 20 <= len(lines) <= 30
