"""A few numbers, and words, for the ranks of a side."""

import pytest

from moesvd_core.planning import DENSE, Ranks


def test_the_median_is_a_rank_of_what_is_decomposed() -> None:
    assert Ranks.of([96, 80, 104, 88]) == Ranks(80, 88, 104, 0, 4)
    assert Ranks.of([DENSE, 0, DENSE, DENSE]) == Ranks(0, 0, 0, 3, 4)
    assert Ranks.of([DENSE, 24, 8, 16, DENSE]) == Ranks(8, 16, 24, 2, 5)
    assert Ranks.of([DENSE]) == Ranks(0, 0, 0, 1, 1)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([DENSE, DENSE], "dense"), ([8, 8], "8"), ([0, 24, 8, DENSE], "0 · 8 · 24, 1 dense"),
        ([0, 24, 8, 32], "0 · 8 · 32"), ([0, 0], "0"), ([0, DENSE, DENSE, DENSE], "3 of 4"),
    ],
)
def test_ranks_in_words(ranks: list[int], words: str) -> None:
    assert Ranks.of(ranks).words == words
