"""A CPU's own kernels give what float64 gives, within the rounding of bfloat16, and nothing where they are not."""

import copy
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Barrier
from time import sleep
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from random_experts import (
    CASES,
    DENSE,
    EXPERTS,
    MANY_RANKS,
    MIXED,
    PER_EXPERT,
    PIVOTED,
    PIVOTED_MIXED,
    WIDTH,
    call_of,
    factored,
    reference,
)
from tiny_factors import model_factors
from tiny_models import TINY, tiny_batch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moesvd_core import cpu_kernels, cpu_tiles, tiles
from moesvd_core.checkpoint.apply import compressed, factored_modules, pack
from moesvd_core.cpu_kernels import SWITCH, compiled_library, cpu_library
from moesvd_core.cpu_tiles import CpuTiles, combined, cpu_times
from moesvd_core.experts import FactoredExperts, Gate, swiglu
from moesvd_core.grouped import times
from moesvd_core.tiles import TiledSide

needs_kernels = pytest.mark.skipif(cpu_library() is None, reason="this processor has no kernels of ours, or there is no C compiler")
MERGED = {"structure": "merged", "groups": [0, 1, 0, 2, 1, 0, 0, 2, 2, 1, 0]}
ALL_CASES = [*CASES, (MERGED, DENSE), (MERGED, MERGED), (PER_EXPERT, PIVOTED)]
TANH: Gate = lambda pre: pre[:, :WIDTH].tanh() * pre[:, WIDTH:]  # noqa: E731


