"""Asks before something is deleted: what goes with it is said first, and nothing goes before that was confirmed.

    question = Question("run", back="#runs .table-scroll")             # where it should stand
    runs.select(page.changes(ask), None, question.outputs)             # ask returns question.of(name, text)
    question.confirmed(page.changes(delete), [page.state], [page.state, runs])     # delete(state, name) returns values of these outputs
"""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from gradio.events import Dependency

from pages.components.page import QUIET
from pages.components.text import notice


class Question:
    """Draws itself where it is made; hidden until something is asked.

    Attributes:
        outputs: components that show a question; `of` and `none` have their values.
    """

    def __init__(self, kind: str, back: str) -> None:
        """
        Args:
            kind: of what would be deleted, "run".
            back: selector of what the keyboard goes back to once the question is answered.
        """
        self._kind, self._back = kind, back
        self._asked = gr.State("")
        with gr.Column(visible=False, elem_classes="confirm", elem_id=f"{kind}-question") as box:
            text = gr.HTML("")
            with gr.Row(elem_classes="actions"):
                yes = gr.Button(f"Delete {kind}", variant="stop", size="md", min_width=150, scale=0, elem_classes="delete")
                no = gr.Button("Keep it", size="md", min_width=120, scale=0)
        self._yes = yes
        self.outputs: list[Any] = [self._asked, box, text]
        no.click(self.none, None, self.outputs, **QUIET).then(None, js=_focus(back))

    def asked_by(self, event: Dependency) -> None:
        """After an event that asked, the keyboard goes on at the answer that changes nothing."""
        event.then(None, js=_focus(f"#{self._kind}-question button:not(.delete)"))

    def confirmed(self, delete: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Call `delete` with the values of `inputs` and the name of what was asked about ("" for nothing), once that is confirmed."""
        answered = self._yes.click(delete, [*inputs, self._asked], [*outputs, *self.outputs], **QUIET)
        answered.then(None, js=_focus(self._back))

    def of(self, name: str, text: str) -> tuple[Any, ...]:
        """Ask about this."""
        return name, gr.Column(visible=True), notice(text, "error")

    def none(self) -> tuple[Any, ...]:
        """Ask nothing."""
        return "", gr.Column(visible=False), ""


def _focus(selector: str) -> str:
    """A script that moves the keyboard, once the page has changed."""
    return f"() => {{ setTimeout(() => document.querySelector('{selector}')?.focus(), 100) }}"
