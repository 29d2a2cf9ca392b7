"""Similarity: how alike the experts of a layer are, in their weights and in what the SVD makes of them, beside what chance would give."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from moesvd_core.errors import InputError
from moesvd_core.runs.similarity import read_layer, read_summary
from moesvd_core.similarity import RANK_SHARES, Sampling, SideSimilarity, Source, axis_of
from pages.components import figure, jobs, tables
from pages.components import similarity_figures as figures
from pages.components.context import Context
from pages.components.layers import choose, picked, picker, readable, shown_layer
from pages.components.numbers import named
from pages.components.page import CHOICE, POINT, QUIET, Page
from pages.components.session import ViewState
from pages.components.similarity_figures import Choice
from pages.components.text import notice, sentence

_ADVICE = "Press “Compare experts” at the foot of this page: it takes seconds for a small model, and no calibration."
_SHARES = {1: "all"} | {share: f"1/{round(1 / share)}" for share in RANK_SHARES if share <= 1 / 2 and round(1 / share) * share == 1}
_NAMES = {"experts": "Experts, at most", "seed": "Seed"}
"""Of numbers: setting -> field."""


def build(context: Context) -> None:
    """Lay out the page."""
    purpose = "How alike the experts of a layer are: whether they could share a basis, and how much of that is chance."
    with Page(context, "Similarity", purpose) as page:
        with gr.Row(elem_classes="columns"):
            layer = picker("similarity-layer")
            side = gr.Radio([("Gate and up", "input"), ("Down", "output")], value="input", label="Matrix of the expert", min_width=250)
            matrix = gr.Radio(list(figures.MATRICES), value="W", label="Whole, or a factor of W = UΣVᵀ", min_width=250)
        with gr.Row(elem_classes="columns"):
            share = gr.Dropdown(_share_choices(), value=1 / 4, label="Rank of U and V, as a share", min_width=250)
            estimators = [("Debiased", "debiased"), ("Biased, as in the paper", "biased")]
            estimator = gr.Radio(estimators, value="debiased", label="Estimator of CKA", min_width=250)
            chances = [("Random matrices", "random"), ("Shuffled experts", "shuffled")]
            control = gr.Radio(chances, value="random", label="Chance, shown beside", min_width=250)
        facts = gr.HTML("", elem_id="similarity-facts", min_height=84)
        with gr.Row(elem_classes="columns"):
            with gr.Column(min_width=300):
                pairs = figure.box("The experts, pair by pair", height=400, elem_id="similarity-pairs")
            with gr.Column(min_width=300):
                chance = figure.box("The same by chance", height=400, elem_id="similarity-control")
        with gr.Row(elem_classes="columns"):
            with gr.Column(min_width=300):
                means = figure.box("Mean similarity of W, U and V by layer", height=380, clicks=True, elem_id="similarity-means")
            with gr.Column(min_width=300):
                overlap = figure.box("Overlap of the experts' subspaces by rank", height=380, elem_id="similarity-overlap")
        gr.HTML('<h2 class="section">Comparing</h2>')
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=7, min_width=300):
                with gr.Row():
                    experts = gr.Number(Sampling.experts, label=_NAMES["experts"], min_width=140)
                    seed = gr.Number(Sampling.seed, label=_NAMES["seed"], min_width=140)
                start = gr.Button("Compare experts", variant="primary", elem_id="compare-experts")
            with gr.Column(scale=5, min_width=300):
                jobs.Panel(page)

        controls = [side, matrix, share, estimator, control]
        page.view(_layers(context), [layer], fields=("run", "layer"))
        page.view(_draw(context), [facts, pairs, chance, means, overlap], fields=("run", "layer"), controls=controls)
        layer.input(page.changes(choose), [page.state, layer], page.state, **CHOICE)
        means.select(page.changes(_clicked), page.state, page.state, **POINT)
        start.click(page.changes(_compare(context)), [page.state, experts, seed], page.wake, **QUIET)


def _share_choices() -> list[tuple[str, float]]:
    """Ranks of U and V to choose from: halves, quarters, eighths ... and all."""
    return [(_SHARES[share], share) for share in RANK_SHARES if share in _SHARES]


def _layers(context: Context) -> Callable[[ViewState], Any]:
    @readable(lambda _: picked([], None))
    def layers(state: ViewState) -> Any:
        """The layers that were compared, and the one that is shown."""
        run = context.open(state)
        known = _compared(None if run is None else read_summary(run))
        return picked(known, shown_layer(state, known))

    return layers


def _compared(rows: Sequence[Mapping[str, Any]] | None) -> list[int]:
    return [int(row["layer"]) for row in rows or []]


def _draw(context: Context) -> Callable[..., tuple[str, ...]]:
    @readable(lambda empty: ("", empty, empty, empty, empty))
    def draw(state: ViewState, side: Any, matrix: Any, share: float, estimator: Any, control: Any) -> tuple[str, ...]:
        """Figures of the chosen layer and matrix, and of all layers."""
        run = context.open(state)
        if run is None:
            empty = figure.nothing("No run is chosen", "Choose or analyse a model on the Model page.")
            return "", empty, empty, empty, empty
        rows = read_summary(run)
        index = shown_layer(state, _compared(rows))
        found = None if index is None else read_layer(run, index)
        if not rows or index is None or found is None:
            empty = figure.nothing("The experts were not compared yet", _ADVICE)
            return "", empty, empty, empty, empty
        choice = Choice(side, matrix, float(share), estimator, control)
        layer = found[choice.side]
        own, beside = layer["experts"], layer[choice.control]
        top = figures.scale_top(figures.pairs_of(own, choice), figures.pairs_of(beside, choice))
        where = f"Layer {index}, {figures.SIDE_WORDS[choice.side]}, {choice.words(own.ranks)}"
        name = f"similarity-layer-{index}-{choice.side}-{choice.matrix}"
        what = f"{where}, {choice.estimator} CKA over {_samples(own, choice):,} {_axis_words(choice)}. {_drawn(own)}"
        by_chance = f"{sentence(figures.CONTROL_WORDS[choice.control])}, on the same colour scale."
        return (
            tables.facts(figures.figures_of(layer, choice), "Mean similarity") + _remarks(own, choice),
            figures.pair_map(own, choice, top, what, name),
            figures.pair_map(beside, choice, top, by_chance, f"{name}-{choice.control}"),
            figures.mean_lines(rows, choice, index, _means_caption(layer, choice)),
            figures.overlap_lines(layer, choice, f"overlap-layer-{index}-{choice.side}"),
        )

    return draw


def _clicked(event: gr.SelectData, state: ViewState) -> ViewState:
    """A click on a layer's point shows that layer."""
    return state.but(layer=int(figure.clicked(event).x))


