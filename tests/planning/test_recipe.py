"""Recipes: what they refuse, and that YAML carries them there and back."""

import pytest

from moesvd_core.errors import InputError
from moesvd_core.planning import Recipe


@pytest.mark.parametrize("ratio", [-1, 1, 1.5, float("nan"), float("inf"), "abc", True, None])
def test_refuses_a_ratio_out_of_bounds(ratio: object) -> None:
    with pytest.raises(InputError, match=r"ratio must be a number in \[0, 1\)"):
        Recipe(ratio=ratio)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "listed"),
    [
        ("metric", "fisher", "plain, scaled, input, output"),
        ("structure", "dense", "per-expert, pivoted, shared-v, latent"),
        ("allocation", "best", "uniform, selective, owl, greedy"),
        ("budget", "bytes", "parameters, flops"),
        ("structure", ["latent"], "per-expert, pivoted, shared-v, latent"),
    ],
)
def test_lists_the_choices(field: str, value: object, listed: str) -> None:
    with pytest.raises(InputError, match=f"{field} must be one of {listed}"):
        Recipe(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [0, -8, 1.5, True])
def test_refuses_a_block_that_is_no_number_of_ranks(block: object) -> None:
    with pytest.raises(InputError, match="block must be a whole number"):
        Recipe(block=block)  # type: ignore[arg-type]


def test_refuses_an_empty_method() -> None:
    with pytest.raises(InputError, match="method must be the name of a method"):
        Recipe(method="")


@pytest.mark.parametrize("field", ["compensate", "refit_router"])
@pytest.mark.parametrize("value", ["yes", 1, None])
def test_refuses_a_switch_that_is_neither_on_nor_off(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{field} must be true or false, got {value!r}"):
        Recipe(**{field: value})  # type: ignore[arg-type]


def test_what_is_fitted_has_its_words_and_goes_without() -> None:
    recipe = Recipe("latent", 0.25, compensate=True, refit_router=True)
    assert recipe.fits == ("compensated", "router refitted")
    assert Recipe("latent", refit_router=True).fits == ("router refitted",)
    assert recipe.unfitted() == Recipe("latent", 0.25)
    assert not Recipe().fits


def test_yaml_there_and_back() -> None:
    recipe = Recipe("latent", 0.25, allocation="greedy", block=4, budget="flops", refit_router=True)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert "metric" not in recipe.to_yaml()


def test_yaml_with_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown keys ration: it may have method, ratio, metric"):
        Recipe.from_yaml("ration: 0.4")


@pytest.mark.parametrize("text", ["", "- 1", "0.4", "ratio: [", "ratio: 0.4\n---\nratio: 0.5"])
def test_yaml_that_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="recipe"):
        Recipe.from_yaml(text)


def test_yaml_tags_are_refused_and_nothing_runs() -> None:
    with pytest.raises(InputError, match="not plain YAML"):
        Recipe.from_yaml("method: !!python/object/apply:os.getcwd []")
