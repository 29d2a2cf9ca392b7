"""A benchmark's result: one table that is printed for people and written as CSV or JSON for machines."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesvd_core.atomic import write_text
from moesvd_core.errors import InputError

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows under named columns, and what has to be known to read them.

    Attributes:
        title: what was compared.
        columns: names with units, in order.
        rows: one cell a column; None where a figure does not apply.
        notes: what it was measured on, and conclusions.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row must have {len(self.columns)} cells, got {len(row)}: {row}")

    @classmethod
    def of(cls, title: str, records: Sequence[Mapping[str, Cell]], notes: Sequence[str] = ()) -> "Table":
        """A table of records that share their keys."""
        columns = tuple(records[0]) if records else ()
        return cls(title, columns, tuple(tuple(record[column] for column in columns) for record in records), tuple(notes))

    def text(self) -> str:
        """Aligned columns for a terminal: names on the left, numbers on the right."""
        cells = [self.columns, *(tuple(_shown(cell) for cell in row) for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        named = [all(isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))]
        adjust = [str.ljust if is_name else str.rjust for is_name in named]
        lines = ["  ".join(put(cell, width) for put, cell, width in zip(adjust, row, widths, strict=True)).rstrip() for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join((self.title, "", *lines, "", *self.notes)).rstrip() + "\n"

    def json(self) -> str:
        """Title, notes, and the rows as objects."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return json.dumps({"title": self.title, "rows": rows, "notes": list(self.notes)}, indent=2)

    def csv(self) -> str:
        """The rows under a line of column names."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return buffer.getvalue()

    def write(self, path: Path) -> None:
        """Write `.csv` or `.json`, whole or not at all.

        Raises:
            InputError: another suffix.
        """
        forms = {".csv": self.csv, ".json": self.json}
        if path.suffix not in forms:
            raise InputError(f"a table is written to a .csv or .json file, got {path.name}")
        write_text(path, forms[path.suffix]())


def _shown(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else cell
