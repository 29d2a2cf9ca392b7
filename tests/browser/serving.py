"""Starts an app as a process of its own, as a person would, and stops it."""

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


@contextmanager
def serving(command: Sequence[str], log: Path, *, flag: Sequence[str] = ()) -> Iterator[str]:
    """Run `python command… flag… PORT` in the house until the block ends; gives its address once it is healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HOUSE)}
    with log.open("w") as output:
        whole = [sys.executable, *command, *flag, str(port)]
        server = subprocess.Popen(whole, cwd=HOUSE, stdout=output, stderr=output, env=environment)
    try:
        _wait(f"http://127.0.0.1:{port}/healthz", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url) as answer:  # noqa: S310 - our own address
                assert answer.status == 200
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"the app did not start:\n{log.read_text()}", pytrace=False)
