"""A table reads the same as text, CSV and JSON."""

import csv
import json
from pathlib import Path

import pytest

from moesvd_core.errors import InputError
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


def test_files_hold_the_unrounded_figures(tmp_path: Path) -> None:
    for suffix in (".csv", ".json"):
        TABLE.write(tmp_path / f"table{suffix}")
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()))
    assert rows == [{"method": "svd", "bytes": "1234567", "kl": "0.12342"}, {"method": "original", "bytes": "99", "kl": ""}]
    data = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert data == {"title": "Sizes", "rows": list(RECORDS), "notes": ["measured on air"]}


def test_refuses_other_suffixes_and_ragged_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.csv or \.json.*table\.xls"):
        TABLE.write(tmp_path / "table.xls")
    with pytest.raises(ValueError, match="2 cells, got 1"):
        Table("t", ("a", "b"), (("x",),))
