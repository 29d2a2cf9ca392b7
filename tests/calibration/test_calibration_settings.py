"""Settings refuse what cannot work and say how to mend it, and survive being written down."""

from typing import Any

import pytest

from moesvd_core.calibration import Calibration
from moesvd_core.errors import InputError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dataset", "", "empty name"),
        ("samples", 0, "samples must be a whole number of at least 1 windows, got 0"),
        ("samples", 1.5, "got 1.5"),
        ("samples", True, "got True"),
        ("batch", 0, "batch must be"),
        ("seed", -1, "seed must be a whole number of at least 0, got -1"),
        ("seed", 2**32, "seed must be at most 4,294,967,295, got 4,294,967,296"),
        ("samples", 10**15, "samples must be at most 1,000,000 windows, got 1,000,000,000,000,000"),
        ("length", 1, "length must be a whole number of at least 2 tokens, got 1"),
        ("outlier_threshold", 0, "above 0"),
        ("outlier_threshold", float("nan"), "got nan"),
        ("outlier_threshold", "2", "got '2'"),
        ("gradient_samples", 0, "gradient_samples"),
        ("drawn_labels", -1, "drawn_labels must be a whole number of at least 0"),
        ("gradient_samples", 129, r"in \[1, 128\]"),
        ("drawn_labels", 10**6, "drawn_labels must be at most 1,024, got 1,000,000"),
        ("dataset", 5, "dataset must be the name of a data set: .*, got 5"),
        ("dataset", None, "a hub data set, got None"),
        ("gradient", "no", "gradient must be true or false, got 'no'"),
        ("gradient", None, "gradient must be true or false, got None"),
        ("intermediate_gram", "no", r"intermediate_gram must be true, false or left out \(for narrow experts only\), got 'no'"),
        ("row_gram", 1, "row_gram must be true, false or left out .*, got 1"),
        ("dtype", "float64", "float32, bfloat16, float16"),
    ],
)
def test_names_value_and_bound_of_a_bad_setting(field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Calibration(**{field: value})


def test_collects_the_intermediate_gram_of_narrow_experts_unless_told() -> None:
    assert Calibration().collects_intermediate(2048)
    assert not Calibration().collects_intermediate(2049)
    assert Calibration(intermediate_gram=True).collects_intermediate(14336)
    assert not Calibration(intermediate_gram=False).collects_intermediate(8)


def test_comes_back_from_plain_data() -> None:
    settings = Calibration(samples=3, length=16, dtype="bfloat16")
    assert Calibration.from_dict(settings.as_dict()) == settings
    with pytest.raises(InputError, match="no setting 'sample'"):
        Calibration.from_dict({"sample": 3})


def test_settings_of_an_earlier_version_drew_no_labels() -> None:
    earlier = Calibration().as_dict()
    del earlier["drawn_labels"]
    assert Calibration.from_dict(earlier) == Calibration(drawn_labels=0) != Calibration()
