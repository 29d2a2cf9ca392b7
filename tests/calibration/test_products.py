"""Rounded products and counted eigenvalues, as a card would make them, against those of the host."""

import gc
import weakref

import pytest
import torch
from tiny_models import TINY
from torch import Tensor

from moesvd_core.architectures.find import expert_layers
from moesvd_core.calibration import curvature, gathering, moments, products
from moesvd_core.calibration.curvature import LayerCurvature
from moesvd_core.calibration.gathering import Gathering
from moesvd_core.calibration.moments import LayerMoments
from moesvd_core.calibration.products import add_gram_, counts_above, largest, multiplies_rounded
from moesvd_core.decomposition.grams import settled_

torch.set_num_threads(1)


def eliminated(matrix_ESS: Tensor) -> Tensor:
    """L and U without pivots, row by row."""
    lu_ESS = matrix_ESS.clone()
    for place in range(lu_ESS.shape[1] - 1):
        below = lu_ESS[:, place + 1 :, place] / lu_ESS[:, place, place, None]
        lu_ESS[:, place + 1 :, place:] -= below[:, :, None] * lu_ESS[:, None, place, place:]
        lu_ESS[:, place + 1 :, place] = below
    return lu_ESS


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host taken for a card, in what only cards compute."""
    monkeypatch.setattr(products, "on_card", lambda device: True)
    monkeypatch.setattr(products, "eliminated", eliminated)
    monkeypatch.setattr(products, "_summed_halves", lambda half_nS: half_nS.float().T @ half_nS.float())


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("size", [1e-25, 1e-12, 1.0, 1e9])
def test_rounded_grams_are_those_of_rows_rounded_to_eleven_bits(size: float) -> None:
    x_nS = size * torch.randn(400, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_nS[:, 3] *= 1e-6  # a channel that is next to idle keeps its bits
    sum_SS = torch.ones(12, 12, dtype=torch.float64) * size**2
    add_gram_(sum_SS, x_nS.float(), rounded=True)
    exact_SS = x_nS.T @ x_nS
    scale_SS = exact_SS.diagonal().sqrt()[:, None] * exact_SS.diagonal().sqrt()
    assert ((sum_SS - size**2 - exact_SS).abs() / scale_SS)[0, 4:].max() < 2**-11
    added_SS = torch.zeros(12, 12, dtype=torch.float64)
    add_gram_(added_SS, x_nS.float(), rounded=True)
    assert ((added_SS - exact_SS).abs() <= 2**-11 * scale_SS).all()
    assert torch.linalg.eigvalsh(added_SS / scale_SS)[0] > 0


@pytest.mark.usefixtures("card")
def test_a_number_that_is_none_shows_in_the_gram() -> None:
    for wrong in (torch.nan, torch.inf):
        sum_SS = torch.zeros(2, 2, dtype=torch.float64)
        add_gram_(sum_SS, torch.tensor([[1.0, wrong]]), rounded=True)
        assert not sum_SS.isfinite().all()
    zero_SS = torch.zeros(2, 2, dtype=torch.float64)
    add_gram_(zero_SS, torch.zeros(3, 2), rounded=True)
    add_gram_(zero_SS, torch.zeros(3, 2), torch.full((3, 1), 100.0), rounded=True)
    assert not zero_SS.any()


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("rounded", [False, True])
def test_of_few_rows_only_the_rounding_of_what_is_kept_has_to_be_covered(rounded: bool) -> None:
    noise = torch.Generator().manual_seed(0)
    x_nS = torch.randn(143, 512, generator=noise) + 3 * torch.randn(512, generator=noise)
    sum_SS = torch.zeros(512, 512, dtype=torch.float64)
    add_gram_(sum_SS, x_nS, torch.rand(143, 1, generator=noise) + 0.1, rounded=rounded)
    kept_SS = ((sum_SS + sum_SS.T) / 2).float().double()
    assert torch.linalg.eigvalsh(settled_(kept_SS, 1e-6, torch.float32))[0] > 0, "summed in float32 it is not"
    many_SS = torch.zeros(512, 512, dtype=torch.float64)
    add_gram_(many_SS, x_nS, rows=512)
    assert torch.equal(many_SS, many_SS.float().double()), "of rows enough it is"


def test_only_models_of_16_bits_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not multiplies_rounded(torch.ones(1, dtype=torch.bfloat16)), "the host multiplies in float32"
    monkeypatch.setattr(products, "on_card", lambda device: True)
    assert all(multiplies_rounded(torch.ones(1, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16))
    assert not multiplies_rounded(torch.ones(1))


def grams() -> Tensor:
    """Three Grams of falling spectra, [3, 40, 40]."""
    noise = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(3, 40, 40, generator=noise, dtype=torch.float64))[0]
    value = torch.stack([10.0 ** torch.linspace(low, 3, 40, dtype=torch.float64) for low in (-9.1, -4.1, 2)])
    return basis @ (value[:, :, None] * basis.mT)


@pytest.mark.usefixtures("card")
def test_eigenvalues_are_counted_as_the_host_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gram_ESS = grams()
    exact = [products._counted(gram_SS, 1e-4) for gram_SS in gram_ESS]
    assert len(set(exact)) == 3
    assert torch.allclose(largest(gram_ESS), torch.full((3,), 1e3, dtype=torch.float64), rtol=1e-6)
    asked: list[float] = []
    monkeypatch.setattr(products, "_counted", lambda gram_SS, share: asked.append(share))
    assert counts_above(gram_ESS, 1e-4) == exact
    assert not asked, "no elimination had to be doubted"


@pytest.mark.usefixtures("card")
def test_an_elimination_that_breaks_down_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    gram_ESS = grams()
    exact = [products._counted(gram_SS, 1e-4) for gram_SS in gram_ESS]
    broken = torch.tensor([1.0, torch.nan, 1e12], dtype=torch.float64)
    monkeypatch.setattr(products, "eliminated", lambda matrix_ESS: eliminated(matrix_ESS) * broken[:, None, None])
    assert counts_above(gram_ESS, 1e-4) == exact


@pytest.mark.parametrize("size", [1, 2, 5])
def test_small_spaces_have_a_largest_eigenvalue_too(size: int) -> None:
    gram_ESS = torch.diag_embed(torch.arange(1.0, 1 + 2 * size, dtype=torch.float64).view(2, size))
    assert torch.allclose(largest(gram_ESS), torch.tensor([size, 2 * size], dtype=torch.float64))


@pytest.mark.parametrize("row_gram", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_row_gradients_of_a_card_come_from_slopes_and_of_several_calls_at_once(
    name: str, row_gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TINY[name]()
    layer = expert_layers(model)[0]
    module = model.get_submodule(layer.name)
    noise = torch.Generator().manual_seed(2)
    index = torch.stack([torch.randperm(layer.experts, generator=noise)[:2] for _ in range(50)])
    args = (torch.randn(50, layer.hidden, generator=noise), index, torch.rand(50, 2, generator=noise))
    gradient_KTD = torch.randn(3, 50, layer.hidden, generator=noise)
    monkeypatch.setattr(gathering, "ENOUGH", 15)
    sums = []
    for card in (False, True):
        monkeypatch.setattr(curvature, "on_card", lambda device, card=card: card)
        monkeypatch.setattr(gathering, "on_card", lambda device, card=card: card)
        made = LayerCurvature(module, layer, row_gram=row_gram)
        for start in range(0, 50, 20):
            part = slice(start, start + 20)
            made.add([arg[part] for arg in args], gradient_KTD[:, part])
        sums.append(made.finish())
    fields = ["row_square_EN", "weighted_input_gram_EDD", "gradient_gram_EDD", "gradient_gram_DD", *(["row_gram_ENN"] if row_gram else [])]
    assert sums[1]["gradient_tokens"] == 50
    for field in fields:
        assert torch.allclose(sums[1][field], sums[0][field], rtol=1e-4, atol=1e-6 * float(sums[0][field].abs().max())), field


def test_calls_are_put_together_on_a_card_until_there_is_enough_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = expert_layers(TINY["mixtral"]())[0]  # 2 of 4 experts answer a token
    monkeypatch.setattr(gathering, "ENOUGH", 5)
    worked: list[list[int]] = []
    for card in (False, True):
        monkeypatch.setattr(gathering, "on_card", lambda device, card=card: card)
        waiting = Gathering(layer, torch.device("cpu"), (0, 1))
        given = [waiting.add((torch.ones(4, 3), torch.ones(3, 4)), 4) for _ in range(4)]
        worked += [[call[0].shape[0], call[1].shape[1]] for call in (*given, waiting.rest(), waiting.rest()) if call is not None]
    assert worked == [[4, 4]] * 4 + [[12, 12], [4, 4]]


def test_neurons_are_counted_the_same_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    magnitude_nM = torch.randn(30, 20, generator=torch.Generator().manual_seed(3)).abs()
    counted = []
    for card in (False, True):
        monkeypatch.setattr(moments, "on_card", lambda device, card=card: card)
        bins_B = torch.ones(moments.BINS, dtype=torch.int64)
        moments._count_(bins_B, magnitude_nM)
        counted.append(bins_B)
    assert torch.equal(*counted) and int(counted[0].sum()) == moments.BINS + 600


def test_moments_of_calls_put_together_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["mixtral"]()
    layer = expert_layers(model)[0]
    noise = torch.Generator().manual_seed(4)
    index = torch.stack([torch.randperm(layer.experts, generator=noise)[:2] for _ in range(60)])
    args = (torch.randn(60, layer.hidden, generator=noise), index, torch.rand(60, 2, generator=noise))
    made = []
    for card in (False, True):
        monkeypatch.setattr(gathering, "on_card", lambda device, card=card: card)
        sums = LayerMoments(model.get_submodule(layer.name), layer, threshold=2.0, intermediate=True)
        for start in range(0, 60, 20):
            sums.add([arg[start : start + 20] for arg in args], 20)
        assert (int(sums.count_E.sum()) == 0) == card, "a card waits for more"
        made.append(vars(sums.finish()))
    for name, value in made[0].items():
        if isinstance(value, Tensor):
            assert torch.allclose(made[1][name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max())), name
        else:
            assert made[1][name] == pytest.approx(value), name


@pytest.mark.usefixtures("card")
def test_principal_ranks_of_a_card_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["mixtral"]()
    layer = expert_layers(model)[0]
    weights = moments.read_experts(model.get_submodule(layer.name), layer)
    with monkeypatch.context() as host:
        host.setattr(products, "on_card", lambda device: False)
        expected = moments.principal_ranks(weights)
    monkeypatch.setattr(moments, "on_card", lambda device: True)
    assert moments.principal_ranks(weights).tolist() == expected.tolist()
    monkeypatch.setattr(moments, "AT_ONCE", 1)
    assert moments.principal_ranks(weights).tolist() == expected.tolist(), "one at a time"


@pytest.mark.parametrize("kind", [LayerMoments, LayerCurvature])
def test_sums_are_let_go_of_with_whoever_gathers_them(kind: type) -> None:
    """They are large, so that waiting for Python to find cycles would keep those of many layers."""
    model = TINY["mixtral"]()
    layer = expert_layers(model)[0]
    settings = {"threshold": 2.0, "intermediate": False} if kind is LayerMoments else {"row_gram": False}
    gc.disable()
    try:
        made = weakref.ref(kind(model.get_submodule(layer.name), layer, **settings))
        assert made() is None
    finally:
        gc.enable()
