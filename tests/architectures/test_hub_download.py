"""A download over HTTP: it tells how far it is, stops when asked to, goes on from what is there, and is refused where it cannot fit."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import NAME, HubServer, serving
from huggingface_hub import constants
from runs.run_helpers import until
from safetensors.torch import load_file
from tiny_models import TINY, tiny_tokenizer

from moesvd_core.architectures import hub_download
from moesvd_core.architectures.files import INDEX, ModelFiles, resolve_model
from moesvd_core.errors import Cancelled, CheckpointError, ResourceError, UnsupportedModelError
from moesvd_core.progress import Progress


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several files of weights, and a file that nobody should fetch."""
    folder = tmp_path_factory.mktemp("model")
    TINY["mixtral"]().save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def hub(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub with that model, and a pace that tests can wait for."""
    monkeypatch.setattr(hub_download, "UNIT", 1000)
    monkeypatch.setattr(hub_download, "REPORT_SECONDS", 0.02)
    monkeypatch.setattr(hub_download, "STOP_SECONDS", 0.2)
    with serving(model, cache, monkeypatch) as server:
        yield server


def wanted(model: Path) -> list[str]:
    """Names of the files that a download fetches."""
    return sorted(file.name for file in model.iterdir() if file.suffix != ".bin")


def shards(model: Path) -> list[str]:
    return sorted(file.name for file in model.glob("*.safetensors"))


def held(cache: Path) -> set[str]:
    """Names of the files that are whole in the cache."""
    return {path.name for path in cache.rglob("snapshots/*/*")}


def unfinished(cache: Path) -> list[Path]:
    return list(cache.rglob("*.incomplete"))


def stop_once(condition: Callable[[], bool]) -> Callable[[Progress], None]:
    """A report that cancels as soon as something is so."""

    def report(_: Progress) -> None:
        if condition():
            raise Cancelled("enough")

    return report


class TestWhole:
    def test_it_tells_rising_bytes_up_to_the_total_and_gives_a_model(self, hub: HubServer, model: Path) -> None:
        hub.slow = shards(model)[0]
        told: list[Progress] = []

        def report(progress: Progress) -> None:
            told.append(progress)
            if progress.done > 0.5 * progress.total:
                hub.go_on.set()

        folder = resolve_model(NAME, report=report)
        missing = sum((model / name).stat().st_size for name in wanted(model) if name != "config.json")
        assert {progress.stage for progress in told} == {"fetch"}
        assert {progress.total for progress in told} == {-(-missing // 1000)}
        counted = [progress.done for progress in told]
        assert counted == sorted(counted)
        assert counted[0] == 0 and counted[-1] == told[-1].total and 0 < counted[-2] < counted[-1]
        assert counted.count(counted[-1]) == 1, "the end of the stage is told once"
        size = f"{missing / 1e6:.1f} MB of {NAME}"
        assert (told[0].message, told[-1].message) == (f"0.0 of {size}", f"{missing / 1e6:.1f} of {size}")
        assert hub.fetched() == wanted(model)
        tensors = {key: value for name in shards(model) for key, value in load_file(model / name).items()}
        files = ModelFiles.open(folder)
        assert files.weight_map.keys() == tensors.keys()
        assert all(files.read(key).equal(value) for key, value in tensors.items())

    def test_a_caller_who_does_not_care_has_the_model_too(self, hub: HubServer, model: Path) -> None:
        assert ModelFiles.open(resolve_model(NAME)).weight_map
        assert hub.fetched() == wanted(model)

    def test_what_is_in_the_cache_is_not_downloaded_nor_told(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        first = resolve_model(NAME)
        hub.asked.clear()
        told: list[Progress] = []
        assert resolve_model(NAME, report=told.append) == first
        assert (told, hub.fetched()) == ([], [])
        hub.shutdown()
        hub.server_close()
        assert resolve_model(NAME, report=told.append) == first
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert resolve_model(NAME, report=told.append) == first
        assert told == []

    def test_a_model_that_needs_code_of_its_own_costs_no_weights(self, hub: HubServer, model: Path, tmp_path: Path) -> None:
        hub.folder = tmp_path / "other"
        shutil.copytree(model, hub.folder)
        (hub.folder / "config.json").write_text('{"model_type": "unheard_of", "auto_map": {"AutoConfig": "x.Config"}}')
        with pytest.raises(UnsupportedModelError, match="code of its own"):
            resolve_model(NAME)
        assert hub.fetched() == ["config.json"]


class TestStopped:
    def test_whole_files_are_kept_and_the_rest_is_fetched_when_it_goes_on(self, hub: HubServer, model: Path, cache: Path) -> None:
        hub.slow = shards(model)[1]
        others = set(wanted(model)) - {hub.slow}
        begun = time.monotonic()
        with pytest.raises(Cancelled, match="enough"):
            resolve_model(NAME, report=stop_once(lambda: held(cache) >= others))
        assert time.monotonic() - begun < 10, "although not a byte came any more"
        assert held(cache) == others
        hub.go_on.set()
        until(lambda: not unfinished(cache))
        assert hub.slow not in held(cache), "the thread that was left behind ended at its next bytes"
        hub.asked.clear()
        told: list[Progress] = []
        folder = resolve_model(NAME, report=told.append)
        assert hub.fetched() == [hub.slow]
        assert told[0].total == -(-(model / hub.slow).stat().st_size // 1000)
        assert ModelFiles.open(folder).weight_map

    def test_nothing_is_asked_for_where_the_wish_was_there_before(self, hub: HubServer) -> None:
        with pytest.raises(Cancelled):
            resolve_model(NAME, report=stop_once(lambda: True))
        assert hub.fetched() == ["config.json"]

    def test_an_interrupt_of_the_terminal_ends_it_too(self, hub: HubServer, model: Path, cache: Path) -> None:
        hub.slow = shards(model)[0]

        def report(progress: Progress) -> None:
            if progress.done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            resolve_model(NAME, report=report)
        hub.go_on.set()
        until(lambda: not unfinished(cache))
        assert hub.slow not in held(cache)

    def test_files_of_the_hub_s_other_storage_stop_as_well(
        self, hub: HubServer, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("hf_xet")
        monkeypatch.setattr(hub_download, "STOP_SECONDS", 20.0)
        hub.by_xet = shards(model)[0]
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            resolve_model(NAME, report=stop_once(lambda: any("/storage/" in path for _, path in list(hub.asked))))
        assert time.monotonic() - begun < 10, "the storage never answers, and progress is not asked for by whoever waits for it"
        assert not unfinished(cache)


class TestFaults:
    def test_a_disk_without_room_is_told_before_a_weight_is_fetched(
        self, hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        missing = sum((model / name).stat().st_size for name in wanted(model) if name != "config.json")
        for free, report in ((missing - 1, hub_download.silent), (missing - 1, lambda _: None), (0, hub_download.silent)):
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(total=10**9, used=0, free=free))
            with pytest.raises(ResourceError) as raised:
                resolve_model(NAME, report=report)
            assert f"{missing:,} bytes are needed and {free:,} bytes are free in the hub's cache" in str(raised.value)
            assert "HF_HOME" in str(raised.value)
        assert hub.fetched() == ["config.json"]
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=0, free=missing))
        assert ModelFiles.open(resolve_model(NAME)).weight_map

    @pytest.mark.parametrize("fault", [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("Task error: File reconstruction error: IO Error: No space left on device (os error 28)"),
    ], ids=["system", "other storage"])
    def test_a_disk_that_fills_up_meanwhile_is_told_by_what_is_free(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch, fault: Exception
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise fault

        monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
        with pytest.raises(ResourceError, match=rf"disk full while '{NAME}' was downloaded; .* are free now in the hub's cache: make room"):
            resolve_model(NAME, report=lambda _: None)

    def test_a_name_that_the_hub_does_not_know(self, hub: HubServer) -> None:
        with pytest.raises(CheckpointError, match=r"'no/such' is no local folder and cannot be fetched from the hub \(RepositoryNotFound"):
            resolve_model("no/such", report=lambda _: None)
        assert hub.fetched() == []

    def test_a_server_that_breaks_off_every_time(self, hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.broken = shards(model)[1]
        monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
        with pytest.raises(CheckpointError, match=rf"'{NAME}' is no local folder and cannot be fetched from the hub \(\w*Error"):
            resolve_model(NAME, report=lambda _: None)
        hub.broken = ""
        assert ModelFiles.open(resolve_model(NAME)).weight_map

    def test_a_hub_that_cannot_be_reached_is_asked_once(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.shutdown()
        hub.server_close()
        begun = time.monotonic()
        with pytest.raises(CheckpointError, match=r"cannot be fetched from the hub \(ConnectError"):
            resolve_model(NAME)
        assert time.monotonic() - begun < 10, "the library repeats the question for a file for 23 s"

    def test_half_a_model_in_the_cache_is_told_to_be_that(self, hub: HubServer, model: Path) -> None:
        folder = resolve_model(NAME)
        hub.shutdown()
        hub.server_close()
        (folder / shards(model)[0]).unlink()
        with pytest.raises(CheckpointError, match=r"IncompleteSnapshotError: .* is incomplet"):
            resolve_model(NAME)
        assert (folder / INDEX).exists()
