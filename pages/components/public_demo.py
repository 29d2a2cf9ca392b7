"""A demo that anyone may look at without a password: visitors see everything and start no work.

The person who starts the server asks for it (`--public-demo`), where a password cannot be given to everybody, as in a public Space. What
answers within seconds from what is in memory stays: dragging, measuring a plan when the slider is let go, asking both models. Jobs, runs,
exports, pushes, votes and models of the hub do not.
"""

from typing import Any, NoReturn

from moesvd_core.errors import InputError
from moesvd_core.runs.client import Client


def refuse(*_: Any, **__: Any) -> NoReturn:
    """The answer to whatever a demo does not do.

    Raises:
        InputError: always.
    """
    raise InputError("this is a public demo: jobs, exports, votes and models of the hub are off; on your own machine they are not")


class Viewer(Client):
    """A client that follows work and never asks for any."""

    submit = cancel = resume = delete = delete_export = refuse  # type: ignore[assignment]
