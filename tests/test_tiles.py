"""The kernels for GPUs give what grouped products give: on a GPU, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import accelerate
import pytest
import torch
from random_experts import CASES, DENSE, EXPERTS, HIDDEN, MANY_RANKS, PER_EXPERT, PIVOTED, UNIFORM, WIDTH, factored, reference

from moesvd_core import grouped, tiles
from moesvd_core.experts import FactoredExperts, Gate, swiglu
from moesvd_core.sides import Side

pytest.importorskip("triton", reason="kernels for GPUs need Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, and TRITON_INTERPRET is not 1")

DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter does not round bfloat16
@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU, pretend that tensors of the host are on one."""
    if INTERPRETED:
        monkeypatch.setattr(grouped, "usable", lambda example: True)
        monkeypatch.setattr(Side, "tiled", lambda side: side._tile())
        monkeypatch.setattr(FactoredExperts, "_small", False)
        monkeypatch.setattr(FactoredExperts, "_tiled", False)  # a CPU's own kernels would answer


@pytest.mark.parametrize("tokens", [1, 5, 40, 700])
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("gate", [swiglu, lambda pre: pre[:, :WIDTH].tanh() * pre[:, WIDTH:]], ids=["swiglu", "another"])
def test_answers_are_those_of_the_multiplied_out_matrices(case: int, tokens: int, gate: Gate, kernels: None) -> None:
    experts = factored(*CASES[case], gate, DTYPE)
    noise = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, HIDDEN, generator=noise).to(DTYPE)
    index_Tk = torch.rand(tokens, EXPERTS, generator=noise).topk(2).indices
    index_Tk[index_Tk == 4] = 3 if tokens == 5 else 4  # an expert that nobody asks
    weight_Tk = torch.rand(tokens, 2, generator=noise)
    wanted_TD = reference(experts, x_TD, index_Tk, weight_Tk)
    experts = experts.to(DEVICE)
    with torch.no_grad():
        found_TD = experts(x_TD.to(DEVICE), index_Tk.to(DEVICE), weight_Tk.to(DEVICE)).cpu().double()
    assert (found_TD - wanted_TD).norm() < 0.01 * wanted_TD.norm()


@pytest.mark.parametrize("way", ["_multiply_grouped", "_multiply_in_turns"])
@pytest.mark.parametrize("case", range(CASES.index((MANY_RANKS, MANY_RANKS))))
def test_many_pairs_are_left_to_the_library(case: int, way: str, kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = factored(*CASES[case], dtype=DTYPE)
    noise = torch.Generator().manual_seed(case)
    x_TD = torch.randn(600, HIDDEN, generator=noise).to(DTYPE)
    index_Tk = torch.rand(600, EXPERTS - 1, generator=noise).topk(2).indices  # the last is never asked
    weight_Tk = torch.rand(600, 2, generator=noise)
    wanted_TD = reference(experts, x_TD, index_Tk, weight_Tk)
    taken = []
    real = getattr(tiles._Table, way)
    monkeypatch.setattr(tiles, "MANY_ROWS", 8)
    monkeypatch.setattr(tiles._Table, "_share_of_processors", lambda *_: 1.0)
    monkeypatch.setattr(tiles._Table, way, lambda *call: (taken.append(call), real(*call)))
    if INTERPRETED:
        monkeypatch.setattr(Side, "tiled", once_tiled)
    if way == "_multiply_in_turns":
        monkeypatch.setattr(tiles, "GROUPED", 2.0)
    experts = experts.to(DEVICE)
    for turn in range(2):  # the first time, what a recording would need is made
        with torch.no_grad():
            found_TD = experts(x_TD.to(DEVICE), index_Tk.to(DEVICE), weight_Tk.to(DEVICE)).cpu().double()
        if way == "_multiply_in_turns":
            assert bool(taken) == (turn > 0)
        else:
            assert bool(taken) == fits_one_product(experts)
        assert (found_TD - wanted_TD).norm() < 0.01 * wanted_TD.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_answers_of_more_bits_are_added_up_in_as_many(dtype: torch.dtype, kernels: None) -> None:
    noise = torch.Generator().manual_seed(0)
    index_Tk, weight_Tk = torch.randint(0, EXPERTS, (5, 3), generator=noise), torch.rand(5, 3, generator=noise, dtype=dtype)
    y_PN = torch.randn(15, 40, generator=noise, dtype=dtype)
    pairs = tiles.Tiles(index_Tk.to(DEVICE), EXPERTS)
    found_TN = pairs.combine(y_PN.to(DEVICE), weight_Tk.to(DEVICE), 3).cpu()
    wanted_TN = (y_PN[pairs.place_P.cpu().long()].view(5, 3, 40) * weight_Tk[..., None]).sum(1)
    assert (found_TN - wanted_TN).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_may_be_on_another_gpu_than_the_current_one() -> None:
    noise = torch.Generator().manual_seed(0)
    x_TD, index_Tk = torch.randn(700, HIDDEN, generator=noise).to(DTYPE), torch.rand(700, EXPERTS, generator=noise).topk(2).indices
    answers = []
    for device in ("cuda:0", "cuda:1"):
        with torch.no_grad():
            experts = factored(PIVOTED, PIVOTED, dtype=DTYPE).to(device)
            answers.append(experts(x_TD.to(device), index_Tk.to(device), torch.ones(700, 2, device=device)))
    assert torch.equal(answers[0].cpu(), answers[1].cpu())


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("case", [(PIVOTED, PER_EXPERT), (UNIFORM, DENSE)], ids=["ragged", "uniform"])
@pytest.mark.parametrize("tokens", [5, 600])
def test_calls_are_recorded_after_any_number_of_others(case: tuple[dict, dict], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MANY_ROWS", 8)
    monkeypatch.setattr(tiles._Table, "_share_of_processors", lambda *_: 1.0)
    noise = torch.Generator().manual_seed(0)
    experts = factored(*case, dtype=DTYPE).to(DEVICE)
    call = (
        torch.randn(tokens, HIDDEN, generator=noise).to(DEVICE, DTYPE),
        torch.rand(tokens, EXPERTS, generator=noise).topk(2).indices.to(DEVICE),
        torch.rand(tokens, 2, generator=noise).to(DEVICE),
    )
    with torch.no_grad():
        wanted_TD = [experts(*call) for _ in range(3)][-1]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found_TD = experts(*call)
        graph.replay()
    assert (found_TD - wanted_TD).float().norm() < 0.01 * wanted_TD.float().norm()


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_offloaded_matrices_do_not_stay_on_the_gpu() -> None:
    experts = factored(PIVOTED, PER_EXPERT, dtype=DTYPE)
    accelerate.cpu_offload(experts, DEVICE)
    call = torch.randn(5, HIDDEN, dtype=DTYPE), torch.arange(10).view(5, 2), torch.rand(5, 2)
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        experts(*(tensor.to(DEVICE) for tensor in call))
    assert experts.input._tiled is None and experts.output._tiled is None
    assert torch.cuda.memory_allocated() - before < sum(tensor.nbytes for tensor in experts.state_dict().values())


def once_tiled(side: Side) -> tiles.TiledSide | None:
    """As on a GPU: kept."""
    side._tiled = side._tiled or side._tile()
    return side._tiled


def fits_one_product(experts: FactoredExperts) -> bool:
    """Whether a side has matrices of one shape, whose rows begin where kernels read from."""
    shapes = [set(getattr(side, "ranks", [0])) for side in (experts.input, experts.output)]
    return any(len(ranks) == 1 and all(rank % 8 == 0 for rank in ranks) for ranks in shapes)
