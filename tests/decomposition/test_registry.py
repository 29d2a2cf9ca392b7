"""The table of named methods."""

import pytest

from moesvd_core.decomposition.registry import METHODS, Method, method
from moesvd_core.errors import InputError
from moesvd_core.planning import Metric


def test_the_recommended_method_comes_first() -> None:
    assert next(iter(METHODS)) == "auto"
    assert method("auto").structures == ("pivoted", "latent", "base-delta")


def test_the_published_methods_are_where_the_paper_puts_them() -> None:
    axes = {name: (each.metric, each.structures, each.allocation) for name, each in METHODS.items()}
    assert axes["svd"] == ("plain", ("per-expert",), "uniform")
    assert axes["asvd"] == ("scaled", ("per-expert",), "uniform")
    assert axes["svd-llm"] == ("input", ("per-expert",), "uniform")
    assert axes["owl"] == ("input", ("per-expert",), "owl")
    assert axes["moe-svd"] == axes["moe-svd-refit"] == ("input", ("shared-v",), "selective")
    assert axes["d2-moe"] == ("input", ("base-delta",), "uniform")
    assert axes["expert-pruning"] == ("saliency", ("kept-experts",), "uniform")
    assert axes["expert-pruning-frequency"] == ("frequency", ("kept-experts",), "uniform")
    assert axes["neuron-pruning"] == ("input", ("kept-neurons",), "uniform")
    assert axes["expert-merging"] == ("input", ("merged-experts",), "uniform")
    assert METHODS["moe-svd-refit"].refit and not METHODS["moe-svd"].refit


def test_an_unknown_name_is_answered_with_the_list() -> None:
    with pytest.raises(InputError, match=r"one of auto, fisher, .*svd, .*expert-merging, got 'magic'"):
        method("magic")


def test_axes_can_be_overridden_one_by_one() -> None:
    changed = method("fisher").customised(metric="input")
    assert (changed.metric, changed.structures, changed.allocation) == ("input", ("pivoted",), "greedy")
    assert method("fisher").customised() == method("fisher")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"metric": "loud"}, "metric must be one of plain, scaled, input, output, saliency, frequency, got 'loud'"),
        ({"structures": ("tucker",)}, "structure must be one of per-expert, pivoted, shared-v, latent, base-delta, .*, got 'tucker'"),
        ({"allocation": "fair"}, "allocation must be one of uniform, selective, owl, greedy, got 'fair'"),
    ],
)
def test_axes_that_do_not_exist_are_refused(axes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        method("svd").customised(**axes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "metric", "known"),
    [
        ("svd", "saliency", "plain, scaled, input, output for structure per-expert"),
        ("expert-pruning", "plain", "saliency, frequency, output for structure kept-experts"),
        ("neuron-pruning", "scaled", "input, output for structure kept-neurons"),
    ],
)
def test_a_metric_without_a_meaning_for_the_structure_is_refused(name: str, metric: Metric, known: str) -> None:
    with pytest.raises(InputError, match=f"metric must be one of {known}, got '{metric}'"):
        method(name).customised(metric=metric)


def test_a_method_needs_a_structure() -> None:
    with pytest.raises(InputError, match="got none"):
        Method("empty", "plain", (), "uniform", False, "", "")
