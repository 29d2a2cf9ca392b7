"""A blind round keeps its secret until the vote, and a vote counts for whom it was meant."""

from dataclasses import replace

import pytest

from moesvd_core.errors import InputError
from moesvd_core.evaluation.generation import Answer, Sampling
from pages.components.rounds import CHOICES, Round, Side, drawn, other


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(map(chr, token_ids))


def said(text: str, finished: str = "length") -> Answer:
    return Answer(text, tuple(map(ord, text)), 0.1, 1.0, finished)  # type: ignore[arg-type]


def played(
    left: Side = "original", *, blind: bool = True, original: str = "red", compressed: str = "rad", finished: str = "length"
) -> Round:
    started = Round("run-1", "auto", 0.4, "Why?", Sampling(seed=3), left, blind, (4_000_000, 3_000_000))
    return started.reached(said(original, finished), said(compressed, finished), Letters())


@pytest.mark.parametrize("left", ["original", "compressed"])
def test_nothing_tells_the_sides_apart_before_the_vote(left: Side) -> None:
    now = played(left)
    for panel in now.panels():
        for word in ("riginal", "ompressed", "auto", "40 %", "MB", "tokens a second</span>1"):
            assert word not in panel
    mirrored = played(other(left), original="rad", compressed="red")
    assert now.panels() == mirrored.panels()  # equal texts in equal places look the same, whoever wrote them


@pytest.mark.parametrize("left", ["original", "compressed"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_vote_counts_for_the_side_that_was_chosen(left: Side, choice: str) -> None:
    vote = played(left).vote(choice)
    expected = {"left": left, "right": other(left), "neither": "neither"}[choice]
    assert (vote.preferred, vote.left, vote.method, vote.ratio) == (expected, left, "auto", 0.4)
    assert (vote.prompt, vote.original, vote.compressed, vote.sampling["seed"]) == ("Why?", "red", "rad", 3)


def test_after_the_vote_everything_is_told() -> None:
    now = replace(played("compressed"), judged="original")
    left, right = now.panels()
    assert "A: Compressed by 40 %, auto" in left
    assert "3.00 MB" in left
    assert "B: Original" in right
    assert now.told().startswith("You preferred the original.")


@pytest.mark.parametrize(
    "now",
    [
        played(blind=False), played(finished=""), played(compressed="red"), replace(played(), judged="neither"),
        Round("run-1", "auto", 0.4, "Why?", Sampling(), "original", True, (4, 3)),
    ],
    ids=["not blind", "not finished", "equal", "judged already", "not asked"],
)
def test_there_is_one_vote_a_blind_round_that_can_be_judged(now: Round) -> None:
    assert not now.open
    with pytest.raises(InputError, match="nothing to vote on"):
        now.vote("left")


def test_a_forged_choice_is_refused() -> None:
    with pytest.raises(InputError, match="choice must be one of left, neither, right"):
        played().vote("compressed")


def test_what_is_told_follows_the_round() -> None:
    assert played(finished="").told() == ""
    assert played().told() == "The same for 1 of 3 tokens, then they part (marked). Which is better?"
    assert played(compressed="red").told() == "Both wrote the same 3 tokens. Equal answers carry no vote."
    assert played(blind=False).told() == "The same for 1 of 3 tokens, then they part (marked)."
    stopped = replace(played(finished=""), stopped=True)
    assert stopped.told() == "Stopped before both were finished."
    assert 'aria-busy="true"' not in "".join(stopped.panels())
    assert "".join(stopped.panels()).count("tokens, then it was stopped") == 2
    one = replace(played(finished=""), stopped=True, original=said("red"))
    assert [text in one.panels()[0] for text in ("as many as asked for", "stopped")] == [True, False]
    assert [text in one.panels()[1] for text in ("as many as asked for", "stopped")] == [False, True]


def test_sides_are_drawn_evenly() -> None:
    """400 fair draws stay within 140 and 260 but once in 10⁹ times."""
    assert 140 < [drawn() for _ in range(400)].count("original") < 260
