"""A process without memory: what does not fit is refused beforehand, and what runs out all the same is told by its figures.

Whoever asked for the work lives on, the next job is done, and the one that failed can be resumed.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import launched, new_run
from tiny_runs import CALIBRATION, RECIPE, TEXT, do, tiny_run

from moesvd_core.runs.client import Client
from moesvd_core.runs.faults import translate
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.free_memory import _left_in_groups, free_memory
from moesvd_core.runs.stages import ACTIONS
from moesvd_core.runs.worker import work

LIMIT = 5 * 2**30
"""Of address space: room for torch and transformers, which take half of it."""
ON_A_CARD = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free. Process 7 has "
    "77.90 GiB memory in use. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF"
)


def limited(*words: str) -> Callable[[RunFolder], None]:
    """Starts workers, by python and these words, that may take `LIMIT` of address space."""
    set_limit = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, ({LIMIT}, {LIMIT})); sys.argv[:] = sys.argv[1:]\n"
    start = "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    return lambda run: launched(run, "-c", set_limit + start, *words, str(run.path))


def test_work_beyond_the_process_s_own_limit_is_refused_beforehand(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", calibration=replace(CALIBRATION, batch=120_000))
    client = Client(tmp_path, limited("moesvd_core", "worker"))
    job = client.wait(run, client.submit(run, "plan", recipe=RECIPE).id, 120)
    assert (job.state, job.error_kind) == ("failed", "ResourceError")
    needed, free = (float(figure) for figure in job.error.replace(" GiB", "").split() if figure.replace(".", "").isdigit())
    assert 0 < free < LIMIT / 2**30 < needed
    assert not list(run.station("statistics").rglob("*.safetensors"))


def test_a_worker_that_runs_out_of_memory_says_how_much_it_needed_and_goes_on(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    client = Client(tmp_path, limited("fake_worker"))
    hungry, next_one = client.submit(run, "evaluate", how="hungry"), client.submit(run, "analyze", to=2)
    job = client.wait(run, hungry.id, 120)
    assert (job.state, job.error_kind) == ("failed", "ResourceError")
    assert job.error.startswith("out of memory: 8.00 GiB more were needed at once, ")
    free = float(job.error.partition("at once, ")[2].split()[0])
    assert 0 < free < LIMIT / 2**30
    assert client.wait(run, next_one.id, 120).state == "finished"


@pytest.mark.parametrize(
    "place", ["workbench.calibrate", "workbench.compare", "workbench.final_hidden", "exporting.export_streamed", "stages.card_facts"]
)
def test_a_full_graphics_card_fails_the_job_and_a_resumed_one_ends_as_ever(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(ON_A_CARD)

    run, output = tiny_run(tmp_path / "run"), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(f"moesvd_core.runs.{place}", full)
        job = do(run, "compress", recipe=RECIPE, output=str(output), text=TEXT)
    assert (job.state, job.error_kind) == ("failed", "ResourceError")
    assert job.error.startswith("out of memory: 2.50 GiB more were needed at once, 1.20 GiB are free on the graphics card; use a smaller")
    assert not output.exists()
    client = Client(tmp_path, launch=lambda run: None)
    client.resume(run)
    assert [job.state for job in work(run, lambda: ACTIONS)] == ["finished"]
    assert (output / "SHA256SUMS").exists()


REFUSED: dict[str, Callable[[], Any]] = {
    "": lambda: bytearray(2**62),  # Python does not say how much
    f"{2**32:.2f} GiB more were needed at once, ": lambda: torch.empty(2**60),
    f"{2**18:.2f} GiB more were needed at once, ": lambda: np.empty(2**45),
}


@pytest.mark.parametrize("needed", REFUSED)
def test_every_library_s_refusal_is_understood(needed: str, tmp_path: Path) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as raised:
        REFUSED[needed]()
    told = str(translate(raised.value, tmp_path))
    assert told.startswith(f"out of memory: {needed}") and " GiB are free now; use a smaller batch" in told


def group(folder: Path, names: tuple[str, str], bound: str, used: int, cached: int, kind: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (bound, str(used)), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{kind} {cached}\n")


def test_a_container_s_bound_counts_without_what_only_caches_files(tmp_path: Path) -> None:
    v2 = ("memory.max", "memory.current")
    group(tmp_path / "pod", v2, "1000", 700, 200, "inactive_file")
    group(tmp_path / "pod" / "box", v2, "max", 600, 100, "inactive_file")
    group(tmp_path / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "900", 100, 50, "total_inactive_file")
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/not/seen/from/inside\n3:cpuset:/\n0::/pod/box\n")
    assert sorted(_left_in_groups(membership, tmp_path)) == [500, 850]
    assert list(_left_in_groups(tmp_path / "nowhere", tmp_path)) == []


def test_there_is_memory_now() -> None:
    assert 0 < free_memory() < 2**60
