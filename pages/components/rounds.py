"""One question to both models: who stands on which side, what is told of it and when, and the vote that it may end in.

Kept on the server for as long as the visitor looks at it: the browser is not told whose answer is whose before the vote.
"""

import secrets
from dataclasses import asdict, dataclass, replace
from typing import Literal

from moesvd_core.errors import InputError
from moesvd_core.evaluation.generation import Answer, Sampling
from moesvd_core.runs.votes import Preference, Vote
from pages.components.answers import Decoder, Parts, divergence, panel, parted
from pages.components.text import share

Side = Literal["original", "compressed"]
CHOICES = ("left", "neither", "right")
"""What can be voted for."""


@dataclass(frozen=True)
class Round:
    """One question and both answers as far as they have come.

    Attributes:
        run: whose model was asked.
        method, ratio: of the compressed model.
        left: whose answer stands on the left.
        blind: nothing tells the sides apart before the vote.
        weights: bytes of the original's and the compressed model's weights.
        original, compressed: the answers; None before the first token.
        parts: both answers cut where they part.
        judged: the vote, once it was cast.
        stopped: the visitor did not wait for the end.
    """

    run: str
    method: str
    ratio: float
    prompt: str
    sampling: Sampling
    left: Side
    blind: bool
    weights: tuple[int, int]
    original: Answer | None = None
    compressed: Answer | None = None
    parts: tuple[Parts, Parts] | None = None
    judged: Preference | None = None
    stopped: bool = False

    def reached(self, original: Answer, compressed: Answer, tokenizer: Decoder) -> "Round":
        """The round one token later."""
        parts = parted(original, compressed, tokenizer), parted(compressed, original, tokenizer)
        return replace(self, original=original, compressed=compressed, parts=parts)

    @property
    def over(self) -> bool:
        """Whether both answers are finished."""
        return bool(self.original and self.original.finished and self.compressed and self.compressed.finished)

    @property
    def open(self) -> bool:
        """Whether a vote can be cast: a blind round that is over, not judged, with answers that differ."""
        differ = self.original is not None and self.compressed is not None and self.original.tokens != self.compressed.tokens
        return self.blind and self.over and self.judged is None and differ

    @property
    def hidden(self) -> bool:
        """Whether it is still a secret whose answer is whose."""
        return self.blind and self.judged is None

    def vote(self, choice: str) -> Vote:
        """The vote for a side.

        Raises:
            InputError: no such choice, or nothing to vote on.
        """
        if choice not in CHOICES:
            raise InputError(f"choice must be one of {', '.join(CHOICES)}, got {choice!r}")
        if not self.open or self.original is None or self.compressed is None:
            raise InputError("there is nothing to vote on: ask blind first, and wait until both answers are finished")
        sides = {"left": self.left, "right": other(self.left), "neither": "neither"}
        return Vote(
            self.method, self.ratio, sides[choice], self.left, self.prompt, self.original.text, self.compressed.text,  # type: ignore[arg-type]
            asdict(self.sampling),
        )

    def panels(self) -> tuple[str, str]:
        """The left and the right answer as HTML."""
        return self._panel("A", self.left), self._panel("B", other(self.left))

    def told(self) -> str:
        """How the answers compare, in a sentence; "" while they are being written."""
        if self.stopped and not self.over:
            return "Stopped before both were finished."
        if not self.over or self.original is None or self.compressed is None:
            return ""
        told = divergence(self.original, self.compressed)
        if self.open:
            return f"{told} Which is better?"
        if self.hidden:
            return f"{told} Equal answers carry no vote."
        if self.judged is None:
            return told
        names = {"original": "You preferred the original.", "compressed": "You preferred the compressed model."}
        return f"{names.get(self.judged, 'You saw no difference.')} {told}"

    def _panel(self, letter: str, side: Side) -> str:
        answer, index = (self.original, 0) if side == "original" else (self.compressed, 1)
        name = "Original" if side == "original" else f"Compressed by {share(self.ratio, 0)}, {self.method}"
        title = letter if self.hidden else f"{letter}: {name}" if self.blind else name
        weights = None if self.hidden else self.weights[index]
        if self.stopped and answer is not None and not answer.finished:
            answer = replace(answer, finished="stopped")
        return panel(title, self.prompt, answer, self.parts[index] if self.parts else None, weights, "" if self.hidden else side)


def other(side: Side) -> Side:
    """The other model."""
    return "compressed" if side == "original" else "original"


def drawn() -> Side:
    """Who stands on the left of a blind round."""
    return "original" if secrets.randbelow(2) else "compressed"
