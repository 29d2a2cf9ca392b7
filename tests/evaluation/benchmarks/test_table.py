"""A table that people can read."""

import pytest

from moesvd_core.evaluation.benchmarks.table import Table

RECORDS = ({"method": "svd", "bytes": 1234567, "kl": 0.12342}, {"method": "original", "bytes": 99, "kl": None})
TABLE = Table.of("Sizes", RECORDS, ["measured on air"])


def test_text_is_aligned() -> None:
    assert TABLE.text().splitlines() == [
        "Sizes",
        "",
        "method        bytes      kl",
        "--------  ---------  ------",
        "svd       1,234,567  0.1234",
        "original         99       –",
        "",
        "measured on air",
    ]


def test_a_row_has_a_cell_for_every_column() -> None:
    with pytest.raises(ValueError, match="2 cells, got 1"):
        Table("t", ("a", "b"), (("x",),))
