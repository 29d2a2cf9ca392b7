"""The frame of a page: header, address, one clock, and views that are drawn from the state.

    def build(context: Context) -> None:
        with Page(context, "Ratio", "How small the model may become, and what that costs.") as page:
            plot = figure.box("Expert map", height=480)
            page.view(lambda state: map_of(context, state), [plot], fields=("run", "method"))
            plot.select(page.changes(pick), page.state, page.state, **POINT)  # pick(event, state) returns another ViewState

There is one flow: an event returns a new `ViewState`; header, address and every view that depends on a changed field follow. A view is
a function of the state, and of controls of its page that are not worth an address. While the run works, one event every few seconds
keeps header and `ticks` up to date, and a slower one does while other runs work, or always on a page that `watches` them; when a job has
ended, all views are drawn again.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.context import Context as Drawing

from moesvd_core.errors import RunError
from moesvd_core.runs.client import RunStatus
from pages.components import header
from pages.components.context import Context
from pages.components.handler import explained, warn
from pages.components.reach import beyond_reach, within_reach
from pages.components.session import ViewState, read_query
from pages.components.visitor import remembered

TICK_SECONDS = 2.0
SLOW_SECONDS = 10.0
"""Between two looks at what others do: another tab, another login, the command line."""
QUIET: Mapping[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Of an event that is the page's own, and shows itself by what it changes."""
CHOICE: Mapping[str, Any] = {**QUIET, "trigger_mode": "always_last"}
"""Of a field in which is chosen what is shown: the last choice counts. By Gradio's default it is lost while another is on its way."""
POINT: Mapping[str, Any] = {**CHOICE, "trigger_mode": "multiple"}
"""Likewise of an event that brings along what was chosen (`.select`, `.release`): the last of several would bring the first one's."""
FIELDS = ("run", "layer", "method", "ratio", "flops_ratio")
"""Of `ViewState`: what a view may depend on."""
Draw = Callable[..., Any]
"""state, values of the view's controls -> the value of one output, or a tuple with one value an output."""
DrawStatus = Callable[[ViewState, RunStatus | None], Any]


@dataclass(frozen=True)
class _View:
    draw: Callable[..., Any]
    outputs: Sequence[Any]
    fields: tuple[str, ...]
    controls: Sequence[Any] = ()
    reads: Sequence[Any] = ()

    def values(self, *arguments: Any) -> list[Any]:
        """One value an output; what cannot be drawn stays as it is, with a word to the person."""
        made = explained(self.draw)(*arguments)
        if len(self.outputs) == 1:
            return [made]
        return list(made) if isinstance(made, tuple | list) else [gr.skip() for _ in self.outputs]


@dataclass(frozen=True)
class _Shown:
    """What the browser shows now: the state, and how many of the run's jobs had ended."""

    state: ViewState | None = None
    ended: int = -1


