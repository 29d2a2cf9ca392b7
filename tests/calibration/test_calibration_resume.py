"""A calibration that is broken off anywhere goes on where it was, and ends with the same numbers to the last bit."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_model, tiny_tokenizer

from moesvd_core.architectures.streaming import MemoryStream
from moesvd_core.calibration import Calibration, Statistics, calibrate, driver
from moesvd_core.calibration.job import Job
from moesvd_core.calibration.statistics import LayerFolder
from moesvd_core.errors import Cancelled, ResourceError, RunError, StatisticsError
from moesvd_core.progress import Progress

torch.set_num_threads(1)
BATCHES = 3


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies loses nothing that it wrote, only a machine does; waiting for the disk would take most of the time."""
    monkeypatch.setattr("os.fsync", lambda _descriptor: None)


def settings(**changes: Any) -> Calibration:
    return Calibration(**{"samples": 5, "length": 16, "batch": 2, **changes})


def run(folder: Path | None, chosen: Calibration | None = None, **options: Any) -> Statistics:
    return calibrate(MemoryStream(TINY["qwen2_moe"]()), tiny_tokenizer(), chosen or settings(), folder=folder, **options)


class Killed(BaseException):
    """Stands for kill -9: nothing in the engine may catch it."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, call: int) -> Iterator[list[int]]:
    """Let the given call of `Job.run_layer`, counted from 0, be the last; yields the layers that were run."""
    ran: list[int] = []
    plain = Job.run_layer

    def run_layer(job: Job, index: int, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if len(ran) == call:
            raise Killed
        ran.append(index)
        return plain(job, index, ids, hidden)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "run_layer", run_layer)
        yield ran


@pytest.mark.parametrize("gradient", [True, False])
def test_goes_on_after_being_killed_at_every_point(gradient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(gradient=gradient)
    with killed_at(monkeypatch, -1) as ran:
        reference = run(None, chosen)
    calls = len(ran)
    assert calls > 12
    for point in range(calls):
        folder = tmp_path / str(point)
        with killed_at(monkeypatch, point), pytest.raises(Killed):
            run(folder, chosen)
        with pytest.raises(StatisticsError, match="holds no finished calibration"):
            Statistics.load(folder)
        with killed_at(monkeypatch, -1) as ran:
            resumed = run(folder, chosen)
        assert len(ran) - (calls - point) <= BATCHES, "more than one layer was done again"
        assert_same(resumed, reference)
        assert_same(Statistics.load(folder), reference)
        assert not (folder / "work").exists()


def test_survives_a_kill_between_a_result_and_its_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = run(None)
    steps = []
    run(None, report=steps.append)
    plain = driver._Workplace.write
    for point in range(len(steps)):
        folder = tmp_path / str(point)
        written = []

        def write(place: Any, done: int, gradient: Any, planned: Any, written: list[int] = written, point: int = point) -> None:
            if len(written) == point:
                raise Killed
            written.append(done)
            plain(place, done, gradient, planned)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(driver._Workplace, "write", write)
            run(folder)
        assert_same(run(folder), reference)


def test_clears_up_after_a_kill_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_args: Any, **_options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(driver.shutil, "rmtree", killed)
        run(tmp_path, settings(gradient=False, samples=1))
    assert (tmp_path / "work").exists() or not (tmp_path / "statistics.json").exists()
    run(tmp_path, settings(gradient=False, samples=1))
    assert not (tmp_path / "work").exists()


def test_stops_when_told_and_keeps_what_is_done(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        run(tmp_path, report=stop)
    told: list[Progress] = []
    run(tmp_path, report=told.append)
    assert told[0].done == 4


def test_reads_a_finished_calibration_instead_of_repeating_it(tmp_path: Path) -> None:
    first = run(tmp_path)
    told: list[Progress] = []
    assert_same(run(tmp_path, report=told.append), first)
    assert not told
    assert isinstance(first.layers, LayerFolder)


@pytest.mark.parametrize("finished", [True, False])
def test_refuses_a_folder_of_another_calibration(finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if finished:
        run(tmp_path)
    else:
        with killed_at(monkeypatch, 4), pytest.raises(Killed):
            run(tmp_path)
    with pytest.raises(RunError, match=r"calibration\.seed is 0 there, 1 is asked for"):
        run(tmp_path, settings(seed=1))
    with pytest.raises(RunError, match=r"model\.digest"):
        calibrate(MemoryStream(tiny_model("qwen2_moe", seed=1)), tiny_tokenizer(), settings(), folder=tmp_path)


def test_tells_another_text_under_the_same_name(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 40, encoding="utf-8")
    chosen = settings(dataset=str(text))
    run(tmp_path / "run", chosen)
    text.write_text("hgfedcba" * 40, encoding="utf-8")
    with pytest.raises(RunError, match="text is"):
        run(tmp_path / "run", chosen)


def test_a_damaged_hidden_state_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with killed_at(monkeypatch, 5), pytest.raises(Killed):
        run(tmp_path)
    state = next(path for path in sorted((tmp_path / "work").glob("hidden-*/*.safetensors")) if path.parent.name == "hidden-001")
    content = bytearray(state.read_bytes())
    content[-5] ^= 16
    state.write_bytes(content)
    with pytest.raises(StatisticsError, match=r"00000\.safetensors is damaged"):
        run(tmp_path)


def test_a_damaged_note_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with killed_at(monkeypatch, 5), pytest.raises(Killed):
        run(tmp_path)
    (tmp_path / "work" / "progress.json").write_text(json.dumps({"done": "many"}), encoding="utf-8")
    with pytest.raises(StatisticsError, match=r"progress\.json is damaged"):
        run(tmp_path)


def test_says_how_much_a_full_disk_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ResourceError, match=r"disk is full: .* needs [\d,]+ bytes, [\d,]+ are free"):
        patch.setattr("moesvd_core.tensor_files.save_file", full)
        run(tmp_path)
    assert_same(run(tmp_path), run(None))


def test_moves_to_a_temporary_folder_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = run(None)
    used: list[Path] = []
    plain = driver.DiskStates

    def states(folder: Path) -> Any:
        used.append(folder)
        return plain(folder)

    monkeypatch.setattr(driver, "DiskStates", states)
    monkeypatch.setattr(driver, "HOST_BYTES", 1000)
    assert_same(run(None), reference)
    assert len(used) == 1 and not used[0].exists()


def assert_same(one: Statistics, other: Statistics) -> None:
    assert one.summary() == other.summary()
    assert list(one.layers) == list(other.layers)
    for index in one.layers:
        mine, theirs = one.layers[index], other.layers[index]
        for field, value in vars(mine).items():
            expected = getattr(theirs, field)
            assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected, (index, field)
