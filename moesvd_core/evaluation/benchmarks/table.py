"""A benchmark's figures: a table that is printed for people, with the tables behind it."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows under named columns, and what has to be known to read them.

    Attributes:
        title: what was compared.
        columns: names with units, in order.
        rows: one cell a column; None where a figure does not apply.
        notes: what it was measured on, and conclusions.
        details: tables that this one sums up, by name; they are written and not printed.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    details: Mapping[str, "Table"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row must have {len(self.columns)} cells, got {len(row)}: {row}")

    @classmethod
    def of(
        cls, title: str, records: Sequence[Mapping[str, Cell]], notes: Sequence[str] = (), details: Mapping[str, "Table"] | None = None
    ) -> "Table":
        """A table of records that share their keys."""
        columns = tuple(records[0]) if records else ()
        rows = tuple(tuple(record[column] for column in columns) for record in records)
        return cls(title, columns, rows, tuple(notes), details or {})

    @property
    def records(self) -> list[dict[str, Cell]]:
        """The rows under their column names."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def named(self, position: int) -> bool:
        """Whether a column holds names and no numbers."""
        return all(isinstance(row[position], str) for row in self.rows)

    def text(self) -> str:
        """Aligned columns for a terminal: names on the left, numbers on the right."""
        cells = [self.columns, *(tuple(shown(cell) for cell in row) for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        adjust = [str.ljust if self.named(i) else str.rjust for i in range(len(self.columns))]
        lines = ["  ".join(put(cell, width) for put, cell, width in zip(adjust, row, widths, strict=True)).rstrip() for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join((self.title, "", *lines, "", *self.notes)).rstrip() + "\n"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: title, the rows as objects, notes, and the tables behind."""
        details = {name: table.as_dict() for name, table in self.details.items()}
        return {"title": self.title, "rows": self.records, "notes": list(self.notes), "details": details}

    def csv(self) -> str:
        """The rows under a line of column names."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return buffer.getvalue()


def shown(cell: Cell) -> str:
    """A cell for a person: four digits of a fraction, – for what is not known."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else cell
