"""What a browser is shown at an address that leads nowhere; programs are told so in JSON."""

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, Response
from starlette.types import Scope

from pages.components.text import NAME, escape
from pages.components.theme import COLORS

_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  background: %(body_background_fill)s; color: %(body_text_color)s; }
main { max-width: 1360px; margin: 0 auto; padding: 8px 32px; }
header { min-height: 64px; display: flex; align-items: center; border-bottom: 1px solid %(border_color_primary)s; font-weight: 600; }
h1 { font-size: 28px; line-height: 1.2; font-weight: 600; letter-spacing: -0.01em; margin: 40px 0 8px; }
p { margin: 0 0 24px; color: %(body_text_color_subdued)s; max-width: 80ch; }
a { color: %(link_text_color)s; text-decoration: none; }
a:hover { text-decoration: underline; }
header a { color: inherit; }
@media (max-width: 640px) { main { padding: 0 16px; } }
"""
_SHADE = """try { document.documentElement.style.colorScheme = localStorage.getItem("explorer-shade") || ""; } catch { /* no storage */ }"""
"""Light or dark as it was chosen in the explorer, else as the system has it."""


def wants_page(scope: Scope) -> bool:
    """Whether a person looks at the answer: browsers ask for HTML when an address is opened, and programs, scripts of pages too, do not."""
    return scope["method"] == "GET" and "text/html" in Headers(scope=scope).get("accept", "")


def no_page(scope: Scope) -> Response:
    """The page; it tells nothing of what was asked for."""
    home = escape(f"{scope.get('root_path', '').rstrip('/')}/")
    style = _STYLE % {name: f"light-dark({light}, {dark})" for name, (light, dark) in COLORS.items()}
    return HTMLResponse(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>No such page · {NAME}</title><style>{style}</style><script>{_SHADE}</script></head><body><main>"
        f'<header><a href="{home}">{NAME}</a></header><h1>There is nothing at this address</h1>'
        "<p>It may be mistyped, or lead to a run or an export that was deleted since.</p>"
        f'<a href="{home}">To the Model page, which lists all runs</a></main></body></html>',
        status_code=404, headers={"vary": "accept"},
    )
