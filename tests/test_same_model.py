"""A model is known by its experts, in memory and in files, in every family and number format; another one's are told."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import TINY, save_tiny, tiny_model

from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.streaming import LayerStream, MemoryStream
from moesvd_core.same_model import same_experts

torch.set_num_threads(1)


def changed(stream: MemoryStream, by: float = 0.1) -> MemoryStream:
    """The same stream after the last expert of its last layer was trained on."""
    layer = stream.expert_layers[-1]
    read_experts(stream.model.get_submodule(layer.name), layer).output_EDM[-1].mul_(1 + by)
    return stream


@pytest.mark.parametrize("fused", [False, True], ids=["names of the hub", "stacked"])
@pytest.mark.parametrize("name", TINY)
def test_a_model_is_that_of_its_files_and_a_fine_tuned_one_is_not(name: str, fused: bool, tmp_path: Path) -> None:
    files = ModelFiles.open(save_tiny(name, tmp_path, fused=fused))
    assert same_experts(MemoryStream(TINY[name]()), files)
    assert same_experts(MemoryStream(TINY[name]()), LayerStream(files))
    assert not same_experts(changed(MemoryStream(TINY[name]())), files)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: tiny_model("mixtral"), lambda: tiny_model("gpt_oss")])
def test_a_number_format_makes_no_other_model(make: Callable[[], torch.nn.Module], dtype: torch.dtype) -> None:
    known = MemoryStream(make().to(dtype))
    assert same_experts(MemoryStream(make()), known)
    assert same_experts(MemoryStream(make().to(torch.bfloat16)), known)
    assert not same_experts(changed(MemoryStream(make())), known)
    assert not same_experts(MemoryStream(tiny_model("mixtral", seed=1)), MemoryStream(tiny_model("mixtral")))


def test_in_one_format_not_a_bit_may_differ() -> None:
    known = MemoryStream(tiny_model("mixtral"))
    assert same_experts(known, known)
    assert not same_experts(changed(MemoryStream(tiny_model("mixtral")), by=1e-6), known)
