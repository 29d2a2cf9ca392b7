"""Ranks of one side of a plan in three numbers, the same ones wherever a plan is shown."""

from collections.abc import Sequence
from dataclasses import dataclass

from moesvd_core.planning.curves import DENSE


@dataclass(frozen=True)
class Ranks:
    """What is left of the ranks of one side of a layer's plan: a large model has hundreds, at each of 81 ratios.

    Attributes:
        least, median, most: of the slots that are decomposed; 0 when none is. The median is the lower one: a rank that there is.
        dense: slots that stay as they are.
        slots: all of them.
    """

    least: int
    median: int
    most: int
    dense: int
    slots: int

    @classmethod
    def of(cls, ranks: Sequence[int]) -> "Ranks":
        """Sum up the ranks of a plan."""
        ordered = sorted(rank for rank in ranks if rank != DENSE)
        spread = (ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1]) if ordered else (0, 0, 0)
        return cls(*spread, len(ranks) - len(ordered), len(ranks))

    @property
    def words(self) -> str:
        """ "8 · 96 · 160, 2 dense"; "4 of 8" where slots stay or go as a whole."""
        if self.dense == self.slots:
            return "dense"
        if self.dense and not self.most:
            return f"{self.dense} of {self.slots}"
        spread = str(self.least) if self.least == self.most else f"{self.least} · {self.median} · {self.most}"
        return spread + (f", {self.dense} dense" if self.dense else "")
