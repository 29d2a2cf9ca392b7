"""Model: what is in it, what analysing it takes."""

import gradio as gr

from pages.components import jobs
from pages.components.context import Context
from pages.components.page import Page


def build(context: Context) -> None:
    """Lay out the page."""
    with Page(context, "Model", "What the model is, what analysing it takes, and the runs that are there.") as page:
        gr.HTML("")
        jobs.Panel(page)
