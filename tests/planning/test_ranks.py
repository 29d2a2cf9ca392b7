"""Three numbers for the ranks of a side."""

from moesvd_core.planning import DENSE, Ranks


def test_the_median_is_a_rank_of_what_is_decomposed() -> None:
    assert Ranks.of([96, 80, 104, 88]) == Ranks(80, 88, 104, 0)
    assert Ranks.of([DENSE, 0, DENSE, DENSE]) == Ranks(0, 0, 0, 3)
    assert Ranks.of([DENSE, 24, 8, 16, DENSE]) == Ranks(8, 16, 24, 2)
    assert Ranks.of([DENSE]) == Ranks(0, 0, 0, 1)
