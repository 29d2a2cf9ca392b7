"""What a machine's refusal means to a person: memory and disk by their figures, anything else by its class and the log."""

import errno
import re
import shutil
from pathlib import Path

from moesvd_core.atomic import is_disk_full
from moesvd_core.errors import ResourceError
from moesvd_core.runs.folder import WORKER_LOG
from moesvd_core.runs.free_memory import free_memory

_ASKED = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGTPE]iB)")
_FREE_ON_CARD = re.compile(r"of which ([\d.]+ ?\w+) is free")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def translate(error: Exception, where: Path) -> Exception:
    """The error to tell, for one that nobody raised on purpose.

    Args:
        where: the run that met it.
    """
    text = str(error)
    if _is_memory(error, text):
        return _out_of_memory(text)
    if is_disk_full(error):
        free = shutil.disk_usage(where).free / 2**30
        place = getattr(error, "filename", None) or where
        return ResourceError(f"disk full while writing {place}; {free:.1f} GiB are free now: make room, then resume")
    return RuntimeError(f"unexpected {type(error).__name__}: {text or 'no message'} (details in {where.name / WORKER_LOG})")


def _is_memory(error: Exception, text: str) -> bool:
    """Python and numpy raise MemoryError, graphics cards torch's OutOfMemoryError; torch on the host and the loader of libraries say it."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, OSError) and error.errno == errno.ENOMEM) or "allocate memory" in text


def _out_of_memory(text: str) -> ResourceError:
    """Torch names what was asked for, and for graphics cards also what is free there."""
    asked, card = _ASKED.search(text), _FREE_ON_CARD.search(text)
    needed = "" if asked is None else f"{float(asked[1]) * 2.0 ** (10 * _UNITS.index(asked[2]) - 30):.2f} GiB more were needed at once, "
    free = f"{free_memory() / 2**30:.2f} GiB are free now" if card is None else f"{card[1]} are free on the graphics card"
    return ResourceError(f"out of memory: {needed}{free}; use a smaller batch or fewer samples, or a larger machine, then resume")