def _compare(context: Context) -> Callable[..., Any]:
    def compare(state: ViewState, experts: Any, seed: Any) -> Any:
        """Ask the run's worker to compare."""
        with named(_NAMES):
            sampling = Sampling(Sampling.experts if experts is None else experts, Sampling.seed if seed is None else seed)
        run = context.require_run(state)
        status = context.client.status(run)
        if any(job.action == "similarity" and job.is_open for job in status.jobs):
            raise InputError(f"run {run.name} compares its experts already: wait for it, or cancel it")
        context.client.submit(run, "similarity", experts=sampling.experts, seed=sampling.seed)
        return gr.Timer(active=True)

    return compare


def _drawn(found: SideSimilarity) -> str:
    """How many of the layer's experts are shown."""
    count, pairs = len(found.experts), len(found.experts) * (len(found.experts) - 1) // 2
    if count == found.total:
        return f"All {found.total} experts, {pairs} pairs."
    return f"{count} of {found.total} experts, drawn at random: {pairs} of {found.total * (found.total - 1) // 2:,} pairs."


def _samples(found: SideSimilarity, choice: Choice) -> int:
    """Length of the axis along which the chosen matrix is compared."""
    over_rows = (axis_of(choice.matrix, choice.side) == "channels") == (choice.side == "output")
    return found.rows if over_rows else found.columns


def _axis_words(choice: Choice) -> str:
    return "hidden channels" if axis_of(choice.matrix, choice.side) == "channels" else "neurons"


def _means_caption(layer: Mapping[Source, SideSimilarity], choice: Choice) -> str:
    ranks = layer["experts"].ranks
    at = ranks[choice.kernel(ranks, "V") - 1]
    return (
        f"{sentence(choice.estimator)} CKA, {figures.SIDE_WORDS[choice.side]}, U and V at rank {at}; dotted: "
        f"{figures.CONTROL_WORDS[choice.control]}. Choose a layer by its point."
    )


def _remarks(found: SideSimilarity, choice: Choice) -> str:
    """What a reader should know before believing a figure."""
    remarks = []
    if choice.estimator == "biased":
        remarks.append("The biased estimator is far above 0 for unrelated matrices: read it only against chance.")
    if axis_of(choice.matrix, choice.side) == "neurons":
        remarks.append("This factor spans neurons, which every expert orders as it likes: no similarity is expected here.")
    if choice.matrix != "W" and found.ranks[choice.kernel(found.ranks) - 1] == _samples(found, choice):
        remarks.append(f"At full rank every {choice.matrix} spans the whole space: its Gram is 1, and so is biased CKA, for any experts.")
    return notice(" ".join(remarks)) if remarks else ""
