"""What people preferred when they did not know which answer was whose, and how much that says about compression.

Votes are kept in the run, one JSON object a line, only ever appended: the tally can be counted again from what was really asked.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import sqrt
from statistics import NormalDist
from typing import Any, Literal, get_args

from moesvd_core import atomic
from moesvd_core.errors import InputError
from moesvd_core.runs.folder import RunFolder

Preference = Literal["original", "compressed", "neither"]
VOTES = "votes.jsonl"
LONGEST = 20_000
"""Characters kept of a prompt or an answer."""


@dataclass(frozen=True)
class Vote:
    """One comparison that was judged blind.

    Attributes:
        method, ratio: of the compressed model, as asked for.
        preferred: whose answer was better.
        left: whose answer stood on the left.
        prompt, original, compressed: what was asked, and both answers.
        sampling: how the answers were chosen (fields of `Sampling`).
        time: seconds since 1970.

    Raises:
        InputError: a preference or a side that there is not, or a ratio out of [0, 1).
    """

    method: str
    ratio: float
    preferred: Preference
    left: Literal["original", "compressed"]
    prompt: str
    original: str
    compressed: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        if self.preferred not in get_args(Preference):
            raise InputError(f"preferred must be one of {', '.join(get_args(Preference))}, got {self.preferred!r}")
        if self.left not in ("original", "compressed"):
            raise InputError(f"left must be original or compressed, got {self.left!r}")
        if not 0 <= self.ratio < 1:
            raise InputError(f"ratio must be in [0, 1), got {self.ratio}")


@dataclass(frozen=True)
class Tally:
    """Votes counted.

    Attributes:
        original, compressed, neither: how often each was preferred.
    """

    original: int
    compressed: int
    neither: int

    @property
    def decided(self) -> int:
        """Votes that preferred one of the two."""
        return self.original + self.compressed

    @property
    def share(self) -> float | None:
        """Part of the decided votes that preferred the compressed model; None before the first."""
        return self.compressed / self.decided if self.decided else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `share`."""
        return wilson(self.compressed, self.decided)


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion: honest for few trials and for proportions of 0 and 1, where p ± z·σ is not.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927). No trials say nothing: (0, 1).

    Raises:
        InputError: counts that cannot be, or a confidence out of (0, 1).
    """
    if not 0 <= successes <= trials:
        raise InputError(f"successes must be in [0, {trials}], the number of trials, got {successes}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be in (0, 1), got {confidence}")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, shrink = successes / trials, 1 + z * z / trials
    middle = (p + z * z / (2 * trials)) / shrink
    half = z / shrink * sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def add_vote(run: RunFolder, vote: Vote) -> None:
    """Write a vote into its run; texts beyond `LONGEST` characters are cut.

    Raises:
        OSError: it could not be written; the earlier votes are as they were.
    """
    texts = {name: getattr(vote, name)[:LONGEST] for name in ("prompt", "original", "compressed")}
    atomic.append_json(run.path / VOTES, asdict(vote) | texts)


def read_votes(run: RunFolder) -> list[Vote]:
    """All votes of a run, oldest first; a line that is no vote is passed over."""
    return [vote for line in atomic.read_json_lines(run.path / VOTES)[0] if (vote := _vote(line)) is not None]


def tally(votes: Iterable[Vote]) -> Tally:
    """Count votes."""
    preferred = [vote.preferred for vote in votes]
    return Tally(*(preferred.count(name) for name in get_args(Preference)))


def _vote(line: Mapping[str, Any]) -> Vote | None:
    try:
        return Vote(**{item.name: line[item.name] for item in fields(Vote)})
    except (KeyError, TypeError, InputError):
        return None
