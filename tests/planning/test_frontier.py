"""Hulls against plain geometry."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_curves import curve, random_losses

from moesvd_core.planning.frontier import PRICES, frontier, lower_hull, path
from moesvd_core.planning.recipe import Budget


def hull_by_definition(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the lower hull: points below every chord that spans them."""
    corners = []
    for x, y in points:
        left, right = [p for p in points if p[0] < x], [p for p in points if p[0] > x]
        chords = [a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0]) for a in left for b in right]
        if all(y < chord - 1e-12 for chord in chords) and all(y < p[1] for p in points if p[0] == x and p != (x, y)):
            corners.append((x, y))
    return corners


@pytest.mark.parametrize("seed", range(20))
def test_lower_hull_of_several_runs_is_each_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    runs = [(np.cumsum(rng.integers(1, 5, size)).astype(float), rng.random(size) * 10) for size in rng.integers(2, 15, 4)]
    first_F = np.concatenate([np.arange(len(x)) == 0 for x, _ in runs])
    corner_V, slope_V = lower_hull(np.concatenate([x for x, _ in runs]), np.concatenate([y for _, y in runs]), first_F)
    expected, start = [], 0
    for x, y in runs:
        points = list(zip(x.tolist(), y.tolist(), strict=True))
        expected += [start + points.index(corner) for corner in hull_by_definition(points)]
        start += len(points)
    assert corner_V.tolist() == expected
    for start_V in np.split(slope_V, np.flatnonzero(first_F[corner_V])[1:]):
        assert (np.diff(start_V[1:]) > 0).all()


def test_path_starts_with_nothing_and_ends_dense() -> None:
    found = path(curve([[4.0, 2.0, 1.0], [3.0, 2.5, 2.0]], dense_cost=3), block=1)
    assert found.ranks(np.array([0, found.slot_K.size])).tolist() == [[0, 0], [-1, -1]]
    assert (found.parameters_K[0], found.parameters_K[-1]) == (0, 6)
    assert (found.loss_K[0], found.loss_K[-1]) == (pytest.approx(7.0), 0.0)


def test_states_asked_for_out_of_order_come_back_in_the_order_asked() -> None:
    found = path(curve(random_losses(np.random.default_rng(1), 3, 6), rank_cost=2, dense_cost=15), block=1)
    states = np.array([5, 0, 9, 5])
    together = found.ranks(states)
    assert together.tolist() == [found.ranks(states[[place]])[0].tolist() for place in range(4)]


@pytest.mark.parametrize("seed", range(10))
def test_totals_of_every_state_are_those_of_its_ranks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = curve(random_losses(rng, 3, 7, convex=False), rank_cost=[1, 2, 3], dense_cost=[6, 15, 20], load=[0.2, 1.0, 0.5])
    found = path(made, block=2, price=PRICES["flops" if seed % 2 else "parameters"])
    for state, ranks in enumerate(found.ranks(np.arange(found.slot_K.size + 1)).tolist()):
        kept = list(enumerate(ranks))
        assert found.parameters_K[state] == sum(made.dense_cost_S[s] if r < 0 else r * made.rank_cost_S[s] for s, r in kept)
        assert found.loss_K[state] == pytest.approx(sum(0.0 if r < 0 else made.loss_SR[s, r] for s, r in kept))
        assert found.flops_K[state] == pytest.approx(sum(made.dense_flops_S[s] if r < 0 else r * made.rank_flops_S[s] for s, r in kept))


@pytest.mark.parametrize("price", PRICES)
def test_a_path_with_a_base_pays_for_it_in_every_state_and_ends_before_it_is_larger_than_the_original(price: Budget) -> None:
    made = replace(curve(random_losses(np.random.default_rng(0), 4, 8), rank_cost=2, dense_cost=20), fixed_cost=20, fixed_flops=5.0)
    found = path(made, block=1, price=PRICES[price])
    whole = path(replace(made, fixed_cost=0, fixed_flops=0.0), block=1, price=PRICES[price])
    count = found.slot_K.size
    assert 0 < count < whole.slot_K.size
    assert (found.parameters_K == whole.parameters_K[: count + 1] + 20).all() and found.parameters_K[-1] < made.dense_parameters
    assert (found.flops_K == whole.flops_K[: count + 1] + 5.0).all()
    assert (found.loss_K == whole.loss_K[: count + 1]).all()
    larger = whole.parameters_K[count + 1] + 20 >= made.dense_parameters
    assert found.cost_K[-1] < whole.cost_K[-1] and (larger or found.cost_K[0] + whole.cost_K[count + 1] >= whole.cost_K[-1])


def test_a_base_that_is_larger_than_the_original_leaves_a_path_of_one_state() -> None:
    made = replace(curve([[3.0, 1.0]] * 2, rank_cost=2, dense_cost=5), fixed_cost=10)
    assert path(made, block=1).parameters_K.tolist() == [10]


@pytest.mark.parametrize("seed", range(30))
def test_frontier_over_structures_is_the_hull_of_all_their_corners(seed: int) -> None:
    rng = np.random.default_rng(seed)
    own = curve(random_losses(rng, 3, 9), rank_cost=2, dense_cost=20)
    total = float(own.loss_SR[:, 0].sum())
    shared_R = np.append(total, np.sort(rng.random(7) * total)[::-1])
    shared = curve([shared_R], structure="latent", rank_cost=7, dense_cost=60)
    deltas = curve(own.loss_SR * rng.uniform(0.1, 1.0), structure="base-delta", rank_cost=2, dense_cost=20)
    based = replace(deltas, fixed_cost=int(rng.integers(1, 30)))
    paths = tuple(path(each, block=1) for each in rng.permutation(np.array([own, shared, based], dtype=object)).tolist())
    front = frontier(paths)
    points = {(float(x), round(float(y), 9)) for each in paths for x, y in zip(each.cost_K, each.loss_K, strict=True)}
    expected = hull_by_definition(sorted(points))
    assert list(zip(front.cost_V.tolist(), [round(y, 9) for y in front.loss_V.tolist()], strict=True)) == expected
    for each, state, cost in zip(front.path_V, front.state_V, front.cost_V, strict=True):
        assert paths[each].cost_K[state] == cost
