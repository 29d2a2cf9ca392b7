"""What a card keeps and what it has no room for; the copies are those of a card, played on the host."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moesvd_core import devices
from moesvd_core.calibration import states
from moesvd_core.calibration.states import DeviceStates, DiskStates, MemoryStates, States, before

CPU = torch.device("cpu")


class Event:
    """An event of a card that has always happened."""

    def record(self, _stream: object) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host taken for a card, with buffers of 40 bytes."""
    empty = torch.empty

    def unpinned(*size: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
        return empty(*size, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(devices, "on_card", lambda device: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(devices, "STAGED", 40)
    monkeypatch.setattr(devices, "SMALL", 8)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("size", [1, 9, 10, 11, 57])
def test_a_tensor_arrives_whole_whatever_its_size(size: int) -> None:
    source = torch.arange(2.0 * size).view(2, size)
    assert torch.equal(devices.to_host(source), source)
    assert torch.equal(devices.to_device(source, CPU), source)
    assert torch.equal(devices.to_device(source.T, CPU), source.T), "not contiguous"
    rounded = devices.copy_to_host_(torch.empty(2, size, dtype=torch.float32), source.double() / 3)
    assert torch.equal(rounded, (source.double() / 3).float())


def test_the_host_is_no_card() -> None:
    tensor = torch.ones(3)
    assert devices.to_host(tensor) is tensor and devices.to_device(tensor, CPU) is tensor
    assert devices.room(CPU) == 0
    memory = MemoryStates()
    assert before(CPU, memory) is memory


def test_room_is_what_is_free_less_a_share_for_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert devices.room(torch.device("cuda")) == 500 + 100 - 400
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    assert devices.room(torch.device("cuda")) == 0


@pytest.fixture(params=["memory", "disk"])
def others(request: pytest.FixtureRequest, tmp_path: Path) -> States:
    return MemoryStates() if request.param == "memory" else DiskStates(tmp_path)


@pytest.mark.parametrize("fitting", [0, 2, 5])
def test_batches_beyond_the_room_wait_elsewhere_and_come_back_by_number(
    fitting: int, others: States, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([8] * fitting + [0] * 10)
    monkeypatch.setattr(states, "room", lambda device: next(left))
    kept = DeviceStates(CPU, others)

    def batches(first: int) -> Iterator[torch.Tensor]:
        return (torch.tensor([float(first + number), 0.0]) for number in range(5))

    kept.put("a", batches(10))
    assert kept.count("a") == 5 and others.count("a") == 5 - fitting
    assert [float(kept.get("a", number)[0]) for number in range(5)] == [10, 11, 12, 13, 14]
    monkeypatch.setattr(states, "room", lambda device: 8)
    kept.put("a", batches(20))
    assert kept.count("a") == 5 and others.count("a") == 0, "what was there is replaced"
    assert float(kept.get("a", 4)[0]) == 24
    kept.drop("a")
    kept.drop("never there")
    assert kept.count("a") == 0
