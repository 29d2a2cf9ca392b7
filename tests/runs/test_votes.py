"""Votes survive as they were cast, and the interval is Wilson's."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import new_run

from moesvd_core.errors import InputError
from moesvd_core.runs.votes import LONGEST, VOTES, Tally, Vote, add_vote, read_votes, tally, wilson


def vote(preferred: Any = "compressed", **changes: Any) -> Vote:
    given = {"method": "auto", "ratio": 0.4, "left": "original", "prompt": "<b>Why?</b>", "original": "a", "compressed": "b"}
    return Vote(preferred=preferred, **{**given, **changes})


def test_votes_come_back_as_they_were_cast(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert read_votes(run) == []
    cast = [vote("original", sampling={"seed": 3}), vote("neither", left="compressed"), vote("compressed", prompt="é\n")]
    for each in cast:
        add_vote(run, each)
    assert read_votes(run) == cast
    assert tally(read_votes(run)) == Tally(original=1, compressed=1, neither=1)


def test_a_torn_or_foreign_line_costs_that_line_only(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    add_vote(run, vote())
    with (run.path / VOTES).open("ab") as file:
        file.write(b'{"preferred": "compressed"}\n[1]\n{"method": "au')
    add_vote(run, vote("original"))
    assert [each.preferred for each in read_votes(run)] == ["compressed", "original"]


def test_a_forged_preference_is_no_vote(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    add_vote(run, vote())
    path = run.path / VOTES
    path.write_bytes(path.read_bytes().replace(b'"preferred": "compressed"', b'"preferred": "everything"'))
    assert read_votes(run) == []


def test_long_texts_are_cut(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    add_vote(run, vote(prompt="x" * (LONGEST + 1)))
    assert len(read_votes(run)[0].prompt) == LONGEST


@pytest.mark.parametrize(("name", "value"), [("preferred", "left"), ("left", "neither"), ("ratio", 1.0), ("ratio", float("nan"))])
def test_refuses_votes_that_cannot_be(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name):
        vote(**{name: value})


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (1, 10, 0.0179, 0.4042), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_against_published_values(successes: int, trials: int, low: float, high: float) -> None:
    """81 of 263: R. G. Newcombe, Stat. Med. 17 (1998), Table I, method 3; the others by the formula's closed form."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


@given(trials=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_solves_the_score_equation(trials: int, share: float) -> None:
    """Each bound is a proportion from which the observed one is exactly z standard errors away."""
    successes = round(share * trials)
    observed = successes / trials
    for bound in wilson(successes, trials):
        distance = (observed - bound) ** 2
        assert distance == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / trials, abs=1e-9)


def test_no_votes_say_nothing() -> None:
    empty = tally([])
    assert (empty.share, empty.interval) == (None, (0.0, 1.0))


@pytest.mark.parametrize(("successes", "trials", "confidence"), [(-1, 4, 0.95), (5, 4, 0.95), (1, 4, 1.0)])
def test_wilson_refuses_counts_that_cannot_be(successes: int, trials: int, confidence: float) -> None:
    with pytest.raises(InputError, match="must be in"):
        wilson(successes, trials, confidence)
