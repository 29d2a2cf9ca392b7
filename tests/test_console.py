"""What people read on the command line."""

from io import StringIO

import pytest
from rich.console import Console

from moesvd_core.console import LABELS, ProgressBars, cell, plain, show_facts, show_rows
from moesvd_core.progress import Progress


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (True, "yes"), (12345, "12,345"), (0.123456789, "0.123457"), (11591680.5, "11,591,680"), ("word", "word")],
)
def test_values_as_people_read_them(value: object, text: str) -> None:
    assert cell(value) == text


def test_a_figure_can_be_called_otherwise_in_print(capsys: pytest.CaptureFixture[str]) -> None:
    show_facts("title", {"predicted_loss": 0.5, "ratio": 0.25}, LABELS["plan"])
    printed = capsys.readouterr().out
    assert "truncation loss, nats a token (second-order)" in printed and "predicted" not in printed
    assert "ratio" in printed


def test_a_table_in_a_pipe_is_not_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    show_rows("title", ["a", "b"], [["x" * 60, "y" * 60]])
    assert "y" * 60 in capsys.readouterr().out


def test_without_a_terminal_a_stage_is_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars() as bars:
        bars(Progress("calibrate", 1, 2, "layer 0"))
        bars(Progress("calibrate", 2, 2, "layer 1"))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["calibrate: 2/2 layer 1"]


HOSTILE = "[/x] [red]a[/] \x1b[2J\x07 <b> \u202e"


def test_names_of_strangers_are_neither_markup_nor_commands(capsys: pytest.CaptureFixture[str]) -> None:
    show_facts(HOSTILE, {HOSTILE: HOSTILE})
    show_rows(HOSTILE, [HOSTILE], [[HOSTILE]])
    with ProgressBars() as bars:
        bars(Progress("inspect", 1, 1, HOSTILE))
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert "[/x] [red]a[/] \\x1b[2J\\x07 <b> \\u202e" in text
        assert not set(text) & {"\x1b", "\x07", "\u202e"}


def test_bars_on_a_terminal_show_names_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = StringIO()
    monkeypatch.setattr("moesvd_core.console.Console", lambda **_: Console(file=screen, force_terminal=True, width=200, color_system=None))
    with ProgressBars() as bars:
        bars(Progress("[bold]inspect", 0, 1, HOSTILE))
    assert "[bold]inspect" in screen.getvalue() and "[/x] [red]a[/] \\x1b[2J" in screen.getvalue()


@pytest.mark.parametrize("text", ["", "two\nlines\tand a tab", "ünïcödé …", "中文"])
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert plain(text) == text
