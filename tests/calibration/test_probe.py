"""Without a backward pass: the probes' scale against the backward pass, and when they are used."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import TINY, tiny_tokenizer

from moesvd_core.architectures.streaming import MemoryStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.calibration.job import Job
from moesvd_core.calibration.states import MemoryStates
from moesvd_core.progress import Progress

torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "nemotron_h"])
def test_scale_is_near_that_of_the_backward_pass(name: str) -> None:
    stream = MemoryStream(TINY[name]())
    exact = calibrate(stream, tiny_tokenizer(), Calibration(samples=4, length=48))
    probed = calibrate(stream, tiny_tokenizer(), Calibration(samples=4, length=48, gradient=False))
    assert (exact.gradient, probed.gradient) == ("backward", "probe")
    for index, layer in probed.layers.items():
        gram, reference = layer.gradient_gram_DD, exact.layers[index].gradient_gram_DD
        assert gram is not None and reference is not None
        assert torch.equal(gram, gram[0, 0] * torch.eye(len(gram)))
        share = (gram.trace() / layer.gradient_tokens) / (reference.trace() / exact.layers[index].gradient_tokens)
        assert 0.4 < share.item() < 2.5


def test_is_the_same_every_time() -> None:
    def measure(seed: int) -> torch.Tensor | None:
        settings = Calibration(samples=2, length=24, gradient=False, seed=seed)
        return calibrate(MemoryStream(TINY["mixtral"]()), tiny_tokenizer(), settings).layers[0].gradient_gram_DD

    assert torch.equal(measure(0), measure(0))  # type: ignore[arg-type]
    assert not torch.equal(measure(0), measure(1))  # type: ignore[arg-type]


def without_backward_pass(monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    """Let one layer have no derivative."""

    def run_layer(job: Job, index: int, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        after = plain(job, index, ids, hidden)
        return after.detach() if index == layer else after

    plain = Job.run_layer
    monkeypatch.setattr(Job, "run_layer", run_layer)


def test_takes_over_where_a_layer_has_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    without_backward_pass(monkeypatch, 1)
    told: list[Progress] = []
    settings = Calibration(samples=2, length=24)
    with pytest.warns(UserWarning, match=r"layer 1 has no backward pass \(.*does not require grad.*\): one probe a layer"):
        statistics = calibrate(MemoryStream(TINY["mixtral"]()), tiny_tokenizer(), settings, report=told.append)
    assert statistics.gradient == "probe"
    assert all(layer.gradient_gram_DD is not None for layer in statistics.layers.values())
    assert sum(progress.message == "forward, layer 1" for progress in told) == 1, "the forward pass must stand"
    assert (told[-1].done, told[-1].message) == (told[-1].total, "probe, predictions")


@pytest.mark.parametrize("kept", [False, True])
def test_layers_that_had_a_backward_pass_are_measured_like_the_others(kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 2 is done by then; more windows are read than probes are measured on, so that a mixture would differ in scale."""
    settings = Calibration(samples=8, length=24)
    probed = calibrate(MemoryStream(TINY["mixtral"]()), tiny_tokenizer(), replace(settings, gradient=False))
    without_backward_pass(monkeypatch, 1)
    names: list[str] = []
    plain = MemoryStates.drop
    monkeypatch.setattr(MemoryStates, "drop", lambda states, name: (names.append(name), plain(states, name)))
    with pytest.warns(UserWarning, match="layer 1 has no backward pass"):
        got = calibrate(MemoryStream(TINY["mixtral"]()), tiny_tokenizer(), settings, folder=tmp_path if kept else None)
    for index, layer in probed.layers.items():
        for field, value in vars(layer).items():
            found = getattr(got.layers[index], field)
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, (index, field)
    assert kept or {"hidden-000", "hidden-001", "hidden-002", "gradient-002"} <= set(names), "nobody needs them any more"


def test_other_errors_of_the_backward_pass_are_not_taken_for_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_layer(job: Job, index: int, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return plain(job, index, ids, hidden)

    plain = Job.run_layer
    monkeypatch.setattr(Job, "run_layer", run_layer)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        calibrate(MemoryStream(TINY["mixtral"]()), tiny_tokenizer(), Calibration(samples=2, length=24))
