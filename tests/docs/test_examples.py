"""What the README and the docs show works as shown."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import msgspec
import pytest

import moeshm
from moeshm.settings import Settings

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_print_what_they_show(page: Path) -> None:
    failed, _ = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert failed == 0


def test_the_readme_has_examples_to_run() -> None:
    assert len(doctest.DocTestParser().get_examples((ROOT / "README.md").read_text())) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_readme_lists_every_setting_with_its_default() -> None:
    text = (ROOT / "README.md").read_text()
    for name, value in msgspec.structs.asdict(Settings()).items():
        shown = f"{value:g}" if isinstance(value, float) else f"{value}"
        assert re.search(rf"`MOESHM_{name.upper()}` \| `?{re.escape(shown)}`?", text), name


def test_public_names_exist() -> None:
    assert sorted(moeshm.__all__) == moeshm.__all__
    for name in moeshm.__all__:
        assert getattr(moeshm, name) is not None
