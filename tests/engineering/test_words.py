"""The repository uses the field's words (docs/contributing.md), and no sentence begins with "Of"."""

import pathlib
import re

import pytest

from tests.engineering.sandbox import ROOT
from tests.engineering.test_repository import tracked

SUFFIXES = {".py", ".md", ".cu", ".cuh", ".h", ".cc", ".sh", ".txt", ".toml"}
WITHOUT = {"CHANGELOG.md", "uv.lock", "tests/engineering/test_words.py"}
# (what is not written, what is), as regular expressions that match whole words in any case.
WORDS = (
    (r"multiprocessors?", "SM"),
    (r"copy engines?", "TMA"),
    (r"turned tiles?", "swap-AB tile"),
    (r"slots?", "assignment, buffer, stage or field"),
    (r"products? carr(?:y|ies)|carried by (?:a|the) product", "epilogue or prologue"),
    (r"rows of nobody|nobody'?s rows?", "padding rows"),
    (r"rows_wt?", "fwd or dgrad"),
    (r"grouped_outer|outer contractions?", "wgrad"),
    (r"room", "workspace, scratch or memory"),
    (r"sides? of the (?:l2 )?cache", "L2 slice"),
    (r"nobody|whoever|who asks", "the plain subject"),
)
# The same words in another sense.
ALLOWED = (r"__slots__", r"\"contraction\": \"rows_w\"")  # the latter is a table of version 0.1
SENTENCE_WITH_OF = re.compile(r"(?:^|[.:;!?]\s|\"\"\"|#|//|\*|-)\s*Of (?!course)", re.MULTILINE)


def texts() -> list[pathlib.Path]:
    return [
        path
        for path in tracked()
        if path.suffix in SUFFIXES and path.is_file() and path.relative_to(ROOT).as_posix() not in WITHOUT
    ]


def whole_word(word: str) -> re.Pattern:
    """The word in prose, in an identifier (`first_slot`), or broken by the end of a line."""
    spaced = word.replace(" ", r"\s+(?:(?:#|//)\s*)?")
    return re.compile(rf"(?<![a-z])(?:{spaced})(?![a-z])", re.IGNORECASE)


def lines_with(pattern: re.Pattern) -> list[str]:
    """path:line and text of every match."""
    found = []
    for path in texts():
        text = re.sub("|".join(ALLOWED), lambda match: "_" * len(match[0]), path.read_text(), flags=re.IGNORECASE)
        for match in pattern.finditer(text):
            number = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(ROOT)}:{number}: {match[0].strip()!r}")
    return found


pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source archive has no list of tracked files")


@pytest.mark.parametrize(("word", "instead"), WORDS, ids=[instead for _, instead in WORDS])
def test_the_fields_words(word, instead):
    assert not lines_with(whole_word(word)), f"write {instead}"


@pytest.mark.parametrize(
    ("text", "found"),
    [("the slot", True), ("first_slots", True), ("rows of\n    # nobody", True), ("slotted", False), ("a row", False)],
)
def test_a_word_is_found(text, found):
    assert any(whole_word(word).search(text) for word, _ in WORDS) == found


def test_no_sentence_begins_with_of():
    assert not lines_with(SENTENCE_WITH_OF)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# Of an array", True),
        ('"""Of every kind."""', True),
        ("It runs. Of all rows, one", True),
        ("// Of both", True),
        ("Of course not", False),
        ("a matter of rows", False),
    ],
)
def test_a_sentence_with_of_is_found(text, found):
    assert (SENTENCE_WITH_OF.search(text) is not None) == found
