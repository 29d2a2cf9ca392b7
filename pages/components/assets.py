"""The browser's half of the explorer: style, scripts and plotly, all served from this machine, and the rules it lives by."""

import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesvd_core import __version__
from pages.components import downloads
from pages.components.no_page import no_page, wants_page

FOLDER = Path(__file__).parents[2] / "assets"
PLOTLY = '<script src="explorer/plotly.min.js" defer></script>'
"""Head of components that draw with plotly."""
_SCRIPTS = sorted(FOLDER.glob("*.js"), key=lambda path: (path.name != "explorer.js", path.name))  # the others build on this one
_SERVED = {path.name: path for path in (*_SCRIPTS, Path(str(files("plotly") / "package_data" / "plotly.min.js")))}
_RULES = {
    # Gradio compiles templates and snippets in the browser, hence 'unsafe-eval'; nothing may be fetched from anywhere else.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; frame-ancestors {frames}"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}
_ASKED = re.compile(
    r"/gradio_api/(queue/(join|data|status)|heartbeat/\w+|cancel|reset|app_id|info|startup-events|login_check|token|user)/?"
    r"|(?!/gradio_api|/monitoring|/proxy=|/file[=/]|/upload).*"
)
"""What pages ask for. Gradio answers much more (uploads, files, a proxy, recordings, events by name), which no page needs."""


def head() -> str:
    """Head of every page: all styles and scripts of `assets/`.

    Styles are written out, so that nothing is seen without them; Gradio would rewrite the selectors of styles it is given as such.
    """
    styles = "".join(path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.css")))
    return f"<style>{styles}</style>" + "".join(f'<script src="explorer/{path.name}"></script>' for path in _SCRIPTS)


def mount(kind: str) -> str:
    """`js_on_load` of a component that one of the scripts brings to life; any of them may still be on its way."""
    given = "{element, props, trigger, watch}"
    return f"const start = () => window.explorer?.{kind} ? window.explorer.{kind}({given}) : setTimeout(start, 30); start();"


def routes(runs: Path) -> Sequence[BaseRoute]:
    """Addresses beside the pages: the files above, and `/healthz` (200 when runs can be kept, else 503)."""

    def serve(request: Request) -> Response:
        path = _SERVED.get(request.path_params["name"])
        if path is None:
            return JSONResponse({"detail": "not found"}, status_code=404)
        return FileResponse(path, media_type="text/javascript", headers={"cache-control": "no-cache"})

    def health(request: Request) -> Response:
        writable = os.access(runs, os.W_OK | os.X_OK)
        status = "no folder of runs" if not runs.is_dir() else "ok" if writable else "the folder of runs is read-only"
        return JSONResponse({"status": status, "version": __version__}, status_code=200 if status == "ok" else 503)

    return [Route("/explorer/{name}", serve), Route("/healthz", health)]


class _Rules:
    """Adds `_RULES` to every answer, and has none for what no page asks; a person is shown a page where there is none."""

    def __init__(self, app: ASGIApp, frames: Sequence[str]) -> None:
        self._app = app
        self._rules = [(name.encode(), rule.format(frames=" ".join(frames)).encode()) for name, rule in _RULES.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        replaced = False

        async def ruled(message: Message) -> None:
            nonlocal replaced
            if replaced:
                return
            if message["type"] == "http.response.start":
                if message["status"] == 404 and wants_page(scope):
                    replaced = True
                    await no_page(scope)(scope, receive, with_rules)
                    return
            await with_rules(message)

        async def with_rules(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._rules]
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif _ASKED.fullmatch(scope["path"]):
            await self._app(scope, receive, ruled)
        else:
            await JSONResponse({"detail": "not found"}, status_code=404)(scope, receive, ruled)


def app_kwargs(runs: Path, frames: Sequence[str] = ()) -> dict[str, Any]:
    """What Gradio passes on to FastAPI; `frames` are the other sites that may show the explorer in a frame."""
    no_documents: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    rules = Middleware(_Rules, frames=("'self'", *frames))
    return {"routes": [*routes(runs), *downloads.routes(runs)], "middleware": [rules], **no_documents}
