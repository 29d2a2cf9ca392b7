"""What an address says, and what it must not be able to say."""

from urllib.parse import parse_qsl

import pytest

from moesvd_core.errors import InputError
from pages.components.session import ViewState, read_query


def test_an_address_holds_the_whole_view() -> None:
    state = ViewState("demo-moe-0a1b2c3d", 3, "latent", 0.25)
    assert state.query == "run=demo-moe-0a1b2c3d&layer=3&method=latent&ratio=0.25"
    assert read_query(dict(parse_qsl(state.query))) == (state, [])


def test_operations_are_bounded_where_the_method_weighs_them() -> None:
    state = ViewState("one", 3, "latent", 0.25, 0.3)
    assert state.query.endswith("&ratio=0.25&flops_ratio=0.3")
    assert read_query(dict(parse_qsl(state.query))) == (state, [])
    assert state.but(method="auto").flops_ratio == 0.3
    assert state.but(method="svd").flops_ratio is None


def test_ratios_are_whole_percents_on_every_page() -> None:
    state, problems = read_query({"run": "one", "ratio": "0.404", "flops_ratio": "0.126"})
    assert (state, problems) == (ViewState("one", ratio=0.4, flops_ratio=0.13), [])
    assert state.query.endswith("&ratio=0.4&flops_ratio=0.13")
    assert [ViewState(ratio=ratio).ratio for ratio in (0.004, 0.999)] == [0, 0.99]
    assert [ViewState(flops_ratio=ratio).flops_ratio for ratio in (0.004, 0.999)] == [0.01, 0.99], "a bound that is there stays one"


def test_without_a_run_the_address_stays_plain() -> None:
    assert ViewState().query == ""


def test_another_run_forgets_the_layer() -> None:
    state = ViewState("one", 3)
    assert state.but(run="two").layer is None
    assert state.but(run="one").layer == 3
    assert state.but(run="two", layer=1).layer == 1


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("run", "../secrets", "run must be an id"), ("run", "<b>", "run must be an id"), ("layer", "-1", "layer must be in"),
        ("layer", "abc", "layer must be a number"), ("ratio", "1", "ratio must be in"), ("ratio", "nan", "ratio must be in"),
        ("ratio", "x", "ratio must be a number"), ("method", "magic", "auto, fisher"),
        ("flops_ratio", "1", "flops_ratio must be in"), ("flops_ratio", "0", "flops_ratio must be in"),
        ("flops_ratio", "x", "flops_ratio must be a number"),
    ],
)
def test_what_cannot_be_read_keeps_its_default_and_is_told(name: str, value: str, word: str) -> None:
    state, problems = read_query({name: value, "unknown": "ignored"})
    assert state == ViewState()
    assert len(problems) == 1
    assert word in problems[0]


def test_a_method_that_does_not_weigh_operations_says_which_do() -> None:
    state, problems = read_query({"method": "svd", "flops_ratio": "0.2"})
    assert state == ViewState(method="svd")
    assert "(auto, fisher, latent), got svd" in problems[0]


def test_a_view_out_of_bounds_cannot_be_made() -> None:
    with pytest.raises(InputError, match=r"got 1\.5"):
        ViewState(ratio=1.5)