def near(found: torch.Tensor, wanted: torch.Tensor, error: float = 0.012) -> bool:
    """Within what bfloat16 rounds on the way: the latents, the neurons and the answer."""
    return bool((found.double() - wanted.double()).norm() <= error * wanted.double().norm())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills up with the number of pairs of every product that the kernels computed."""
    went, real = list[int](), CpuTiles.multiply
    monkeypatch.setattr(CpuTiles, "multiply", lambda own, *call, **more: went.append(len(own.expert_P)) or real(own, *call, **more))
    return went


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 5, 40, 700])
@pytest.mark.parametrize("case", range(len(ALL_CASES)))
@pytest.mark.parametrize("gate", [swiglu, TANH], ids=["swiglu", "another"])
def test_answers_are_those_of_the_multiplied_out_matrices(case: int, tokens: int, gate: Gate, asked: list[int]) -> None:
    experts, (x_TD, index_Tk, weight_Tk) = factored(*ALL_CASES[case], gate), call_of(tokens)
    index_Tk[index_Tk == 4] = 3 if tokens == 5 else 4  # an expert that nobody asks
    wanted_TD = reference(experts, x_TD, index_Tk, weight_Tk)
    with torch.no_grad():
        assert near(experts(x_TD, index_Tk, weight_Tk), wanted_TD)
        assert near(experts(x_TD, index_Tk, weight_Tk.bfloat16()), wanted_TD)
        full_TD = experts(x_TD, index_Tk, None)
    assert near(full_TD, reference(experts, x_TD, index_Tk, torch.ones_like(weight_Tk)))
    assert asked


@needs_kernels
@pytest.mark.parametrize("case", [(PIVOTED_MIXED, PIVOTED_MIXED), (MANY_RANKS, MIXED), (DENSE, MERGED)], ids=["pivoted", "ragged", "dense"])
@pytest.mark.parametrize("most", [1, 7, 100, 1399])
def test_pairs_pass_some_at_a_time(case: tuple[dict, dict], most: int, asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    experts, call = factored(*case), call_of(700 if most > 7 else 60)
    wanted_TD = reference(experts, *call)
    monkeypatch.setattr(cpu_tiles, "PART_NUMBERS", most * 2 * WIDTH)
    with torch.no_grad():
        assert near(experts(*call), wanted_TD)
    assert max(asked) <= most
    pairs = call[1].numel()
    assert len(asked) < 4 * len(asked) * most / pairs + 8 * (pairs / most + EXPERTS), "whole experts where they fit, so not many more parts"


@settings(max_examples=150, deadline=None)
@given(
    counts=some.lists(some.sampled_from([0, 1, 2, 3, 5, 6, 7, 15, 16, 17, 31, 239, 241, 490]), min_size=1, max_size=4),
    shapes=some.lists(
        some.tuples(
            some.sampled_from([0, 1, 3, 4, 7, 8, 31, 32, 33, 100]), some.sampled_from([0, 1, 2, 31, 32, 33, 63, 65, 200, 1023, 1025, 1100])
        ),
        min_size=4,
        max_size=4,
    ),
    gathered=some.booleans(),
    identity=some.booleans(),
    threads=some.sampled_from([1, 2, 3]),
)
@needs_kernels
def test_products_of_any_shapes(
    counts: list[int], shapes: list[tuple[int, int]], gathered: bool, identity: bool, threads: int
) -> None:
    """With not-a-numbers wherever nothing should be read: behind rows of x, and between those of matrices."""
    noise = torch.Generator().manual_seed(sum(counts))
    shapes = shapes[: len(counts)]
    held = [torch.full((rows, columns + 5), torch.nan, dtype=torch.bfloat16) for rows, columns in shapes]
    matrices = [each[:, : columns] for each, (_, columns) in zip(held, shapes, strict=True)]
    for each in matrices:
        each.copy_(torch.randn(each.shape, generator=noise))
    expert_P = torch.tensor([expert for expert, count in enumerate(counts) for _ in range(count)], dtype=torch.int32)
    pairs, widest = len(expert_P), max(columns + rows * identity for rows, columns in shapes)
    x_SC = torch.full((pairs + 1, widest + 7), torch.nan, dtype=torch.bfloat16)
    row_P = torch.randperm(pairs, generator=noise).to(torch.int32) if gathered else torch.arange(pairs, dtype=torch.int32)
    for pair, expert in enumerate(expert_P.tolist()):
        rows, columns = shapes[expert]
        x_SC[row_P[pair], : columns + rows * identity] = torch.randn(columns + rows * identity, generator=noise)
    y_PN = torch.full((pairs, 110), 7.0, dtype=torch.bfloat16)
    entry_EF = torch.tensor([[each.data_ptr(), *shape, each.stride(0), 0] for each, shape in zip(matrices, shapes, strict=True)])
    own = CpuTiles(expert_P, row_P, torch.tensor(counts).cumsum(0).to(torch.int32))
    used = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        own.multiply(entry_EF, 1, x_SC, row_P if gathered else None, y_PN, across=False, after_identity=identity)
    finally:
        torch.set_num_threads(used)
    for pair, expert in enumerate(expert_P.tolist()):
        rows, columns = shapes[expert]
        own = x_SC[row_P[pair]].double()
        wanted_N = matrices[expert].double() @ own[rows * identity : rows * identity + columns] + (own[:rows] if identity else 0)
        assert (y_PN[pair, :rows].double() - wanted_N).abs().max() <= 0.004 * wanted_N.abs().max() + 0.02 if rows else True
        assert (y_PN[pair, rows:] == 7).all(), "nothing beside the answer is written"


@needs_kernels
@pytest.mark.parametrize("count", [1, 5, 15, 16, 40, 500])
@pytest.mark.parametrize("across", [True, False], ids=["side by side", "one below the other"])
@pytest.mark.parametrize("added_up", [True, False])
def test_pieces_of_any_shapes(count: int, across: bool, added_up: bool) -> None:
    """Two experts of three pieces, of which each lacks some."""
    side_by_side = [[(70, 33), (70, 8)], [(70, 0), (70, 101)], [None, (70, 40)]]
    shapes = side_by_side if across else [[(33, 64), None], [(8, 64), (50, 64)], [None, (1, 64)]]
    pieces = [[None if shape is None else torch.randn(shape).bfloat16() for shape in piece] for piece in shapes]
    table = tiles._Table(pieces, across=across, added_up=added_up and across)
    expert_P = torch.tensor([0] * count + [1] * (count // 2), dtype=torch.int32)
    own = CpuTiles(expert_P, expert_P, torch.tensor([count, count + count // 2], dtype=torch.int32))
    x_PC, y_PN = torch.randn(len(expert_P), 160).bfloat16(), torch.full((len(expert_P), 80), 7.0).bfloat16()
    table.multiply(x_PC, None, y_PN, own)
    for pair, expert in enumerate(expert_P.tolist()):
        wanted_N, place = torch.full((80,), 7.0).double(), 0
        if across:
            wanted_N[:70] = 0
        for matrix in (piece[expert] for piece in pieces if piece[expert] is not None):
            rows, columns = matrix.shape
            if across:
                wanted_N[:70] += matrix.double() @ x_PC[pair, place : place + columns].double()
                place += 0 if added_up else columns
            else:
                wanted_N[place : place + rows] = matrix.double() @ x_PC[pair, :64].double()
                place += rows
        assert (y_PN[pair].double() - wanted_N).abs().max() <= 0.004 * wanted_N.abs().max() + 0.02


@needs_kernels
@pytest.mark.parametrize("rows", [0, 1, 5, 16, 300])
@pytest.mark.parametrize("shape", [(24, 96), (33, 1100), (100, 31)], ids=str)
def test_one_matrix_for_all_rows(rows: int, shape: tuple[int, int]) -> None:
    weight_NC, x_QC = torch.randn(shape).bfloat16(), torch.randn(rows, shape[1]).bfloat16()
    wanted_QN = x_QC.double() @ weight_NC.double().T
    for given_QC in (x_QC, x_QC.t().contiguous().t()):
        made_QN = cpu_times(given_QC, weight_NC)
        assert made_QN is not None
        assert near(made_QN, wanted_QN, 0.004)
    assert cpu_times(x_QC.float(), weight_NC) is None
    assert cpu_times(x_QC, weight_NC.float()) is None
    assert cpu_times(x_QC, weight_NC.t().contiguous().t()) is None


@needs_kernels
def test_pairs_are_arranged_as_a_stable_sort_does_and_added_up_in_the_routers_order() -> None:
    index_Tk = torch.randint(0, 9, (50, 3))
    tiles, place_P = CpuTiles.arranged(index_Tk, 12)
    expert_P, order_P = torch.sort(index_Tk.flatten(), stable=True)
    assert torch.equal(tiles.expert_P.long(), expert_P)
    assert torch.equal(tiles.token_P.long(), order_P // 3)
    assert torch.equal(order_P[place_P.long()], torch.arange(150))
    assert torch.equal(tiles.end_E.long(), index_Tk.flatten().bincount(minlength=12).cumsum(0))
    y_PN, weight_Tk = torch.randn(150, 70).bfloat16(), torch.rand(50, 3)
    wanted_TN = (y_PN[place_P.long()].view(50, 3, 70).double() * weight_Tk.double()[..., None]).sum(1)
    assert near(combined(y_PN, place_P, weight_Tk, 3), wanted_TN, 0.004)
    assert torch.equal(combined(y_PN, place_P, weight_Tk.t().contiguous().t(), 3), combined(y_PN, place_P, weight_Tk, 3))


@needs_kernels
def test_the_gate_is_that_of_torch_to_the_last_bits_of_bfloat16_and_at_its_ends() -> None:
    gate_M = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e-30])])
    pre_PN = torch.stack([gate_M, torch.ones_like(gate_M)]).flatten()[None].bfloat16()
    tiles, _ = CpuTiles.arranged(torch.zeros(1, 1, dtype=torch.int64), 1)
    found_M = tiles.in_order(pre_PN, None, None, gated=True)[0].float()
    wanted_M = torch.nn.functional.silu(pre_PN[0, : len(gate_M)].double()).bfloat16().float()
    assert torch.equal(found_M.isnan(), wanted_M.isnan())
    there = ~wanted_M.isnan() & ((wanted_M.abs() > 1e-36) | (wanted_M == 0))  # exp(-gate) overflows where they are smaller
    assert ((found_M - wanted_M).abs()[there] <= wanted_M.abs()[there] * 2**-8).logical_or(found_M[there] == wanted_M[there]).all()


@needs_kernels
@pytest.mark.parametrize("wrong", [-1, EXPERTS])
def test_an_expert_that_there_is_not_is_refused(wrong: int) -> None:
    x_TD, index_Tk, weight_Tk = call_of(3)
    index_Tk[1, 1] = wrong
    with torch.no_grad(), pytest.raises(IndexError, match=f"experts .* but there are 0 to {EXPERTS - 1}"):
        factored(DENSE, DENSE)(x_TD, index_Tk, weight_Tk)


@needs_kernels
def test_threads_answer_at_the_same_time() -> None:
    experts, call = factored(PIVOTED, MANY_RANKS), call_of(300)
    with torch.no_grad():
        alone = experts(*call)

    @torch.no_grad()
    def answer(_: int) -> torch.Tensor:
        made: torch.Tensor = experts(*call)
        return made

    with ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(each, alone) for each in threads.map(answer, range(40)))


CHANGES: dict[str, Callable[[FactoredExperts], object]] = {
    "in place": lambda experts: [parameter.mul_(2) for parameter in experts.parameters()],
    "data": lambda experts: [setattr(parameter, "data", parameter * 2) for parameter in experts.parameters()],
    "loaded": lambda experts: experts.load_state_dict(doubled(experts)),
    "assigned": lambda experts: experts.load_state_dict(doubled(experts), assign=True),
    "cast": lambda experts: CHANGES["in place"](experts.double().to(torch.bfloat16)),
    "not in order": lambda experts: [
        setattr(parameter, "data", (parameter * 2).transpose(-1, -2).contiguous().transpose(-1, -2))
        for parameter in experts.parameters()
        if parameter.ndim > 2
    ] + [parameter.mul_(2) for parameter in experts.parameters() if parameter.ndim == 2],
}
"""How parameters may come to be twice what they were."""


def doubled(experts: FactoredExperts) -> dict[str, torch.Tensor]:
    return {name: tensor * (2 if tensor.is_floating_point() else 1) for name, tensor in experts.state_dict().items()}


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("case", [(PIVOTED, PIVOTED_MIXED), (MIXED, MANY_RANKS), (DENSE, MERGED)], ids=["pivoted", "ragged", "dense"])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_changed_are_followed(change: str, case: tuple[dict, dict]) -> None:
    experts, call = factored(*case), call_of(20)
    with torch.no_grad():
        before = experts(*call)
        CHANGES[change](experts)
        after = experts(*call)
        assert near(after, reference(copy.deepcopy(experts), *call), 0.02)
    assert not near(after, before, 0.5)


def test_training_goes_on_between_answers(computed_by: str, asked: list[int]) -> None:
    experts, call = factored(PIVOTED, PER_EXPERT).requires_grad_(True), call_of(20)
    step = torch.optim.SGD(experts.parameters(), lr=0.01)
    for _ in range(3):
        with torch.no_grad():
            answer = experts(*call)
        recorded = experts(*call)
        assert near(answer, recorded.detach(), 0.02)
        recorded.float().square().mean().backward()
        step.step()
        step.zero_grad()
    assert bool(asked) == (computed_by == "kernels")


@pytest.mark.usefixtures("computed_by")
def test_matrices_that_are_read_in_another_order_of_the_same_memory_are_followed() -> None:
    experts, call = factored(DENSE, DENSE), call_of(20)
    with torch.no_grad():
        experts(*call)
        for parameter in (experts.input.weight, experts.output.weight):
            _, rows, columns = parameter.shape
            other = (1, rows) if parameter.stride(2) == 1 else (columns, 1)
            parameter.data = parameter.data.as_strided(parameter.shape, (rows * columns, *other))
        assert near(experts(*call), reference(copy.deepcopy(experts), *call))


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_answers_as_in_more_bits(name: str, asked: list[int]) -> None:
    """Biases, scaled inputs, experts without a gate or with one of their own."""
    model = TINY[name]()
    for module in factored_modules(compressed(model, model_factors(model))).values():
        rounded = module.to(torch.bfloat16)
        exact, hidden = copy.deepcopy(rounded).double(), rounded.expert_layer["hidden"]
        call: tuple[torch.Tensor, ...] = torch.randn(9, hidden).bfloat16(), torch.randint(rounded.num_experts, (9, 2)), torch.rand(9, 2)
        if rounded.expert_layer["routing"] == "scaled-inputs":
            call = (torch.randn(rounded.num_experts * 9, hidden).bfloat16(),)
        with torch.no_grad():
            assert near(rounded(*call), exact(call[0].double(), *call[1:]), 0.015)
        assert bool(asked) == (cpu_library() is not None)


@needs_kernels
def test_there_is_nothing_to_pack_and_a_model_generates() -> None:
    model = TINY["mixtral"]().bfloat16()
    student = compressed(model, model_factors(model, forms=[("pivoted", "pivoted"), ("many-ranks", "basis")]))
    before = {name: tensor.data_ptr() for name, tensor in student.named_parameters()}
    assert pack(student) == 0
    answer = student.generate(**tiny_batch(), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] == tiny_batch()["input_ids"].shape[1] + 4
    assert {name: tensor.data_ptr() for name, tensor in student.named_parameters()} == before, "parameters stay where they are"


@needs_kernels
@pytest.mark.parametrize("inference", [True, False])
def test_autocast_and_inference_mode_change_nothing(inference: bool, asked: list[int]) -> None:
    experts, (x_TD, *choice) = factored(PIVOTED, PIVOTED), call_of(30)
    with torch.no_grad():
        wanted = experts(x_TD, *choice)
    with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(experts(x_TD, *choice), wanted)
        found = experts(x_TD.float(), *choice)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted.float())
    assert len(asked) % 3 == 0, "three answers, all by kernels"
    assert asked


def compilers(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any] | None = None) -> list[str]:
    """Let a processor be one that the kernels are for, and what starts a compiler be `run` (None: there is none); fills up with the
    compilers that were looked for."""
    tried = list[str]()
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(cpu_kernels.platform, "system", lambda: "Linux")
    monkeypatch.setattr(cpu_kernels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(cpu_kernels.shutil, "which", lambda name: tried.append(name) or (name if run else None))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(cpu_kernels.subprocess, "run", run)
    return tried


def failing(command: Sequence[str], **_: Any) -> None:
    raise subprocess.CalledProcessError(1, command, stderr="unknown option -fopenmp")


def writing_nothing(command: Sequence[str], **_: Any) -> None:
    Path(command[-1]).write_bytes(b"")


def test_without_a_compiler_torch_computes_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setenv("CC", "another-cc -m64")
    tried = compilers(monkeypatch)
    assert compiled_library() is None
    assert tried == ["another-cc", "gcc"]
    assert not recwarn.list


def without_a_folder(command: Sequence[str], **_: Any) -> None:
    raise FileNotFoundError("No usable temporary directory found")


REASONS = [(failing, "unknown option -fopenmp"), (writing_nothing, "file too short"), (without_a_folder, "No usable temporary directory")]


@pytest.mark.parametrize(("run", "reason"), REASONS)
def test_a_compiler_that_cannot_is_named_once(run: Callable[..., Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    tried = compilers(monkeypatch, run)
    with pytest.warns(UserWarning, match=rf"experts are slower on this CPU.*\({SWITCH}=0 does without\): cc: .*{reason}"):
        assert compiled_library() is None
    assert tried == ["cc", "gcc"]


@pytest.mark.parametrize("name", ['gcc "', " "])
def test_a_compiler_s_name_that_is_none_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", name)
    compilers(monkeypatch, failing)
    with pytest.warns(UserWarning, match="could not be compiled"):
        assert compiled_library() is None


@needs_kernels
def test_a_compiler_may_speak_any_language(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_bytes(b'#!/bin/sh\nprintf "\\351\\n" >&2\nexec gcc "$@"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    assert compiled_library() is not None


def test_threads_that_ask_first_at_the_same_time_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, start = list[int](), Barrier(4)
    monkeypatch.setattr(cpu_kernels, "_made_once", cache(lambda: made.append(1) or sleep(0.02)))

    def ask(_: int) -> None:
        start.wait()
        cpu_library()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ask, range(4)))
    assert made == [1]


@needs_kernels
def test_memory_that_is_short_is_an_error() -> None:
    with pytest.raises(MemoryError, match="found no memory"):
        cpu_tiles._require_memory(1)


@needs_kernels
@pytest.mark.parametrize("sums", [[[0], [], [1], [0, 1]] + [[]] * 7, [[]] * EXPERTS], ids=["some", "all"])
def test_experts_that_add_up_nothing_answer_nothing(sums: list[list[int]], asked: list[int]) -> None:
    group = {"experts": list(range(EXPERTS)), "rank": 24, "stored": 2, "sums": sums}
    spec = {"structure": "shared-right", "groups": [group]}
    for case in ((spec, DENSE), (DENSE, spec)):
        experts, call = factored(*case), call_of(40)
        with torch.no_grad():
            assert near(experts(*call), reference(experts, *call))
    assert asked


class Watch(TorchDispatchMode):
    """Does what is asked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class OnlyWatch(Watch):
    only_watches = True


