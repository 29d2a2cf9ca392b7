"""What a person sees when an event goes wrong: a sentence in the page, never a traceback."""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.helpers import log_message

from moesvd_core.atomic import is_disk_full
from moesvd_core.errors import MoesvdError
from pages.components.session import ViewState
from pages.components.text import escape
from pages.components.visitor import remembered

log = logging.getLogger(__name__)


def warn(message: str) -> None:
    """Show a sentence over the page, under "Warning" (Gradio shows no other title); it may hold what a stranger wrote."""
    gr.Warning(escape(message))


def broken(message: str) -> None:
    """Show a sentence over the page, under "Error": `gr.Error` would have to be raised, and end the event that is being handled."""
    log_message(escape(message), title="Error", level="error")


def refuse(error: MoesvdError) -> None:
    """Show over the page why something was refused; the error says itself what to do."""
    warn(str(error))


def explained(function: Callable[..., Any]) -> Callable[..., Any]:
    """An event handler (plain or generator) that shows its errors in the page and then leaves all outputs as they are.

    A view's state that the server has forgotten is given to it as the address tells it.

    Errors of `moesvd_core.errors` say themselves what to do. Anything else is a bug: it goes to the server's log.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*arguments: Any, **named: Any) -> Any:
            try:
                yield from function(*_whole(arguments), **named)
            except Exception as error:
                tell(error, function)
                yield gr.skip()

        return generator

    @functools.wraps(function)
    def plain(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*_whole(arguments), **named)
        except Exception as error:
            tell(error, function)
            return gr.skip()

    return plain


def _whole(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(remembered(each) if isinstance(each, ViewState) else each for each in arguments)


def tell(error: Exception, function: Callable[..., Any]) -> str:
    """Show over the page what ended a handler, while it is being handled; gives the sentence."""
    if isinstance(error, MoesvdError):
        refuse(error)
        return str(error)
    log.exception("%s.%s failed", function.__module__, function.__qualname__)
    known = "the disk is full: make room, then ask again" if is_disk_full(error) else ""
    message = known or f"unexpected {type(error).__name__}: the server's log has the details"
    broken(message)
    return message
