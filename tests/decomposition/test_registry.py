"""The table of named methods."""

import pytest

from moesvd_core.decomposition.registry import METHODS, Method, method
from moesvd_core.errors import InputError


def test_the_recommended_method_comes_first() -> None:
    assert next(iter(METHODS)) == "auto"
    assert method("auto").structures == ("per-expert", "latent")


def test_the_published_methods_are_where_the_paper_puts_them() -> None:
    axes = {name: (each.metric, each.structures, each.allocation) for name, each in METHODS.items()}
    assert axes["svd"] == ("plain", ("per-expert",), "uniform")
    assert axes["asvd"] == ("scaled", ("per-expert",), "uniform")
    assert axes["svd-llm"] == ("input", ("per-expert",), "uniform")
    assert axes["owl"] == ("input", ("per-expert",), "owl")
    assert axes["moe-svd"] == axes["moe-svd-refit"] == ("input", ("shared-v",), "selective")
    assert METHODS["moe-svd-refit"].refit and not METHODS["moe-svd"].refit


def test_an_unknown_name_is_answered_with_the_list() -> None:
    with pytest.raises(InputError, match=r"one of auto, fisher, .*svd, got 'magic'"):
        method("magic")


def test_axes_can_be_overridden_one_by_one() -> None:
    changed = method("fisher").customised(metric="input")
    assert (changed.metric, changed.structures, changed.allocation) == ("input", ("per-expert",), "greedy")
    assert method("fisher").customised() == method("fisher")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"metric": "loud"}, "metric must be one of plain, scaled, input, output, got 'loud'"),
        ({"structures": ("tucker",)}, "structure must be one of per-expert, shared-v, latent, got 'tucker'"),
        ({"allocation": "fair"}, "allocation must be one of uniform, selective, owl, greedy, got 'fair'"),
    ],
)
def test_axes_that_do_not_exist_are_refused(axes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        method("svd").customised(**axes)  # type: ignore[arg-type]


def test_a_method_needs_a_structure() -> None:
    with pytest.raises(InputError, match="got none"):
        Method("empty", "plain", (), "uniform", False, "", "")
