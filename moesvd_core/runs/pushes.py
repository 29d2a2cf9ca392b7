"""Pushes to the hub that go on when the tab that asked is closed.

They are done by threads of this process and not by a run's worker, because a worker is told what to do through files, and the token of a
push must never be in one. When this process ends, its pushes end; pushed again, what had arrived is not sent again.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from moesvd_core.errors import MoesvdError, RunError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Push:
    """How a push stands.

    Attributes:
        repository: "owner/name".
        state: "running" until it has ended.
        address: of the commit, once finished.
        error: why it failed.
        started, ended: seconds since 1970.
    """

    repository: str
    state: Literal["running", "finished", "failed"] = "running"
    address: str = ""
    error: str = ""
    started: float = field(default_factory=time.time)
    ended: float | None = None


class Pushes:
    """Pushes of this process, the latest of each folder. Safe to share between threads."""

    def __init__(self) -> None:
        self._known: dict[Path, Push] = {}
        self._guard = threading.Lock()

    def start(self, folder: Path, repository: str, work: Callable[[], str]) -> None:
        """Push in the background.

        Args:
            work: does it, and returns the address of the commit; it alone holds the token, and only as long as it runs.

        Raises:
            RunError: this folder is being pushed.
        """
        with self._guard:
            known = self._known.get(folder)
            if known is not None and known.state == "running":
                raise RunError(f"{folder.name} is being pushed to {known.repository}: wait until that has ended")
            self._known[folder] = Push(repository)
        threading.Thread(target=self._work, args=(folder, work), name=f"push of {folder.name}", daemon=True).start()

    def state(self, folder: Path) -> Push | None:
        """The latest push of a folder, or None."""
        with self._guard:
            return self._known.get(folder)

    def busy_in(self, folder: Path) -> bool:
        """Whether something in a folder is being pushed."""
        with self._guard:
            return any(push.state == "running" and place.is_relative_to(folder) for place, push in self._known.items())

    def _work(self, folder: Path, work: Callable[[], str]) -> None:
        try:
            ended = {"state": "finished", "address": work()}
        except (MoesvdError, OSError) as error:
            ended = {"state": "failed", "error": str(error)}
        except Exception:
            log.exception("push of %s failed", folder.name)
            ended = {"state": "failed", "error": "the push broke off unexpectedly: the server's log has the details"}
        self._end(folder, **ended)

    def _end(self, folder: Path, **changes: str) -> None:
        with self._guard:
            self._known[folder] = replace(self._known[folder], ended=time.time(), **changes)  # type: ignore[arg-type]
