"""Without a backward pass: the probes' scale against the backward pass, and when they are used."""

import pytest
import torch
from tiny_models import TINY, tiny_tokenizer

from moesvd_core.architectures.streaming import MemoryStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.calibration.job import Job
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


def test_takes_over_where_a_layer_has_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_layer(job: Job, index: int, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        after = plain(job, index, ids, hidden)
        return after.detach() if index == 1 else after

    plain = Job.run_layer
    monkeypatch.setattr(Job, "run_layer", run_layer)
    told: list[Progress] = []
    settings = Calibration(samples=2, length=24)
    statistics = calibrate(MemoryStream(TINY["mixtral"]()), tiny_tokenizer(), settings, report=told.append)
    assert statistics.gradient == "probe"
    assert all(layer.gradient_gram_DD is not None for layer in statistics.layers.values())
    assert sum(progress.message == "forward, layer 1" for progress in told) == 1, "the forward pass must stand"
    assert (told[-1].done, told[-1].message) == (told[-1].total, "probe, predictions")


def test_other_errors_of_the_backward_pass_are_not_taken_for_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_layer(job: Job, index: int, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return plain(job, index, ids, hidden)

    plain = Job.run_layer
    monkeypatch.setattr(Job, "run_layer", run_layer)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        calibrate(MemoryStream(TINY["mixtral"]()), tiny_tokenizer(), Calibration(samples=2, length=24))
