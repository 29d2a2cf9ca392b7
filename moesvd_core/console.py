"""What the command line shows: progress on stderr, results on stdout, as tables for people or as JSON for machines.

Names and answers come from strangers: they are shown as text, neither as markup nor as commands to the terminal.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from moesvd_core.progress import Progress

_LOSS = {"predicted_loss": "truncation loss, nats a token (second-order)"}
LABELS: Mapping[str, Mapping[str, str]] = MappingProxyType({
    "plan": {"active_parameters": "active_parameters (experts by use)", **_LOSS},
    "dense": {"ratio": "ratio (of the factors)", "expert_ratio": "expert_ratio (of the factors)", **_LOSS},
    "factored": {"active_parameters": "active_parameters (all experts alike)"},
    "speed": {"flops_per_token": "flops_per_token (as run on a prompt)"},
})
"""What figures are called in print where their names in JSON could be taken for other figures.

Of a plan, each expert counts as often as the calibration text used it, and the loss is not brought to the size of measured ones, as the
explorer's predicted loss is; then of a plan that was written as whole matrices; of a factored checkpoint, whose files do not tell which
experts are used; and of what was timed, where a plan's operations are those of matrices with logits for every token and no scores.
"""


class ProgressBars:
    """A `Report` that draws one bar a stage, with the time left, on stderr; a line a stage where stderr is no terminal."""

    def __init__(self) -> None:
        stage, message = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[message]}"))
        columns = (stage, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), message)
        self._bars = Bars(*columns, console=Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "ProgressBars":
        if self._bars.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars.console.is_terminal:
            self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        if not self._bars.console.is_terminal:
            if progress.done == progress.total:
                print(f"{progress.stage}: {progress.done}/{progress.total} {plain(progress.message)}", file=sys.stderr, flush=True)
            return
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(progress.stage, total=progress.total, message="")
        self._bars.update(self._tasks[progress.stage], completed=progress.done, total=progress.total, message=plain(progress.message))

    def say(self, text: str) -> None:
        """Tell something beside the bars."""
        self._bars.console.print(text, markup=False)


def show_json(data: Any) -> None:
    """Print plain data as JSON."""
    print(json.dumps(data, ensure_ascii=False, indent=1))


def show_facts(title: str, facts: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> None:
    """Print names and values, one a line; `labels` has what some names are called in print."""
    table = Table(title=plain(title), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts.items():
        table.add_row(plain((labels or {}).get(name, name)), cell(value))
    _out().print(table)


def show_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table."""
    table = Table(*map(plain, columns), title=plain(title), title_justify="left")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    _out().print(table)


def cell(value: Any) -> str:
    """A value as people read it: digits grouped, six figures of a fraction at most, nothing for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
    return plain(str(value))


def plain(text: str) -> str:
    """Text that changes nothing on a terminal: control characters other than the end of a line and the tab are spelled out."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1] for letter in text)


def _out() -> Console:
    """Standard output; wide when it is a pipe, so that nothing is cut off."""
    return Console(markup=False) if sys.stdout.isatty() else Console(width=160, no_color=True, markup=False)