class Page:
    """Use as a context manager inside one route of the app: events are wired when the block ends.

    Attributes:
        context: what every page is given.
        state: component with the `ViewState`; events take it as input and return it changed.
        wake: the clock of the run's own work; an event that submits work without changing the state returns `gr.Timer(active=True)` to it.
    """

    def __init__(self, context: Context, title: str, purpose: str) -> None:
        self.context = context
        self._title, self._purpose = title, purpose
        self.state = gr.State(ViewState())
        self._shown = gr.State(_Shown())
        self._ended = gr.State(-1)
        self._head = header.box(header.draw(context, title, purpose, ViewState(), None))
        self.wake = gr.Timer(TICK_SECONDS, active=False)
        self._glance = gr.Timer(SLOW_SECONDS, active=False)
        self._views: list[_View] = []
        self._ticks: list[_View] = []
        self._watches = False

    def view(
        self, draw: Draw, outputs: Sequence[Any], fields: tuple[str, ...] = FIELDS, controls: Sequence[Any] = (), reads: Sequence[Any] = (),
    ) -> None:
        """Draw `outputs` from the state: when the page opens, when one of `fields` changes, and when a job of the run has ended.

        Args:
            controls: components of this page whose values `draw` takes after the state; a person who changes one redraws the view.
            reads: more of them, whose values `draw` takes last, and whose changes redraw nothing.
        """
        self._views.append(_View(draw, outputs, fields, controls, reads))
        if controls:
            gr.on(
                [control.input for control in controls], explained(draw), [self.state, *controls, *reads], list(outputs),
                **CHOICE,
            )

    def ticks(self, draw: DrawStatus, outputs: Sequence[Any]) -> None:
        """Draw `outputs` from the state and the run's status: as `view`, and every two seconds while the run works."""
        self._ticks.append(_View(draw, outputs, ("run",)))

    def watches(self, draw: DrawStatus, outputs: Sequence[Any]) -> None:
        """As `ticks`, for what other runs do too: the clock goes on slowly while this run is idle."""
        self.ticks(draw, outputs)
        self._watches = True

    def changes(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A handler that shows its errors in the page. Every handler of a page is wrapped in it."""
        return explained(function)

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        followers = [output for view in (*self._ticks, *self._views) for output in view.outputs]
        outputs = [self._shown, self._ended, self._head, self.wake, self._glance, *followers]
        blocks = Drawing.root_block
        if blocks is None:
            raise RuntimeError("a Page is laid out inside gr.Blocks() or one of its routes")
        controls = [control for view in self._views for control in (*view.controls, *view.reads)]
        blocks.load(self._open, controls, [self.state, *outputs], **QUIET)
        gr.on(
            [self.state.change, self._ended.change], self._follow, [self.state, self._shown, *controls], outputs,
            **CHOICE,
        )
        ticking = [output for view in self._ticks for output in view.outputs]
        gr.on(
            [self.wake.tick, self._glance.tick], self._tick, [self.state, self._shown],
            [self._ended, self._head, self.wake, self._glance, *ticking], **QUIET,
        )

    def _open(self, request: gr.Request, *controls: Any) -> list[Any]:
        """The page as its address asks for it."""
        state, problems = read_query(dict(request.query_params))
        try:
            layers = self.context.layers(state)
            if state.layer is not None and layers and state.layer not in layers:
                known = f"[{min(layers)}, {max(layers)}], with experts"
                problems.append(f"The address was not understood: layer must be one of this model's in {known}, got {state.layer}")
                state = state.but(layer=None)
        except RunError as error:
            problems.append(f"{error}; another one is shown")
            state = state.but(run="")
        if not state.run:
            state = state.but(run=self.context.first_run())
        with suppress(RunError):  # a damaged table of plans is told of where it would be drawn
            run = self.context.open(state)
            if run is not None:
                problems += beyond_reach(run, state)
                state = within_reach(run, state)
        for problem in problems:
            warn(problem)
        return [state, *self._follow(state, _Shown(), *controls)]

    def _follow(self, state: ViewState, shown: _Shown, *controls: Any) -> list[Any]:
        """Everything that depends on the state, where it changed."""
        state = remembered(state)
        asked = state.run
        state, status, head, problem = self._look(state)
        if problem and (shown.state is None or shown.state.run == asked):
            warn(problem)
        now = _Shown(state, _ended(status))
        if now == shown:
            return [gr.skip() for _ in range(5)] + [gr.skip() for view in (*self._ticks, *self._views) for _ in view.outputs]
        values = [value for view in self._ticks for value in view.values(state, status)]
        given = iter(controls)
        for view in self._views:
            own = [next(given) for _ in (*view.controls, *view.reads)]
            stale = shown.state is None or now.ended != shown.ended or any(_differ(state, shown.state, name) for name in view.fields)
            values += view.values(state, *own) if stale else [gr.skip() for _ in view.outputs]
        return [now, now.ended, head, *self._clocks(status), *values]

    def _tick(self, state: ViewState, shown: _Shown) -> list[Any]:
        """Header and ticking views; the rest follows when a job has ended, or the run is gone, which is told there, once."""
        state = remembered(state)
        asked = state.run
        state, status, head, problem = self._look(state)
        gone = bool(problem) and shown.state is not None and shown.state.run == asked
        values = [value for view in self._ticks for value in view.values(state, status)]
        return [-1 if gone else _ended(status), head, *self._clocks(status), *values]

    def _clocks(self, status: RunStatus | None) -> tuple[gr.Timer, gr.Timer]:
        """The clock of the run's own work, and the slow one of what others do: one of them goes, or none."""
        busy = status is not None and status.busy
        return gr.Timer(active=busy), gr.Timer(active=not busy and (self._watches or bool(self.context.client.queue())))

    def _look(self, state: ViewState) -> tuple[ViewState, RunStatus | None, str, str]:
        """The view, its run's status and the header; of a run that is gone the view without it, and a sentence, else ""."""
        problem = ""
        try:
            status = self.context.status(state)
        except RunError as error:
            state, status, problem = state.without_run(), None, str(error)
        return state, status, header.draw(self.context, self._title, self._purpose, state, status), problem


def _ended(status: RunStatus | None) -> int:
    return 0 if status is None else sum(not job.is_open for job in status.jobs)


def _differ(one: ViewState, other: ViewState, field: str) -> bool:
    return bool(getattr(one, field) != getattr(other, field))
