"""What a GPU sums up in one pass is what torch sums up in many: on a GPU, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch
from tiny_models import TINY
from torch import Tensor

from moesvd_core.architectures.find import expert_layers
from moesvd_core.calibration import curvature, fused, moments
from moesvd_core.calibration.curvature import LayerCurvature
from moesvd_core.calibration.moments import LayerMoments, slopes
from moesvd_core.experts import swiglu

pytest.importorskip("triton", reason="kernels for GPUs need Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, and TRITON_INTERPRET is not 1")
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter does not round bfloat16


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("pairs", "width"), [(1, 3), (9, 256), (300, 260), (513, 40)])
def test_sums_of_neurons_are_those_of_their_definitions(pairs: int, width: int) -> None:
    pre_nN, weight_n = 2 * drawn(pairs, 2 * width).to(DEVICE, DTYPE), drawn(pairs).abs().to(DEVICE)
    h_nM, magnitude_M, slope_N = fused.neuron_sums(pre_nN, weight_n)
    expected_nM, slope_nN = slopes(swiglu, pre_nN.float())
    assert h_nM.dtype == DTYPE and torch.allclose(h_nM.float(), expected_nM, rtol=1e-2, atol=1e-6)
    assert magnitude_M.dtype == slope_N.dtype == torch.float64
    assert torch.allclose(magnitude_M.float(), expected_nM.abs().sum(0), rtol=1e-4)
    assert torch.allclose(slope_N.float(), (weight_n[:, None] * slope_nN).square().sum(0), rtol=1e-4)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize(("pairs", "width"), [(1, 3), (9, 256), (300, 260), (513, 40)])
def test_squares_of_rows_are_those_of_their_definition(pairs: int, width: int, labels: int) -> None:
    pre_nN, weight_n = 2 * drawn(pairs, 2 * width).to(DEVICE, DTYPE), drawn(pairs).abs().to(DEVICE)
    gradient_KnM = drawn(labels, pairs, width).to(DEVICE, DTYPE)
    row_N, square_n = fused.row_squares(pre_nN, gradient_KnM, weight_n)
    _, slope_nN = slopes(swiglu, pre_nN.float())
    delta_KnN = weight_n[:, None] * gradient_KnM.float().repeat(1, 1, 2) * slope_nN
    assert torch.allclose(row_N.float(), delta_KnN.square().sum((0, 1)), rtol=1e-4)
    assert torch.allclose(square_n, delta_KnN.square().sum((0, 2)), rtol=1e-4)


def test_what_is_not_a_number_is_not_hidden() -> None:
    pre_nN, weight_n = drawn(20, 64).to(DEVICE, DTYPE), torch.ones(20, device=DEVICE)
    pre_nN[7, 5] = torch.nan
    _, magnitude_M, slope_N = fused.neuron_sums(pre_nN, weight_n)
    row_N, square_n = fused.row_squares(pre_nN, drawn(1, 20, 32).to(DEVICE, DTYPE), weight_n)
    for found, place in ((magnitude_M, 5), (slope_N, 5), (row_N, 5), (square_n, 7)):
        assert found.isfinite().logical_not().nonzero().flatten().tolist() in ([place], [place, 32 + place])


def test_a_layers_statistics_are_those_of_many_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["mixtral"]().to(DEVICE, DTYPE)
    layer = expert_layers(model)[0]
    module = model.get_submodule(layer.name)
    index = torch.stack([torch.randperm(layer.experts, generator=torch.Generator().manual_seed(seed))[:2] for seed in range(90)])
    args = [drawn(90, layer.hidden).to(DEVICE, DTYPE), index.to(DEVICE), drawn(90, 2).abs().to(DEVICE, DTYPE)]
    gradient_KTD = drawn(3, 90, layer.hidden).to(DEVICE, DTYPE)
    made = []
    for fuses in (False, True):
        for each in (moments, curvature):
            monkeypatch.setattr(each, "fuses", lambda weight, gate, fuses=fuses: fuses)
        sums, bent = LayerMoments(module, layer, threshold=2.0, intermediate=True), LayerCurvature(module, layer, row_gram=False)
        sums.add(args, 90)
        bent.add(args, gradient_KTD)
        made.append(vars(sums.finish()) | bent.finish())
    for name, value in made[0].items():
        if isinstance(value, Tensor):
            assert float((made[1][name] - value).abs().max()) <= 1e-2 * float(value.abs().max()), name
        else:
            assert made[1][name] == value, name
