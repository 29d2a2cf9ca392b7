"""Text to be copied: a command, a recipe."""

import shlex

from pages.components.text import escape


def box(label: str, code: str, remark: str = "") -> str:
    """A piece of code with its name and a button that copies it, as HTML.

    Args:
        remark: one sentence below it.
    """
    note = f'<p class="quiet-text">{escape(remark)}</p>' if remark else ""
    return (
        f'<div class="code-box"><div class="table-head"><p class="figure-title">{escape(label)}</p>'
        f'<button type="button" class="quiet" data-copy aria-label="Copy: {escape(label)}">Copy</button></div>'
        f'<pre tabindex="0" role="region" aria-label="{escape(label)}"><code>{escape(code)}</code></pre>{note}</div>'
    )


def folded(command: str) -> str:
    """A command of the shell with one option a line, which means the same."""
    quoted = any(" --" in word for word in shlex.split(command))  # there a line end would be part of the word
    return command if quoted else command.replace(" --", " \\\n  --")
