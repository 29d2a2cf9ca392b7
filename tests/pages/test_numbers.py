"""A number that cannot be used is refused by the name of its field, and never rounded to one that can."""

from pathlib import Path

import gradio as gr
import pytest

import app
from moesvd_core.errors import InputError
from pages.components.numbers import named
from pages.components.settings import Settings

NAMES = {"new_tokens": "Tokens", "seed": "Seed"}


def test_an_error_calls_the_setting_by_its_field() -> None:
    with pytest.raises(InputError, match=r"^“Tokens” must be in \[1, 4096\], got 0$"), named(NAMES):
        raise InputError("new_tokens must be in [1, 4096], got 0")


@pytest.mark.parametrize("error", [InputError("prompt must not be empty"), InputError(""), ValueError("new_tokens")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, named(NAMES):
        raise error
    assert caught.value is error


def test_no_field_of_any_page_has_gradio_refuse_or_round(tmp_path: Path) -> None:
    made = app.create(Settings(runs=tmp_path, demo=False))
    fields = [block for block in made.blocks.values() if isinstance(block, gr.Number)]
    assert {field.label for field in fields} == {
        "Windows", "Tokens a window", "Seed", "Windows at once", "Tokens", "Temperature", "Top p", "Windows of text", "Experts, at most",
    }
    assert {(field.minimum, field.maximum, field.precision) for field in fields} == {(None, None, None)}
