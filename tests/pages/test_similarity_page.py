"""The handlers of the similarity page, without a browser."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from analysed_run import analysed_run
from runs.run_helpers import new_run

from moesvd_core.errors import InputError, RunError
from moesvd_core.runs.client import Client
from moesvd_core.runs.similarity import read_layer
from moesvd_core.similarity import RANK_SHARES
from pages import similarity
from pages.components.context import Context
from pages.components.session import ViewState
from pages.components.settings import Settings
from pages.components.similarity_figures import Choice

USUAL = ("input", "W", 0.25, "debiased", "random")


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    torch.set_num_threads(1)
    made = Context(Settings(runs=tmp_path_factory.mktemp("runs")))
    object.__setattr__(made, "client", Client(made.settings.runs, launch=lambda run: None))
    analysed_run(made.settings.runs)
    return made


@pytest.fixture
def state() -> ViewState:
    return ViewState(run="analysed-0000000a", layer=1)


def drawn(context: Context, state: ViewState, *choice: Any) -> list[Any]:
    facts, *figures = similarity._draw(context)(state, *choice)
    return [facts, *map(json.loads, figures)]


@pytest.mark.parametrize("choice", [
    USUAL, ("output", "U", 0.5, "biased", "shuffled"), ("input", "V", 1 / 8, "debiased", "random"), ("output", "V", 1, "biased", "random"),
])
def test_figures_show_what_the_run_holds(context: Context, state: ViewState, choice: tuple[Any, ...]) -> None:
    facts, pairs, chance, means, overlap = drawn(context, state, *choice)
    side, matrix, share, estimator, control = choice
    layer = read_layer(context.open(state), 1)[side]
    axis = "channels" if matrix == "W" or (matrix == "V") == (side == "input") else "neurons"
    for data, source in ((pairs, "experts"), (chance, control)):
        found = layer[source]
        kernel = 0 if matrix == "W" else 1 + found.ranks.index(round(share * found.ranks[-1]))
        expected = found.axis(axis).pairs(estimator, kernel)
        assert [row[2] for row in data["rows"]] == pytest.approx(expected)
        assert data["columns"] == ["expert", "other", "cka"]
        heat = data["figure"]["data"][0]
        assert heat["zmax"] == pairs["figure"]["data"][0]["zmax"]  # one scale, or chance would look like the experts
    mean = np.mean([row[2] for row in pairs["rows"]])
    assert f"{mean:.3f}" in facts
    assert {row[0] for row in means["rows"]} == {0, 1, 2}
    own = next(row for row in means["rows"] if row[:3] == [1, matrix, "experts"])
    assert own[4] == pytest.approx(mean, abs=2e-5)
    assert {(row[0], row[1]) for row in overlap["rows"]} == {(each, of) for each in "UV" for of in ("experts", control)}


def test_a_sample_of_the_experts_says_so(context: Context, state: ViewState) -> None:
    _, pairs, *_ = drawn(context, state, *USUAL)
    assert "3 of 4 experts, drawn at random: 3 of 6 pairs." in pairs["caption"]


def test_full_rank_is_undefined_and_explained(context: Context, state: ViewState) -> None:
    facts, pairs, *_ = drawn(context, state, "input", "V", 1, "debiased", "random")
    assert pairs["empty"] == "Undefined at full rank"
    assert "undefined at full rank" in facts
    facts, *_ = drawn(context, state, "input", "V", 1, "biased", "random")
    assert "for any experts" in facts


def test_what_is_not_there_says_what_to_do(context: Context) -> None:
    facts, *figures = drawn(context, ViewState(), *USUAL)
    assert facts == ""
    assert {data["empty"] for data in figures} == {"No run is chosen"}
    new_run(context.settings.runs, "bare-00000001")
    _, *figures = drawn(context, ViewState(run="bare-00000001"), *USUAL)
    assert all("Compare experts" in data["advice"] for data in figures)
    assert similarity._layers(context)(ViewState(run="bare-00000001")).choices == []


def test_a_layer_is_chosen_by_the_address_the_list_or_a_click(context: Context, state: ViewState) -> None:
    shown = similarity._layers(context)
    assert (shown(state).value, [value for _, value in shown(state).choices]) == (1, [0, 1, 2])
    assert shown(ViewState(run=state.run, layer=77)).value == 0
    click = SimpleNamespace(index=[2, 0.5], value={"trace": "W"})
    assert similarity._clicked(click, state).layer == 2


def test_comparing_is_asked_for_once(context: Context) -> None:
    new_run(context.settings.runs, "bare-00000002")
    state = ViewState(run="bare-00000002")
    assert similarity._compare(context)(state, None, 3).active
    job = context.status(state).job
    assert (job.action, dict(job.arguments)) == ("similarity", {"experts": 16, "seed": 3})
    with pytest.raises(InputError, match="compares its experts already"):
        similarity._compare(context)(state, 16, 0)
    with pytest.raises(InputError, match="at least 2, got 1"):
        similarity._compare(context)(state, 1, 0)
    for given, words in (((2.5, 0), "“Experts, at most” must be a whole number of at least 2, got 2.5"), ((4, 0.5), "“Seed” .* got 0.5")):
        with pytest.raises(InputError, match=words):
            similarity._compare(context)(state, *given)
    with pytest.raises(RunError, match="no run is chosen"):
        similarity._compare(context)(ViewState(), 16, 0)


def test_shares_of_ranks_find_the_nearest_rank_of_a_small_matrix() -> None:
    for share in RANK_SHARES:
        choice = Choice("input", "U", share, "biased", "random")
        ranks = (1, 2, 4)
        assert abs(ranks[choice.kernel(ranks) - 1] - 4 * share) == min(abs(rank - 4 * share) for rank in ranks)
        assert choice.kernel(ranks, "W") == 0


def test_damage_is_explained_in_place(tmp_path: Path) -> None:
    context = Context(Settings(runs=tmp_path))
    run = analysed_run(tmp_path)
    (run.path / "evaluations" / "similarity.json").write_text("{")
    state = ViewState(run=run.identity.id)
    facts, *figures = drawn(context, state, *USUAL)
    assert facts == ""
    assert all("similarity.json is damaged" in data["advice"] for data in figures)
    assert similarity._layers(context)(state).choices == []
