"""Blind votes counted, with what they show, as HTML."""

from collections.abc import Sequence

from moesvd_core.runs.votes import Tally, Vote, tally
from pages.components.text import empty, escape, share


def votes_html(votes: Sequence[Vote]) -> str:
    """The tally of every method and ratio that was judged; what was asked of this run alone."""
    if not votes:
        return empty("No votes yet", "Ask blind, judge without knowing which answer is whose, and the tally appears here.")
    pairs = sorted({(vote.method, vote.ratio) for vote in votes})
    rows = "".join(
        _row(f"{method} {share(ratio, 0)}", tally(vote for vote in votes if (vote.method, vote.ratio) == (method, ratio)))
        for method, ratio in pairs
    )
    whole = tally(votes)
    head = "".join(
        f'<th scope="col"{kind}>{name}</th>'
        for name, kind in (
            ("Compressed by", ""), ("It won", " class=number"), ("Original won", " class=number"), ("No difference", " class=number"),
            ("Compressed preferred, 95 % interval", ""),
        )
    )
    return (
        f'<div class="table-box"><div class="table-head"><p class="figure-title">{escape(verdict(whole))}</p>'
        '<button type="button" class="quiet" data-csv="votes" aria-label="Download the votes as CSV">CSV</button></div>'
        f'<div class="table-scroll" tabindex="0" role="region" aria-label="Blind votes"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def verdict(counted: Tally) -> str:
    """What a tally shows, in one sentence."""
    low, high = counted.interval
    if not counted.decided:
        return f"{_times(counted.neither)} no difference was seen."
    told = f"Compressed preferred in {counted.compressed} of {counted.decided} decided votes"
    if low > 0.5:
        return f"{told}: more often than chance."
    if high < 0.5:
        return f"{told}: less often than chance."
    return f"{told}: no preference is shown yet."


def _row(name: str, counted: Tally) -> str:
    numbers = "".join(
        f'<td class="number" data-value="{value}">{value}</td>' for value in (counted.compressed, counted.original, counted.neither)
    )
    low, high = counted.interval
    if counted.share is None:
        bar, told = "", "–"
    else:
        bar = (
            f'<span class="interval" aria-hidden="true"><span style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></span>'
            f'<i style="left:{100 * counted.share:.1f}%"></i></span>'
        )
        told = f"{share(counted.share, 0)} ({100 * low:.0f} to {share(high, 0)})"
    return f'<tr><td>{escape(name)}</td>{numbers}<td data-value="{escape(told)}">{bar}{escape(told)}</td></tr>'


def _times(number: int) -> str:
    return "Once" if number == 1 else f"{number} times"
