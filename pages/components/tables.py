"""Tables as HTML: escaped, figures aligned on their right in tabular digits, scrolling sideways on small screens, with CSV download.

Show them in a plain `gr.HTML()`, those with buttons in one of `pressed_in`. The download is made in the browser from the table itself: no
file is written on the server.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from pages.components.assets import mount
from pages.components.text import escape


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: of the row's value, which is also what the CSV holds.
        title: above the column, with the unit.
        show: value -> text; the text is escaped afterwards.
        number: whether to align it on the right.
        link: row -> address that the cell leads to, or None.
        press: row -> what the row's button does, for who only hears it, "" for no button; None: the cell shows its value. The button says
            the column's title; pressed, it has the component that `pressed_in` made tell the row's value by `.select`.
    """

    key: str
    title: str
    show: Callable[[Any], str] = str
    number: bool = False
    link: Callable[[Mapping[str, Any]], str] | None = None
    press: Callable[[Mapping[str, Any]], str] | None = None


def pressed_in(elem_id: str) -> gr.HTML:
    """The component of a table whose rows have buttons; its `.select` says the value of the one that was pressed (`SelectData.value`)."""
    return gr.HTML("", elem_id=elem_id, js_on_load=mount("presses"))


def table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    *,
    caption: str,
    name: str,
    chosen: Callable[[Mapping[str, Any]], bool] | None = None,
    height: int | None = None,
) -> str:
    """A table with a button that downloads it.

    Args:
        caption: what the table holds; shown above it.
        name: of the CSV file, without ending.
        chosen: tells which rows are lit.
        height: pixels after which it scrolls; None: as high as it is.
    """
    head = "".join(f'<th scope="col"{_kind(column)}>{_title(column)}</th>' for column in columns)
    body = "".join(
        f"<tr{' aria-selected=true class=chosen' if chosen and chosen(row) else ''}>{''.join(_cell(row, each) for each in columns)}</tr>"
        for row in rows
    )
    style = f' style="max-height:{height}px"' if height else ""
    return (
        f'<div class="table-box"><div class="table-head"><p class="figure-title">{escape(caption)}</p>'
        f'<button type="button" class="quiet" data-csv="{escape(name)}" aria-label="Download as CSV: {escape(caption)}">CSV</button></div>'
        f'<div class="table-scroll" tabindex="0" role="region" aria-label="{escape(caption)}"{style}>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def facts(pairs: Sequence[tuple[str, str, str]], label: str) -> str:
    """Figures with their names: (name, value, unit or remark), laid out as a grid that wraps."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{f'<span>{escape(remark)}</span>' if remark else ''}</dd></div>"
        for name, value, remark in pairs
    )
    return f'<dl class="facts" aria-label="{escape(label)}">{cells}</dl>'


def _kind(column: Column) -> str:
    return ' class="press"' if column.press else ' class="number"' if column.number else ""


def _title(column: Column) -> str:
    """Buttons say themselves what they do; who goes through a table by ear hears it of the column too."""
    return f'<span class="unseen">{escape(column.title)}</span>' if column.press else escape(column.title)


def _cell(row: Mapping[str, Any], column: Column) -> str:
    value = row.get(column.key)
    if column.press:
        told, said = column.press(row), escape(column.title)
        button = f'<button type="button" class="quiet" data-row="{escape(value)}" aria-label="{escape(told)}">{said}</button>'
        return f"<td{_kind(column)}>{button if told else ''}</td>"
    shown = "–" if value is None else escape(column.show(value))
    inner = f'<a href="{escape(column.link(row))}">{shown}</a>' if column.link else shown
    return f'<td{_kind(column)} data-value="{escape("" if value is None else value)}">{inner}</td>'
