"""A run of a model of the hub: its first job downloads the weights, says how far that is, and can be cancelled meanwhile."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import NAME, HubServer, serving
from runs.tiny_runs import CALIBRATION, TEXT, do
from tiny_models import TINY, tiny_tokenizer

from moesvd_core.architectures import hub_download
from moesvd_core.progress import Progress
from moesvd_core.runs import worker
from moesvd_core.runs.client import Client
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.source import prepare

torch.set_num_threads(1)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(hub_download, "UNIT", 1000)
    monkeypatch.setattr(hub_download, "REPORT_SECONDS", 0.02)
    monkeypatch.setattr(hub_download, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(worker, "PROGRESS_SECONDS", 0.0)
    TINY["mixtral"]().save_pretrained(tmp_path / "model", max_shard_size="80KB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with serving(tmp_path / "model", tmp_path / "hub", monkeypatch) as server:
        yield server


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> RunFolder:
    made = prepare(NAME, CALIBRATION, root=tmp_path / "runs")
    hub.asked.clear()
    return made


def test_the_first_job_tells_how_far_the_download_is_and_hears_that_it_should_stop(hub: HubServer, run: RunFolder) -> None:
    hub.slow = sorted(file.name for file in hub.folder.glob("*.safetensors"))[1]
    client = Client(run.path.parent)
    shown: list[tuple[int, int, str]] = []

    def cancelling(_: Progress) -> None:
        job = client.status(run).job
        assert job is not None
        if job.stage == "fetch":
            shown.append((job.done, job.total, job.message))
            if job.done:
                client.cancel(run)

    job = do(run, "evaluate", cancelling, text=TEXT)
    assert (job.state, job.error) == ("cancelled", "cancelled")
    assert shown[0][0] == 0 and shown[-1][0] > 0
    assert all(0 <= done < total and f"MB of {NAME}" in message for done, total, message in shown)
    assert not (run.path / "source.json").exists()
    hub.go_on.set()
    seen: list[Progress] = []
    job = do(run, "evaluate", seen.append, text=TEXT)
    assert job.state == "finished", job.error
    assert list(dict.fromkeys(progress.stage for progress in seen))[:2] == ["inspect", "fetch"]
    seen.clear()
    assert do(run, "evaluate", seen.append, text=TEXT).state == "finished"
    assert "fetch" not in {progress.stage for progress in seen}, "it is there"