@needs_kernels
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own way to derivatives of some operations
def test_who_looks_at_every_operation_sees_them_all(asked: list[int]) -> None:
    experts, call = factored(PIVOTED, PER_EXPERT), call_of(40)
    weight_NC, x_QC = torch.randn(24, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        wanted = experts(*call)
        asked.clear()
        with FlopCounterMode(display=False) as counter:
            assert near(experts(*call), wanted, 0.02)
            times(x_QC, weight_NC)
        assert counter.get_total_flops() > 2 * 5 * 24 * 64
        traced = make_fx(lambda x: times(x, weight_NC))(x_QC)
        assert torch.equal(traced(2 * x_QC), times(2 * x_QC, weight_NC))
        assert torch.vmap(lambda x: times(x, weight_NC))(x_QC.expand(3, 5, 64)).shape == (3, 5, 24)
        _, tangent = torch.func.jvp(lambda x: times(x, weight_NC), (x_QC,), (x_QC,))
        assert near(tangent, x_QC.double() @ weight_NC.double().T, 0.01)
        assert not asked
        for mode, used in ((Watch(), False), (OnlyWatch(), True)):
            with mode:
                assert near(experts(*call), wanted, 0.02)
            assert bool(asked) == used
    assert all(parameter.stride(-1) == 1 for parameter in experts.parameters()), "kernels would not read them again"


@needs_kernels
@pytest.mark.parametrize("wrong", ["hidden too narrow", "hidden of three dimensions", "too few tokens", "too few weights"])
def test_what_does_not_fit_is_left_to_torch_to_refuse(wrong: str, asked: list[int]) -> None:
    experts, (x_TD, index_Tk, weight_Tk) = factored(PER_EXPERT, DENSE), call_of(600)
    given = {
        "hidden too narrow": (x_TD[:, :32].contiguous(), index_Tk, weight_Tk),
        "hidden of three dimensions": (x_TD[None], index_Tk, weight_Tk),
        "too few tokens": (x_TD[:300], index_Tk, weight_Tk),
        "too few weights": (x_TD, index_Tk, weight_Tk[:300]),
    }
    with torch.no_grad(), pytest.raises((RuntimeError, IndexError, ValueError, NotImplementedError)):
        experts(*given[wrong])
    assert not asked
    assert cpu_times(x_TD[None], torch.randn(8, 64).bfloat16()) is None
    assert cpu_times(x_TD, torch.randn(8, 32).bfloat16()) is None


@needs_kernels
def test_the_default_device_does_not_matter_nor_what_kind_of_tensor_hidden_states_are(asked: list[int]) -> None:
    experts, (x_TD, index_Tk, weight_Tk) = factored(PIVOTED, MANY_RANKS), call_of(40)
    with torch.no_grad():
        wanted = experts(x_TD, index_Tk, weight_Tk)
        with torch.device("meta"):
            assert torch.equal(experts(x_TD, index_Tk, weight_Tk), wanted)
        count = len(asked)
        assert torch.equal(experts(nn.Parameter(x_TD), index_Tk, weight_Tk), wanted)
        assert len(asked) > count


@pytest.mark.parametrize("why", ["switched off", "another system", "another processor", "no vectors of 512 bits", "matrix units"])
def test_nothing_is_compiled_where_it_would_not_be_used(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = compilers(monkeypatch)
    if why == "switched off":
        monkeypatch.setenv(SWITCH, "0")
    elif why == "another system":
        monkeypatch.setattr(cpu_kernels.platform, "system", lambda: "Darwin")
    elif why == "another processor":
        monkeypatch.setattr(cpu_kernels.platform, "machine", lambda: "aarch64")
    elif why == "no vectors of 512 bits":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    else:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert compiled_library() is None
    assert not tried


@needs_kernels
def test_processors_without_products_of_bfloat16_compute_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of the years before compute in float32; this one's own instructions for bfloat16 are kept from the compiler."""
    compiler = tmp_path / "older-cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-march=native*) exec cc "$@" -mno-avx512bf16;; *) exec cc "$@";; esac\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    older = compiled_library()
    assert older is not None
    answers = []
    for library in (cpu_library(), older):
        monkeypatch.setattr(cpu_tiles, "cpu_library", lambda library=library: library)
        with torch.no_grad():
            answers.append([factored(*case)(*call_of(tokens)) for case in ALL_CASES for tokens in (1, 40, 300)])
    for one, other in zip(*answers, strict=True):
        assert near(one, other, 0.004)
    ends = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.39e38, 1.0, 1 + 2**-7 + 2**-8, 1 + 2**-8, 0.0])
    rounded = combined(torch.stack([ends.bfloat16(), torch.zeros(8).bfloat16()]), torch.tensor([0, 1], dtype=torch.int32), None, 2)
    assert torch.equal(rounded[0].isnan(), ends.isnan())
    assert torch.equal(rounded[0, 1:], ends[1:].bfloat16())


@needs_kernels
def test_what_was_compiled_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_kernels.tempfile, "tempdir", str(tmp_path))
    assert compiled_library() is not None
    assert not list(tmp_path.iterdir())


def test_matrices_of_other_numbers_are_left_to_torch() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        experts, call = factored(PIVOTED, PER_EXPERT, dtype=dtype), call_of(20, dtype=dtype)
        assert experts.input.tiled() is None
        with torch.no_grad():
            assert near(experts(*call), reference(experts, *call), 0.02)


def test_a_side_is_described_once_for_as_long_as_its_parameters_stay() -> None:
    experts, call = factored(PIVOTED, PER_EXPERT), call_of(20)
    made: list[TiledSide | None] = []
    with torch.no_grad():
        for _ in range(2):
            experts(*call)
            made.append(experts.input.tiled())
    assert made[0] is made[1]
    assert (made[0] is None) == (cpu_library() is None)
    assert os.environ.get(SWITCH) != "0" or made[0] is None
