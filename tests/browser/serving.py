"""Starts an app as a process of its own, as a person would, and stops it, kindly or not."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
START_SECONDS = 120.0


class Server:
    """`python command… flag… PORT` in the house. Its port stays the same when it is started again.

    Attributes:
        address: without a slash at the end.
        process: the last one that was started.
    """

    process: subprocess.Popen[bytes]

    def __init__(self, command: Sequence[str], log: Path, *, flag: Sequence[str] = ()) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self._command, self._log = [sys.executable, *command, *flag, str(port)], log

    def start(self) -> None:
        """Returns once the app is healthy."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HOUSE)}
        with self._log.open("a") as output:
            self.process = subprocess.Popen(self._command, cwd=HOUSE, stdout=output, stderr=output, env=environment)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.address}/healthz") as answer:  # noqa: S310 - our own address
                    assert answer.status == 200
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        pytest.fail(f"the app did not start:\n{self._log.read_text()}", pytrace=False)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(20)

    def stop(self) -> None:
        """Ask it to end."""
        self.process.terminate()
        self.process.wait(20)


@contextmanager
def serving(command: Sequence[str], log: Path, *, flag: Sequence[str] = ()) -> Iterator[str]:
    """Run an app until the block ends; gives its address once it is healthy."""
    server = Server(command, log, flag=flag)
    server.start()
    try:
        yield server.address
    finally:
        server.stop()
