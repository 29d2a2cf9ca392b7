"""What a benchmark leaves: its tables with the machine and the command, for a terminal, as CSV, as JSON and as a page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesvd_core.atomic import write_text
from moesvd_core.evaluation.benchmarks.figures import Figure
from moesvd_core.evaluation.benchmarks.page import page
from moesvd_core.evaluation.benchmarks.table import Table


@dataclass(frozen=True)
class Result:
    """One benchmark's outcome.

    Attributes:
        name: of the benchmark; files are named after it.
        table: its figures.
        figures: drawings of them.
        facts: command, time, machine and versions.
    """

    name: str
    table: Table
    figures: Sequence[Figure]
    facts: Mapping[str, str]

    def text(self) -> str:
        """The table for a terminal, and where it was measured."""
        return self.table.text() + "\n" + "; ".join(f"{name}: {value}" for name, value in self.facts.items()) + "\n"

    def json(self) -> str:
        """Everything but the drawings.

        Raises:
            ValueError: a cell is NaN or infinite, which JSON has no word for; what is not known is None.
        """
        return json.dumps({"benchmark": self.name, **self.table.as_dict(), "facts": dict(self.facts)}, indent=2, allow_nan=False)

    def write(self, folder: Path) -> None:
        """Write `NAME.csv`, `NAME.json`, `NAME.html`, and a CSV for each table behind the first.

        Raises:
            InputError: plotly, whose script the page carries, is not installed; all else is written by then.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{self.name}.json", self.json())
        for name, table in {"": self.table, **{f"-{name}": table for name, table in self.table.details.items()}}.items():
            write_text(folder / f"{self.name}{name}.csv", table.csv())
        write_text(folder / f"{self.name}.html", page(self.name, self.table, self.figures, self.facts))
