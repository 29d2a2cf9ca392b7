"""The assignment of largest gain, against all permutations."""

from itertools import permutations

import numpy as np
import pytest

from moesvd_core.decomposition.assignment import best_assignment


@pytest.mark.parametrize("size", [1, 2, 5, 7])
@pytest.mark.parametrize("digits", [0, 1, 8])
def test_no_permutation_gains_more(size: int, digits: int) -> None:
    rng = np.random.default_rng(size)
    every = np.array(list(permutations(range(size))))
    for _ in range(20):
        gain_MM = rng.normal(size=(size, size)).round(digits)  # few digits: many ties
        column_M = best_assignment(gain_MM)
        assert sorted(column_M.tolist()) == list(range(size))
        assert gain_MM[np.arange(size), column_M].sum() == pytest.approx(gain_MM[np.arange(size), every].sum(1).max())


def test_a_shuffled_order_is_found_again() -> None:
    rng = np.random.default_rng(0)
    vector_MD = rng.normal(size=(200, 16))
    order_M = rng.permutation(200)
    found_M = best_assignment(vector_MD @ (vector_MD[order_M] + 0.05 * rng.normal(size=(200, 16))).T)
    assert np.array_equal(order_M[found_M], np.arange(200))
