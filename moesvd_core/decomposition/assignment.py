"""Which neuron of one expert corresponds to which of another: the assignment of largest total gain, exactly.

Shapes: M items on either side.
"""

import numpy as np
from numpy.typing import NDArray


def best_assignment(gain_MM: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each row the column that it gets, [M], so that the gains add up to the most.

    Shortest augmenting paths over reduced costs (the Hungarian method after Jonker and Volgenant): most rows are settled by their first
    choice, the others by a search whose steps are operations on whole rows.
    """
    cost_MM = gain_MM.max() - gain_MM
    size = len(cost_MM)
    price_M = cost_MM.min(axis=0)
    reduced_MM = cost_MM - price_M
    value_M = reduced_MM.min(axis=1)
    row_of_M, column_of_M = np.full(size, -1), np.full(size, -1)
    for row, column in enumerate(reduced_MM.argmin(axis=1)):
        if row_of_M[column] < 0:
            row_of_M[column], column_of_M[row] = row, column
    for start in np.flatnonzero(column_of_M < 0):
        _augment(cost_MM, value_M, price_M, row_of_M, column_of_M, int(start))
    return column_of_M


def _augment(
    cost_MM: NDArray[np.float64],
    value_M: NDArray[np.float64],
    price_M: NDArray[np.float64],
    row_of_M: NDArray[np.int64],
    column_of_M: NDArray[np.int64],
    start: int,
) -> None:
    """Give one more row a column, along the path of least reduced cost; settled pairs may change partners."""
    size = len(cost_MM)
    distance_M, before_M = np.full(size, np.inf), np.full(size, -1)
    open_M = np.ones(size, dtype=np.bool_)
    row, reached = start, 0.0
    while True:
        ahead_M = reached + cost_MM[row] - value_M[row] - price_M
        closer_M = open_M & (ahead_M < distance_M)
        distance_M[closer_M], before_M[closer_M] = ahead_M[closer_M], row
        column = int(np.where(open_M, distance_M, np.inf).argmin())
        reached = float(distance_M[column])
        if row_of_M[column] < 0:
            break
        open_M[column] = False
        row = int(row_of_M[column])
    done_M = np.flatnonzero(~open_M)
    value_M[start] += reached
    value_M[row_of_M[done_M]] += reached - distance_M[done_M]
    price_M[done_M] -= reached - distance_M[done_M]
    while True:
        row = int(before_M[column])
        row_of_M[column] = row
        column, column_of_M[row] = int(column_of_M[row]), column
        if row == start:
            return
