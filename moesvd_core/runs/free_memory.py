"""How much memory this process may still take: what the machine has left, within the bounds that a container or a limit sets.

A container's bound is what counts where the explorer is hosted: whoever looks at the machine's memory alone is killed at the container's.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

try:
    import resource
except ImportError:  # Windows sets no such limits
    resource = None  # type: ignore[assignment]

_GROUPS = Path("/sys/fs/cgroup")
_V1, _V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
"""Files of a control group that hold its bound and its use."""


def free_memory() -> int:
    """Bytes."""
    process = psutil.Process()
    bounds = [psutil.virtual_memory().available, *_left_in_groups(Path(f"/proc/{process.pid}/cgroup"), _GROUPS)]
    if resource is not None and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        bounds.append(limit - process.memory_info().vms)
    return max(0, min(bounds))


def _left_in_groups(membership: Path, root: Path) -> Iterator[int]:
    """What each memory control group around a process has left; pages that only cache files count as left.

    Args:
        membership: the process's file in /proc: a line "number:controllers:path" for each hierarchy.
        root: where control groups are mounted. A container sees its own group there, whatever the path says.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, names, cache = (root, _V2, "inactive_file") if controllers == "" else (root / "memory", _V1, "total_inactive_file")
        inner = top / path.lstrip("/")
        for group in dict.fromkeys((inner, *inner.parents)):
            if not group.is_relative_to(top):
                break
            try:
                bound, used = ((group / name).read_text().strip() for name in names)
                facts = dict(pair.split() for pair in (group / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if bound != "max":
                yield int(bound) - int(used) + int(facts.get(cache, 0))
