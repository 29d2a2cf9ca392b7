"""Makes `demo-run` again, the finished analysis that the explorer opens with: `make demo-run`, about ten minutes on two cores.

Plans of every method, what measuring them, cutting single layers and comparing experts gave. Statistics and factors are left out: they are
large, and the explorer makes them again at its first start.
"""

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from moesvd_core.calibration.settings import Calibration
from moesvd_core.console import ProgressBars
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import InputError
from moesvd_core.runs.client import enqueue
from moesvd_core.runs.known import reach
from moesvd_core.runs.source import prepare
from moesvd_core.runs.worker import work

SHIPPED = Path("assets/demo-run")
RATIOS = (0.2, 0.4, 0.6)
LEFT_OUT = ("statistics", "factors", "exports", "work", "*.log", "*.lock")


def main() -> int:
    """Analyse and measure in a temporary folder, and put what is shipped in the place of what was."""
    with TemporaryDirectory() as folder, ProgressBars() as bars:
        run = prepare("assets/demo-moe", Calibration(), root=Path(folder))
        enqueue(run, "analyze", {"methods": list(METHODS)})
        enqueue(run, "sensitivity", {"recipe": {"method": "auto", "ratio": 0.5}})
        enqueue(run, "similarity", {})
        failed = [job.error for job in work(run, watch=bars) if job.state != "finished"]
        for name, method in METHODS.items():
            reached = [ratio for ratio in RATIOS if ratio <= (reach(run, name) or 0)]
            for compensate in {False, method.compensate}:
                for ratio in reached:
                    enqueue(run, "measure", {"recipe": {"method": name, "ratio": ratio, "compensate": compensate}})
        failed += [job.error for job in work(run, watch=bars) if job.state != "finished"]
        if failed:
            raise InputError(f"{len(failed)} jobs failed, the first because {failed[0]}")
        shutil.rmtree(SHIPPED, ignore_errors=True)
        shutil.copytree(run.path, SHIPPED, ignore=shutil.ignore_patterns(*LEFT_OUT))
    here = f"{Path.cwd()}/"
    for file in [*SHIPPED.rglob("*.json"), *SHIPPED.rglob("*.jsonl")]:
        text = file.read_text(encoding="utf-8")
        if here in text:
            file.write_text(text.replace(here, ""), encoding="utf-8")  # where this was made concerns nobody
    return 0


if __name__ == "__main__":
    sys.exit(main())
