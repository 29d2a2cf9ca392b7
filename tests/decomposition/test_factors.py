"""The forms that factors are stored in: what they stand for, what they count, what they refuse."""

import pytest
import torch

from moesvd_core.decomposition import factors as forms
from moesvd_core.decomposition.factors import (
    BaseDeltaFactors,
    DenseFactors,
    LayerFactors,
    MergedFactors,
    NarrowFactors,
    PerExpertFactors,
    PivotedFactors,
    RightGroup,
    SharedLeftFactors,
    SharedRightFactors,
    SideFactors,
    balanced,
)

W = torch.arange(24.0).reshape(2, 4, 3)


def per_expert(ranks: tuple[int, int] = (1, -1)) -> PerExpertFactors:
    sizes = [max(rank, 0) for rank in ranks]
    return PerExpertFactors(
        ranks, tuple(torch.ones(4, size) for size in sizes), tuple(torch.ones(size, 3) for size in sizes),
        {expert: W[expert] for expert, rank in enumerate(ranks) if rank < 0},
    )


def test_dense_slots_keep_the_original_and_count_in_full() -> None:
    factors = per_expert()
    assert torch.equal(factors.reconstruct()[1], W[1])
    assert torch.equal(factors.reconstruct()[0], torch.ones(4, 3))
    assert factors.parameters == 4 + 3 + 12


def test_rank_zero_stores_nothing_and_makes_zero() -> None:
    factors = per_expert((0, 0))
    assert factors.parameters == 0
    assert torch.equal(factors.reconstruct(), torch.zeros(2, 4, 3))


def test_ranks_that_do_not_fit_the_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="expert 1: rank 2 does not fit"):
        PerExpertFactors((1, 2), (torch.ones(4, 1),) * 2, (torch.ones(1, 3),) * 2, {})


def every_form() -> dict[str, SideFactors]:
    alone = RightGroup((0, 1), torch.ones(1, 3), torch.ones(2, 4, 1), ((0,), (1,)))
    return {
        "per-expert": per_expert(),
        "dense": DenseFactors(W),
        "shared right": SharedRightFactors((alone,)),
        "shared left": SharedLeftFactors(torch.ones(4, 2), torch.ones(2, 2, 3)),
        "base and deltas": BaseDeltaFactors(torch.ones(4, 3), per_expert((1, 1))),
        "pivoted": PivotedFactors(per_expert((1, 1))),
        "narrow": NarrowFactors(torch.ones(2, 2, 3), 1, 2, 4),
        "merged": MergedFactors(torch.ones(1, 4, 3), (0, 0)),
    }


@pytest.mark.parametrize("form", every_form())
def test_what_is_brought_to_the_host_is_the_same(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[torch.Tensor] = []

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        brought.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(forms, "to_host", to_host)
    made = every_form()[form]
    moved = made.on_host()
    assert type(moved) is type(made) and moved.parameters == made.parameters
    assert torch.equal(moved.reconstruct(), made.reconstruct())
    assert all(tensor is not W for tensor in brought) and (brought or form == "dense")


def test_shared_right_sums_the_named_left_factors() -> None:
    left = torch.stack([torch.full((4, 1), 1.0), torch.full((4, 1), 10.0)])
    factors = SharedRightFactors((RightGroup((0, 1), torch.ones(1, 3), left, ((1,), (0, 1))),))
    assert factors.reconstruct()[:, 0, 0].tolist() == [10.0, 11.0]
    assert factors.parameters == 8 + 3


def test_groups_are_put_back_in_the_order_of_the_experts() -> None:
    groups = tuple(RightGroup((expert,), torch.ones(1, 3), torch.full((1, 4, 1), float(expert)), ((0,),)) for expert in (1, 0))
    assert SharedRightFactors(groups).reconstruct()[:, 0, 0].tolist() == [0.0, 1.0]


def test_groups_must_hold_every_expert_once() -> None:
    group = RightGroup((0,), torch.ones(1, 3), torch.ones(1, 4, 1), ((0,),))
    with pytest.raises(ValueError, match=r"every expert once, got \[0, 0\]"):
        SharedRightFactors((group, group))


def test_sums_must_name_stored_factors() -> None:
    with pytest.raises(ValueError, match="some of 1 left factors"):
        RightGroup((0,), torch.ones(1, 3), torch.ones(1, 4, 1), ((1,),))


def test_shared_ranks_must_fit() -> None:
    with pytest.raises(ValueError, match="rank 2"):
        RightGroup((0,), torch.ones(2, 3), torch.ones(1, 4, 1), ((0,),))
    with pytest.raises(ValueError, match="rank 1"):
        SharedLeftFactors(torch.ones(4, 1), torch.ones(2, 2, 3))


def test_a_layer_counts_its_biases() -> None:
    layer = LayerFactors(0, DenseFactors(W), per_expert(), torch.zeros(2, 4), torch.zeros(2, 3))
    assert layer.parameters == 24 + 19 + 8 + 6


@pytest.mark.parametrize(("left", "right"), [((4, 2), (2, 3)), ((5, 4, 2), (2, 3)), ((4, 2), (5, 2, 3))])
def test_balancing_keeps_the_product_and_evens_the_sizes(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    left_NR, right_RM = torch.randn(left, dtype=torch.float64) * 1e6, torch.randn(right, dtype=torch.float64) * 1e-4
    even_left, even_right = balanced(left_NR, right_RM)
    torch.testing.assert_close(even_left @ even_right, left_NR @ right_RM)
    assert 0.2 < float(even_left.square().mean() / even_right.square().mean()) < 5


def test_balancing_leaves_zeros_alone() -> None:
    left, right = balanced(torch.zeros(4, 2), torch.ones(2, 3))
    assert torch.equal(left, torch.zeros(4, 2))
    assert torch.equal(right, torch.ones(2, 3))
