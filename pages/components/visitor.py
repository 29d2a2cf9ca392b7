"""Who sits in front of the browser whose event is being handled, what they look at, and how little is kept of them."""

from contextlib import suppress
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from pages.components.session import ViewState, read_query

OPEN_TABS = 256
"""Tabs of which the server keeps the state, half a megabyte each; the one that was silent longest is forgotten first."""


def visitor() -> str:
    """Name of the login, "" where the server asks for none; then whoever reaches it may do everything."""
    request = LocalContext.request.get(None)
    return (request.username or "") if request is not None else ""


def remembered(state: ViewState) -> ViewState:
    """The view's state; where the server has forgotten the tab, as its address tells it, which comes with every event."""
    request = LocalContext.request.get(None)
    if state.run or state.without or request is None:
        return state
    return read_query(dict(request.query_params))[0]


def forget_closed_tabs(app: gr.Blocks) -> None:
    """Let go of a tab's state when it is closed. Gradio would keep it, with a copy of every page, until ten thousand others have come."""

    def forget(request: gr.Request) -> None:
        queue: Any = app._queue
        for kept in (app.state_holder.session_data, app.state_holder.time_last_used):
            kept.pop(request.session_hash, None)
        if not queue.pending_event_ids_session.pop(request.session_hash, None):  # else a stream is open: Gradio ends that, and its messages
            queue.pending_messages_per_session.pop(request.session_hash, None)

    app.unload(forget)


class _Pending(dict[str, set[str]]):
    """Events of each tab that are under way: none of a tab that is not known."""

    def __missing__(self, tab: str) -> set[str]:
        return set()


def pass_over_closed_tabs(app: gr.Blocks) -> None:
    """Say nothing to a tab that is closed. Gradio would raise a KeyError in the one loop that all events wait for, and answer nobody again.

    To be called behind `app.queue`, which makes the queue.
    """
    queue: Any = app._queue
    queue.pending_event_ids_session = _Pending()
    send = queue.send_message

    def send_to_open(event: Any, message: Any) -> None:
        with suppress(KeyError):
            send(event, message)

    queue.send_message = send_to_open
