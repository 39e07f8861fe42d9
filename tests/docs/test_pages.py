"""What the pages point to is there, the front pages are short, and the Chinese page follows the English ones."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from app.__main__ import parse_arguments
from tests.docs.pages import BY_PATH, CHINESE, PAGES, TRANSLATED, Page, each_page, fences, rows
from tests.support.paths import ROOT

FOLDERS = ("app", "scheduler", "models", "tests", "deploy")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def commands(page: Page) -> list[str]:
    """What the `console` fences of a page have one type, continued lines joined."""
    shown = "\n".join(text for language, text in page.blocks() if language == "console").replace("\\\n", " ")
    return re.findall(r"(?m)^\$ (.+)$", shown)


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize(("path", "limit"), [("README.md", 250), ("README.zh-CN.md", 450)])
def test_front_page_is_short(path: str, limit: int) -> None:
    assert len(BY_PATH[path].text.splitlines()) <= limit


def test_pages_are_all_listed() -> None:
    found = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("README*.md")}
    # Weights lie in models/, with pages of their own.
    ours = {path for path in found if not re.match(r"models/.+/", path)} | {path.name for path in ROOT.glob("*.md")}
    assert ours == set(BY_PATH)


def test_front_page_leads_to_every_page() -> None:
    direct = {target for page in ("README.md", "tests/README.md") for target in resolved(BY_PATH[page])}
    assert set(BY_PATH) <= {path for path, _ in direct} | {"README.md"}


def resolved(page: Page) -> list[tuple[str, str]]:
    """(path from the root, anchor) of every link of a page to a file of ours."""
    found = []
    for target in links(page.prose()):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            place = (ROOT / page.path).parent / path if path else ROOT / page.path
            found.append((Path(place).resolve().relative_to(ROOT.resolve()).as_posix(), anchor))
    return found


@each_page
def test_links_lead_to_what_is_there(page: Page) -> None:
    assert len(set(page.headings())) == len(page.headings()), "two headings would have one anchor"
    for path, anchor in resolved(page):
        assert (ROOT / path).exists(), path
        if anchor:
            assert anchor in map(slug, BY_PATH[path].headings()), f"{path}#{anchor}"


@each_page
def test_links_are_relative_or_https(page: Page) -> None:
    assert not [target for target in links(page.prose()) if target.startswith(("http://", "/"))]


@each_page
def test_paths_that_are_named_exist(page: Page) -> None:
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)}|\.ci)/[\w./-]*)`", page.prose()):
        assert (ROOT / path).exists(), path


@each_page
def test_commands_that_are_shown_exist(page: Page) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in commands(page):
        words = shlex.split(command)
        if "make" in words:
            target = words[words.index("make") + 1]
            assert re.search(rf"(?m)^{re.escape(target)}:", makefile), command
        for path in (word for word in words if re.match(rf"(?:{'|'.join(FOLDERS)})/[^*]", word) and "Qwen" not in word):
            assert (ROOT / path).exists(), command
    for module in re.findall(r"-m ((?:app|models|tests|scheduler)[\w.]*)", page.text):
        assert find_spec(module), module


@each_page
def test_commands_of_app_are_parsed(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands(page):
        _, is_ours, arguments = command.partition("python -m app")
        if is_ours:
            monkeypatch.setattr("sys.argv", ["app", *shlex.split(arguments)])
            parse_arguments()


# The Chinese page


def spans(row: list[str]) -> list[str]:
    return sorted(re.findall(r"`([^`]+)`", " ".join(row)))


def test_translation_has_the_sections_of_the_front_page_and_no_unknown_one() -> None:
    assert CHINESE.headings() == [heading for heading in CHINESE.headings() if heading in TRANSLATED]
    assert set(CHINESE.headings()) == set(TRANSLATED)
    assert {heading for path, heading in TRANSLATED.values() if path == "README.md"} == set(BY_PATH["README.md"].headings())


@pytest.mark.parametrize(("chinese", "original"), TRANSLATED.items(), ids=map("#".join, TRANSLATED.values()))
def test_translation_has_the_same_examples_and_rows(chinese: str, original: tuple[str, str]) -> None:
    path, heading = original
    ours, theirs = CHINESE.section(chinese), BY_PATH[path].section(heading)
    assert fences(ours) == fences(theirs)
    # A table may have become a list.
    if rows(ours):
        assert [spans(row) for row in rows(ours)] == [spans(row) for row in rows(theirs)]


def test_translation_names_the_same_modules() -> None:
    originals = [target for target in links(BY_PATH["README.md"].section("The code")) if target.endswith(".py")]
    assert [target for target in links(CHINESE.section("代码")) if target.endswith(".py")] == originals


def test_translations_name_each_other() -> None:
    assert CHINESE.path in links(PAGES[0].prose()) and PAGES[0].path in links(CHINESE.prose())
