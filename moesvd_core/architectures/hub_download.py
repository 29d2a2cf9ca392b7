"""A model of the hub, downloaded into the hub's cache: how far that is is told all the while, it can be stopped, and it must fit.

The hub's library downloads in threads that may hang as long as the network does. It is left to a thread of its own, so that whoever asked
is told, and heard, at a steady pace.
"""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import DryRunFileInfo, HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import DryRunError
from huggingface_hub.utils.tqdm import tqdm

from moesvd_core.architectures.headers import shortened
from moesvd_core.atomic import existing, is_disk_full
from moesvd_core.errors import CheckpointError, MoesvdError, ResourceError
from moesvd_core.progress import Progress, Report, silent

STAGE = "fetch"
UNIT = 10**6
"""Bytes in which progress is counted."""
REPORT_SECONDS = 1.0
STOP_SECONDS = 2.0
"""How long a download may take to end once it was stopped; one that hangs ends by itself when the network moves again."""
_FILES_AT_ONCE = 4
"""The library keeps whole files only, so each that is under way is fetched again after a stop; each has several connections anyway."""
_FROM_HUB = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*")
_NOT_FROM_HUB = ("*/*", "consolidated*", "adapter_*", "pytorch_model*")
_BYTES_BAR = "huggingface_hub.snapshot_download"
"""What the library calls its bar of the bytes that are on disk; it has others, of files and of bytes received."""


def download_model(name: str, accept: Callable[[Path], None], *, code: bool = False, report: Report = silent) -> Path:
    """Fetch what the cache lacks of a model; returns its folder. A model that is there already is found without the hub as well.

    Args:
        accept: is given the folder once the configuration is in it, and raises if the weights should not be fetched.
        code: fetch the model's own code, too.
        report: called about once a second with stage "fetch" while there is something to download, always by the calling thread.

    Raises:
        CheckpointError: the hub cannot deliver it.
        ResourceError: it does not fit on the disk.
        Cancelled: `report` said so; files that were whole by then are kept.
    """
    try:
        if not isinstance(try_to_load_from_cache(name, constants.CONFIG_NAME), str):
            HfApi().model_info(name)  # asked once; the question for a file is repeated for half a minute where nobody answers
        accept(Path(hf_hub_download(name, constants.CONFIG_NAME)).parent)
        return _fetched(name, (*_FROM_HUB, "*.py") if code else _FROM_HUB, report)
    except MoesvdError:
        raise
    except Exception as error:  # the network has many ways to fail, and the hub's library passes on those of its HTTP client
        if is_disk_full(error):
            raise ResourceError(
                f"disk full while {shortened(name)} was downloaded; {_gigabytes(_free())} are free now in the hub's cache: "
                "make room, or move the cache to another disk (HF_HOME), then resume"
            ) from error
        reason = f"{type(error).__name__}: {shortened(str(error).partition(chr(10))[0])}"
        raise CheckpointError(f"model {shortened(name)} is no local folder and cannot be fetched from the hub ({reason})") from error


def cached_model(name: str) -> Path | None:
    """The folder of a model of the hub that was fetched before, or None; asks nobody."""
    return _cached(name, _FROM_HUB)


def _cached(name: str, patterns: Sequence[str]) -> Path | None:
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(_NOT_FROM_HUB), local_files_only=True))
    except Exception:  # it was not fetched, or can be no name of the hub; the hub's library tells so in several ways
        return None


def _fetched(name: str, patterns: Sequence[str], report: Report) -> Path:
    wanted: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": list(_NOT_FROM_HUB)}
    count = _Count()
    try:
        files: list[DryRunFileInfo] = snapshot_download(name, dry_run=True, tqdm_class=count.bar(), **wanted)
    except DryRunError:  # the hub cannot be asked: what was fetched before will do, else the same question tells what is wrong
        return _cached(name, patterns) or Path(snapshot_download(name, **wanted))
    if files:
        wanted["revision"] = files[0].commit_hash  # what was looked at is what comes
    if not any(file.will_download for file in files):
        return Path(snapshot_download(name, **wanted))
    missing = sum(file.file_size or 0 for file in files if file.will_download)
    _require_room(name, missing)
    if report is silent:
        return Path(snapshot_download(name, **wanted))  # with the library's own bars
    return _watched(name, missing, count, report, lambda: snapshot_download(
        name, tqdm_class=count.bar(), max_workers=_FILES_AT_ONCE, **wanted
    ))


def _watched(name: str, missing: int, count: "_Count", report: Report, download: Callable[[], str]) -> Path:
    """Tell how far a download is until it has ended, and stop it when `report` or the terminal says so."""
    units = max(1, -(-missing // UNIT))

    def told(done: int, bytes_done: int) -> None:
        report(Progress(STAGE, done, units, f"{_part(bytes_done, missing)} of {name}"))

    told(0, 0)
    executor = ThreadPoolExecutor(1, thread_name_prefix="download")
    running = executor.submit(download)
    try:
        while not wait([running], REPORT_SECONDS).done:
            done = min(max(0, count.bytes), missing)
            told(min(done // UNIT, units - 1), done)
    except BaseException:
        _stop(count, running)
        raise
    finally:
        executor.shutdown(wait=False)
    folder = Path(running.result())
    told(units, missing)
    return folder


class _Count:
    """Bytes that the library's threads have written, told by the bars that it thinks it draws; and the wish that they stop."""

    def __init__(self) -> None:
        self.bytes = 0
        self.stopped = False
        self._lock = threading.Lock()

    def add(self, number: float, *, counts: bool) -> None:
        """Called by the library's threads; a number is negative when a file is begun anew."""
        if self.stopped:
            raise _Stopped
        if counts:
            with self._lock:
                self.bytes += int(number)

    def bar(self) -> type[tqdm]:
        """The class of its bars; nothing is drawn."""
        count = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self._counts = kwargs.get("name") == _BYTES_BAR
                super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                count.add(n or 0, counts=self._counts)

        return Bar


class _Stopped(Exception):  # noqa: N818 - it is not a fault
    """Ends a thread of the library; nobody else sees it."""


def _stop(count: _Count, running: "Future[str]") -> None:
    """Have a download end: plain HTTP at its next bytes, the library's own transfers, which heed no bar, by its own way to stop them."""
    deadline = time.monotonic() + STOP_SECONDS
    _abort_transfers()
    count.stopped = True
    while not wait([running], 0.05).done and time.monotonic() < deadline:
        _abort_transfers()  # one that was just about to begin


def _abort_transfers() -> None:
    with suppress(ImportError):  # of versions that have no such transfers
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()  # type: ignore[no-untyped-call]


def _require_room(name: str, missing: int) -> None:
    free = _free()
    if missing > free:
        raise ResourceError(
            f"not enough disk to download {shortened(name)}: {_gigabytes(missing)} are needed and {_gigabytes(free)} are free "
            "in the hub's cache; make room, or move the cache to another disk (HF_HOME)"
        )


def _free() -> int:
    """Bytes free where the hub's cache is, or will be."""
    return shutil.disk_usage(existing(Path(constants.HF_HUB_CACHE))).free


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size:,} bytes"


def _part(done: int, total: int) -> str:
    size, unit = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return f"{done / size:.1f} of {total / size:.1f} {unit}"
