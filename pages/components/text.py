"""Words and numbers on a page: everything that comes from outside is escaped, every number has its unit."""

from datetime import UTC, datetime
from html import escape as _escape
from typing import Any

from moesvd_core.planning import Recipe

NAME = "MoE-SVD Explorer"
_ROUNDED = 0.9995
"""What three digits round up to 1: as much belongs to the next unit, not 1000 to the one below."""


def escape(text: object) -> str:
    """Text for HTML, in contents and in attributes."""
    return _escape(str(text), quote=True)


def recipe_name(recipe: Recipe) -> str:
    """What was made of a model: the method, how many operations it was to save, and what was fitted when it was finished."""
    fewer = [] if recipe.flops_ratio is None else [f"{share(recipe.flops_ratio, 0)} fewer operations"]
    return ", ".join([recipe.method, *fewer, *recipe.fits])


def count(value: float) -> str:
    """A number of things with three digits: 950, 16.3 K, 16.3 M, 46.7 B."""
    for least, size, unit in ((_ROUNDED * 1e12, 1e12, "T"), (_ROUNDED * 1e9, 1e9, "B"), (_ROUNDED * 1e6, 1e6, "M"), (1e4, 1e3, "K")):
        if abs(value) >= least:
            return f"{_three(value / size)} {unit}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes as people count them: 512 B, 33.2 MB, 93.4 GB (powers of ten, as disks are sold and the hub counts)."""
    for unit_size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= _ROUNDED * unit_size:
            return f"{_three(value / unit_size)} {unit}"
    return f"{value:.0f} B"


def share(value: float, digits: int = 1) -> str:
    """A part of a whole: 0.4 is "40.0 %"."""
    return f"{100 * value:.{digits}f} %"


def duration(seconds: float) -> str:
    """Seconds as people say them: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest and minutes < 10 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def moment(iso: str) -> str:
    """A UTC time of a run ("2026-01-01T09:30:00+00:00") as "2026-01-01 09:30 UTC"; what is no time stays as it is."""
    try:
        return f"{datetime.fromisoformat(iso).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return iso


def number(value: Any, digits: int = 3) -> str:
    """A measured figure with so many significant digits; "–" for none."""
    return "–" if value is None else f"{value:,.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:,.0f}"


def sentence(text: str) -> str:
    """Text with its first letter large."""
    return text[:1].upper() + text[1:]


def notice(message: str, kind: str = "note") -> str:
    """A sentence in a box, as HTML: kind "note" explains, "warning" warns, "error" says what is wrong and what to do about it."""
    role = "alert" if kind == "error" else "note"
    return f'<p class="notice {escape(kind)}" role="{role}">{escape(message)}</p>'


def empty(title: str, advice: str) -> str:
    """What stands where there is nothing yet, as HTML: what would be here, and what to do to have it."""
    return f'<div class="empty"><p class="empty-title">{escape(title)}</p><p>{escape(advice)}</p></div>'


def _three(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"
