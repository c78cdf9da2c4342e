"""docs/security.md lists the attacks as they are."""

from __future__ import annotations

import re

import pytest

from tests.hostile import page
from tests.hostile.attack import load_all


def test_the_page_is_up_to_date() -> None:
    text = page.PAGE.read_text()
    assert page.replace(text) == text, "run python -m tests.hostile.page"


def test_every_attack_has_a_row_with_an_answer() -> None:
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \| \[(\w+)\.py\]", page.render(), re.MULTILINE)
    assert sorted(file for *_, file in rows) == [attack.name for attack in load_all()]


def test_a_page_without_a_place_for_it() -> None:
    with pytest.raises(ValueError, match="lacks the lines"):
        page.replace("# Security\n")
