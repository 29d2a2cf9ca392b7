"""MoE-SVD Explorer: the web app. `python app.py --help` lists the settings; it listens on this machine only unless told otherwise."""

import os
import sys
from collections.abc import Callable, Sequence

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: nothing leaves the machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: idle threads leave the cores to the worker

import gradio as gr

from moesvd_core.errors import MoesvdError
from moesvd_core.runs.deletion import sweep
from pages import compare, export, model, ratio, sensitivity, similarity
from pages.components import assets, demo
from pages.components.context import Context, PageLink
from pages.components.settings import Settings
from pages.components.theme import theme
from pages.components.visitor import OPEN_TABS, forget_closed_tabs, pass_over_closed_tabs

# One line a page: title, path, what lays it out.
PAGES: tuple[tuple[str, str, Callable[[Context], None]], ...] = (
    ("Model", "/", model.build),
    ("Sensitivity", "/sensitivity", sensitivity.build),
    ("Ratio", "/ratio", ratio.build),
    ("Similarity", "/similarity", similarity.build),
    ("Compare", "/compare", compare.build),
    ("Export", "/export", export.build),
)

WORDS = gr.I18n(en={"common.complete": "Done"})  # Gradio reads it out when an event has ended, and has no word for it in any language


def create(settings: Settings) -> gr.Blocks:
    """The app with all its pages."""
    settings.runs.mkdir(parents=True, exist_ok=True)
    sweep(settings.runs)
    if settings.demo:
        demo.install(settings.runs)
    context = Context(settings, tuple(PageLink(title, path) for title, path, _ in PAGES))
    app = gr.Blocks(title="MoE-SVD Explorer", analytics_enabled=False)
    with app:
        PAGES[0][2](context)
        forget_closed_tabs(app)
    for title, path, build in PAGES[1:]:
        with app.route(title, path, show_in_navbar=False):  # the header has the way, with the view in its links
            build(context)
    app.queue(default_concurrency_limit=8)
    pass_over_closed_tabs(app)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted. Exit status 2 on settings that cannot be used, or a demo run that cannot."""
    try:
        settings = Settings.read(arguments)
        settings.require_port()
        explorer = create(settings)
        if settings.demo:
            demo.complete(settings.runs)
        _, address, _ = explorer.launch(
            server_name=settings.host, server_port=settings.port or None, auth=list(settings.logins) or None, share=False, ssr_mode=False,
            quiet=True, theme=theme(), head=assets.head(), footer_links=[], run_history=False, mcp_server=False, pwa=False,
            enable_monitoring=False, state_session_capacity=OPEN_TABS, max_file_size="1mb", show_error=False,
            app_kwargs=assets.app_kwargs(settings.runs, settings.frames), prevent_thread_lock=True, i18n=WORDS,
        )
        print(f"MoE-SVD Explorer: {address} (Ctrl+C ends it; work in progress goes on)", flush=True)
        explorer.block_thread()
    except (MoesvdError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while it starts; later it ends by itself
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
