"""A benchmark as one HTML file that needs nothing else: tables, figures, and plotly's own script, written into the page."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path
from string import Template

from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks.figures import Figure
from moesvd_core.evaluation.benchmarks.table import Table, shown
from moesvd_core.marks import METHOD_MARKS

_SCRIPT = "plotly/package_data/plotly.min.js"


def page(name: str, table: Table, figures: Sequence[Figure], facts: Mapping[str, str]) -> str:
    """The page of one benchmark.

    Raises:
        InputError: plotly is not installed.
    """
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    drawings = json.dumps([{"data": figure.data, "layout": figure.layout} for figure in figures], separators=(",", ":"))
    return template.substitute(
        title=escape(table.title),
        notes="".join(f"<li>{escape(note)}</li>" for note in table.notes),
        figures="".join(_figure(place, figure) for place, figure in enumerate(figures)),
        table=_table(table),
        details="".join(f"<details><summary>{escape(each.title)}</summary>{_table(each)}</details>" for each in table.details.values()),
        facts="".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in {"benchmark": name, **facts}.items()),
        plotly=_plotly(),
        drawings=drawings.replace("</", "<\\/"),  # no text of a figure may end the element that holds it
    )


def _plotly() -> str:
    """Plotly's script for browsers, read from its package: the engine draws nothing itself, and does not import it.

    Raises:
        InputError: the package is not there, or without the script.
    """
    try:
        return Path(str(distribution("plotly").locate_file(_SCRIPT))).read_text(encoding="utf-8")
    except (PackageNotFoundError, OSError) as error:
        raise InputError(f"the page carries plotly's script, which cannot be read ({error}): pip install plotly") from error


def _figure(place: int, figure: Figure) -> str:
    title = escape(figure.title)
    box = f'<div class="drawing" id="drawing-{place}" role="img" aria-label="{title}" style="height:{figure.height}px"></div>'
    return f"<figure><h2>{title}</h2>{box}<figcaption>{escape(figure.caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    kinds = [' class="name"' if table.named(place) else "" for place in range(len(table.columns))]
    head = "".join(f'<th scope="col"{kind}>{escape(column)}</th>' for kind, column in zip(kinds, table.columns, strict=True))
    rows = "".join(
        f"<tr><td{kinds[0]}>{_mark(row[0])}{escape(shown(row[0]))}</td>"
        + "".join(f"<td{kind}>{escape(shown(cell))}</td>" for kind, cell in zip(kinds[1:], row[1:], strict=True)) + "</tr>"
        for row in table.rows
    )
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
    return f"{box}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _mark(cell: object) -> str:
    """A dot in the method's colour before its name."""
    look = METHOD_MARKS.get(cell) if isinstance(cell, str) else None
    return f'<i class="mark" style="background:{look.color}"></i>' if look else ""
