"""Families are data: every supported model type has a tiny model that tests it, and whatever is refused says why."""

import pytest
from tiny_models import TINY, tiny_config
from transformers import AutoConfig

from moesvd_core.architectures.families import family_of, supported_model_types
from moesvd_core.errors import UnsupportedModelError


def test_every_supported_model_type_is_tested_on_a_tiny_model() -> None:
    assert set(supported_model_types()) == set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_the_family_of_a_configuration_lists_its_model_type(name: str) -> None:
    assert name in family_of(tiny_config(name)).model_types


@pytest.mark.parametrize("model_type", ["llama4", "gemma4", "qwen3_5_moe"])
def test_a_multimodal_configuration_is_of_the_family_of_its_text_part(model_type: str) -> None:
    assert f"{model_type}_text" in family_of(AutoConfig.for_model(model_type)).model_types


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("dbrx", "two-dimensional"),
        ("jetmoe", "attention heads"),
        ("llama", "dense"),
        ("gpt2", "dense"),
        ("longcat_flash", "routed experts in a form that is not known here"),
    ],
)
def test_a_model_that_cannot_be_compressed_is_refused_with_the_reason_and_what_is_supported(model_type: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}'.*{reason}.*supported model types: .*mixtral"):
        family_of(AutoConfig.for_model(model_type))
