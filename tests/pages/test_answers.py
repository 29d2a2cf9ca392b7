"""Answers are cut where they part, to the token, and shown as text."""

from dataclasses import replace

import pytest

from moesvd_core.evaluation.generation import Answer
from pages.components.answers import Parts, divergence, panel, parted

WORDS = {1: "The", 2: " cat", 3: " sat", 4: " cattle", 5: ".", 6: "<b>"}


class Words:
    """A tokenizer of a handful of words."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(WORDS[token] for token in token_ids)


class Rewriting(Words):
    """One that changes earlier letters when more tokens come."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        text = super().decode(token_ids, skip_special_tokens=True)
        return text.upper() if len(token_ids) > 2 else text


def said(*tokens: int, finished: str = "length", tokenizer: Words | None = None) -> Answer:
    text = (tokenizer or Words()).decode(list(tokens), skip_special_tokens=True)
    return Answer(text, tokens, 0.05, 0.05 + 0.1 * (len(tokens) - 1), finished)  # type: ignore[arg-type]


def test_parts_by_tokens_and_not_by_letters() -> None:
    """ cat and  cattle begin alike, but are different tokens."""
    left, right = said(1, 2, 3), said(1, 4, 5)
    assert parted(left, right, Words()) == Parts("The", " cat", " sat")
    assert parted(right, left, Words()) == Parts("The", " cattle", ".")
    assert divergence(left, right) == "The same for 1 of 3 tokens, then they part (marked)."


def test_equal_answers_do_not_part() -> None:
    left = said(1, 2, 3)
    assert parted(left, left, Words()) == Parts("The cat sat", "", "")
    assert divergence(left, left) == "Both wrote the same 3 tokens."


def test_an_answer_that_is_only_behind_does_not_part_yet() -> None:
    ahead, behind = said(1, 2, 3, finished=""), said(1, 2, finished="")
    assert parted(ahead, behind, Words()).first == ""
    assert parted(said(1, 2, 3), said(1, 2, finished=""), Words()).first == ""
    assert parted(said(1, 2, 3), said(1, 2, finished="end"), Words()) == Parts("The cat", " sat", "")


def test_parting_at_the_first_token_is_said() -> None:
    assert divergence(said(1), said(5)) == "They part at the first token."


@pytest.mark.parametrize("tokens", [(1, 2, 3), (1, 2, 4)])
def test_nothing_is_lost_where_a_decoder_changes_earlier_letters(tokens: tuple[int, ...]) -> None:
    tokenizer = Rewriting()
    one, other = said(*tokens, tokenizer=tokenizer), said(1, 5, 5, tokenizer=tokenizer)
    parts = parted(one, other, tokenizer)
    assert parts.shared + parts.first + parts.rest == one.text
    assert parts.shared == "THE"


def test_a_panel_shows_text_as_text() -> None:
    answer = said(1, 6)
    shown = panel("A", "<script>", answer, parted(answer, said(1, 2), Words()), 2_000_000)
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "&lt;script&gt;" in shown
    assert '<mark title="here the answers part">&lt;b&gt;</mark>' in shown


def test_a_panel_tells_speed_and_memory_only_when_it_may() -> None:
    answer = said(1, 2, 3)
    parts = parted(answer, answer, Words())
    assert "10" in panel("Original", "", answer, parts, 2_000_000)  # two more tokens in 0.2 s
    assert "2.00 MB" in panel("Original", "", answer, parts, 2_000_000)
    secret = panel("A", "", answer, parts, None)
    assert secret.count("<dd>–") == 3
    assert "MB" not in secret


def test_a_panel_says_that_it_is_still_being_written() -> None:
    answer = said(1, 2, finished="")
    parts = Parts(answer.text, "", "")
    assert 'aria-busy="true"' in panel("A", "", answer, parts)
    assert 'aria-busy="false"' in panel("A", "", replace(answer, finished="end"), parts)


@pytest.mark.parametrize(("finished", "words"), [
    ("", "so far"), ("end", "ended by itself"), ("length", "as many as asked for"), ("context", "as many as fit the model&#x27;s context"),
])
def test_a_panel_says_why_an_answer_ended(finished: str, words: str) -> None:
    shown = panel("A", "", said(1, 2, finished=finished))
    assert words in shown
