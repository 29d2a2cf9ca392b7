"""Two answers beside each other: where they part, and how fast each came, as HTML."""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

from moesvd_core.evaluation.generation import Answer, first_divergence
from pages.components import tables
from pages.components.text import escape, number, size


class Decoder(Protocol):
    """As much of a tokenizer as is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any:
        """The text of tokens."""


@dataclass(frozen=True)
class Parts:
    """An answer cut where it parts from the other: what both have, the first token of its own, what follows."""

    shared: str
    first: str
    rest: str


def parted(answer: Answer, other: Answer, tokenizer: Decoder) -> Parts:
    """Cut an answer where it parts from another; one that is not finished parts only where both have a token."""
    at = first_divergence(answer.tokens, other.tokens)
    unfinished = not (answer.finished and other.finished)
    if at is None or (unfinished and at == min(len(answer.tokens), len(other.tokens))):
        return Parts(answer.text, "", "")
    shared, upto = (_decoded(tokenizer, answer.tokens[:end]) for end in (at, at + 1))
    if not answer.text.startswith(upto):  # some decoders change earlier letters when later tokens come
        alike = (mine == theirs for mine, theirs in zip(answer.text, other.text, strict=False))
        shared = answer.text[: sum(1 for _ in takewhile(bool, alike))]
        return Parts(shared, answer.text[len(shared):], "")
    return Parts(shared, upto[len(shared):], answer.text[len(upto):])


def divergence(left: Answer, right: Answer) -> str:
    """Where two finished answers part, in words."""
    at = first_divergence(left.tokens, right.tokens)
    if at is None:
        return f"Both wrote the same {len(left.tokens)} tokens."
    longest = max(len(left.tokens), len(right.tokens))
    return "They part at the first token." if at == 0 else f"The same for {at} of {longest} tokens, then they part (marked)."


def panel(
    title: str, prompt: str = "", answer: Answer | None = None, parts: Parts | None = None, weights: int | None = None, kind: str = ""
) -> str:
    """One answer.

    Args:
        title: whose answer it is, or "A" while that is a secret.
        answer: None: nothing was asked yet, or it is not this model's turn.
        weights: bytes of the model's weights; None: speed and memory stay a secret too.
        kind: "original" or "compressed", "" while that is a secret.
    """
    written = ""
    if parts is not None:
        word = parts.first.lstrip()
        own = f'{parts.first[: -len(word)]}<mark title="here the answers part">{escape(word)}</mark>' if word else escape(parts.first)
        written = f"{escape(parts.shared)}{own}{escape(parts.rest)}"
    elif not prompt:
        written = '<span class="asked">Press “Ask both”: the answer is written here, token by token.</span>'
    cursor = '<span class="cursor" aria-hidden="true"></span>' if answer is not None and not answer.finished else ""
    busy = "true" if cursor else "false"
    label = f"Answer of {title}"
    return (
        f'<section class="answer {escape(kind)}" aria-label="{escape(label)}" aria-busy="{busy}"><h2>{escape(title)}</h2>'
        f'<div class="answer-text" tabindex="0" role="region" aria-label="Text: {escape(label)}">'
        f"<p><span class=asked>{escape(prompt)}</span>{written}{cursor}</p></div>"
        f"{_figures(label, answer, weights)}</section>"
    )


def _figures(label: str, answer: Answer | None, weights: int | None) -> str:
    rate = None if answer is None or weights is None else answer.tokens_per_second
    first = None if answer is None or weights is None else 1000 * answer.first_token_seconds
    pairs = [
        ("Speed", number(rate), "tokens a second"),
        ("First token", number(first), "ms after the question"),
        ("Length", "–" if answer is None else str(len(answer.tokens)), _ended(answer)),
        ("Weights", "–" if weights is None else size(weights), "in memory; files may be smaller"),
    ]
    return tables.facts(pairs, f"Figures: {label}")


def _ended(answer: Answer | None) -> str:
    words = {
        "": "tokens so far", "end": "tokens, ended by itself", "length": "tokens, as many as asked for",
        "context": "tokens, as many as fit the model's context", "stopped": "tokens, then it was stopped",
    }
    return "tokens" if answer is None else words[answer.finished]


def _decoded(tokenizer: Decoder, tokens: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).rstrip("�")
