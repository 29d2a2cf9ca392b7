"""A text whose tokens are coloured by what compression did to their probability, as HTML."""

from collections.abc import Sequence
from math import exp, log

from moesvd_core.evaluation.text_scores import TokenScore
from pages.components import tables
from pages.components.text import escape, number

FULL = 1.0
"""Change in nats at which the colour is as strong as it gets: the probability 2.7 times as large or as small."""
STEPS = 8
"""Shades to each side; few enough that equal shades mean equal change."""
MARKED = log(2)
"""Loss in nats from which a token is underlined as well, for whoever does not see the colours: the probability halved."""


def colored(scores: Sequence[TokenScore], first: str) -> str:
    """The text, token by token.

    Args:
        first: what stands before the first scored token.
    """
    tokens = "".join(_token(score) for score in scores)
    return f'<p class="scored" lang="und">{escape(first)}{tokens}</p>{_legend()}'


def summary(scores: Sequence[TokenScore]) -> str:
    """What the change comes to over the whole text."""
    original = -sum(score.original_logp for score in scores) / len(scores)
    compressed = -sum(score.logp for score in scores) / len(scores)
    lost = sum(score.change < 0 for score in scores)
    worst = min(scores, key=lambda score: score.change)
    pairs = [
        ("Perplexity, original", number(exp(original), 4), f"of {len(scores)} tokens"),
        ("Perplexity, compressed", number(exp(compressed), 4), f"{_signed(compressed - original)} nats a token"),
        ("Less probable", f"{lost} of {len(scores)}", "tokens"),
        ("Largest loss", _signed(worst.change), f"nats, at “{_visible(worst.text)}”"),
    ]
    return tables.facts(pairs, "What compression changed on this text")


def table(scores: Sequence[TokenScore]) -> str:
    """Every token with its figures, as they follow in the text."""
    columns = [
        tables.Column("position", "Token", number=True),
        tables.Column("text", "Reads", _visible),
        tables.Column("original", "Original, probability", _percent, number=True),
        tables.Column("compressed", "Compressed, probability", _percent, number=True),
        tables.Column("change", "Change, nats", _signed, number=True),
    ]
    rows = [
        {"position": index, "text": score.text, "original": exp(score.original_logp), "compressed": exp(score.logp), "change": score.change}
        for index, score in enumerate(scores, start=2)
    ]
    return tables.table(rows, columns, caption="Tokens", name="tokens", height=320)


def _token(score: TokenScore) -> str:
    step = round(STEPS * min(1.0, abs(score.change) / FULL))
    side = "less" if score.change < 0 else "more"
    kind = f"{side} s{step}{' marked' if score.change <= -MARKED else ''}" if step else ""
    told = f"{_percent(exp(score.original_logp))} → {_percent(exp(score.logp))}, {_signed(score.change)} nats"
    return f'<span class="{kind}" title="{escape(told)}">{escape(score.text)}</span>'


def _legend() -> str:
    shades = [("less", step) for step in range(STEPS, 0, -1)] + [("", 0)] + [("more", step) for step in range(1, STEPS + 1)]
    swatches = "".join(f'<span class="{f"{side} s{step}" if step else ""}"></span>' for side, step in shades)
    return (
        f'<div class="scored-legend"><span>−{FULL:g} nats, less probable</span><span class="swatches" aria-hidden="true">{swatches}</span>'
        f"<span>more probable, +{FULL:g} nats</span><span>Underlined: half as probable, or less.</span></div>"
    )


def _visible(text: str) -> str:
    """A token's text with its spaces and line ends to be seen."""
    return text.replace("\n", "⏎").replace(" ", "␣") or "(nothing)"


def _percent(probability: float) -> str:
    return f"{100 * probability:.3g} %"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
