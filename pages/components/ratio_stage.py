"""The parts of the Ratio page that answer in the browser alone: slider and figures, expert map and layers, layers at every ratio.

Each is a component; `assets/ratio.js` ties those of a page together. The value of the first carries the plans of a method, once.
"""

import json

import gradio as gr

from moesvd_core.decomposition.registry import WEIGHING
from moesvd_core.errors import RunError
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.jobs import read_jobs
from moesvd_core.runs.known import analysed, loss_laws
from pages.components import plan_table
from pages.components.assets import mount
from pages.components.handler import warn
from pages.components.reach import beyond_reach, flops_percent, flops_within
from pages.components.session import ViewState

_EMPTY = '<div class="empty" data-part="empty"><p class="empty-title"></p><p></p></div>'
_FIGURE = '<div><dt>{title}</dt><dd><b data-part="{name}">–</b><span data-part="{name}-remark"></span></dd></div>'
_CONTROL = f"""
<section class="stage" data-stage="control" aria-label="Ratio">{_EMPTY}<div class="stage-body">
<div class="stage-slider"><label for="ratio-slider">Removed, of all the model's parameters</label>
<output class="stage-percent" for="ratio-slider" data-part="percent">–</output>
<input type="range" id="ratio-slider" min="0" max="80" step="1" value="40" data-part="slider">
<p class="stage-reach"><span data-part="reach"></span></p>
<label for="flops-slider">Saved at least, of all operations a token</label>
<output class="stage-saved" for="flops-slider" data-part="saved">–</output>
<input type="range" id="flops-slider" min="0" max="80" step="1" value="0" data-part="flops">
<p class="stage-reach"><span data-part="flops-reach"></span></p></div>
<dl class="stage-figures" aria-label="The compressed model">
{"".join(_FIGURE.format(title=title, name=name) for title, name in (
    ("Size", "size"), ("Predicted loss", "loss"), ("Active parameters", "active"),
    ("Operations", "operations")))}</dl>
<div class="stage-pin"><button type="button" class="quiet" data-part="pin">Pin this plan</button>
<span data-part="pin-text"></span><button type="button" class="quiet" data-part="unpin" hidden>Unpin</button></div>
<p class="unseen" aria-live="polite" data-part="said"></p></div></section>"""
_TITLES = ("Layer", "Gate and up", "Down", "Kept", "Predicted loss, nats", "Why")
_NUMBERS = ("Kept", "Predicted loss, nats")
_COLUMNS = "".join(f'<th scope="col"{" class=number" if title in _NUMBERS else ""}>{title}</th>' for title in _TITLES)


def _titled(title: str, name: str, part: str = "") -> str:
    """A title with a button that downloads what stands below."""
    marked = f' data-part="{part}"' if part else ""
    return (
        f'<div class="table-head"><p class="figure-title"{marked}>{title}</p>'
        f'<button type="button" class="quiet" data-save="{name}" aria-label="Download as CSV: {title}">CSV</button></div>'
    )


_MAP = f"""
<section class="stage" data-stage="map" aria-label="What is kept">{_EMPTY}<div class="stage-body stage-halves">
<div class="stage-experts">{_titled("Expert map", "experts")}
<canvas data-part="experts" role="img" aria-label="Expert map"></canvas>
<p class="stage-tip" data-part="tip" hidden></p>
<p class="stage-legend" data-part="legend"><span></span><i></i><span></span>
<em>Layers down, experts across; the bar under a cell: its share of tokens.</em></p></div>
<div class="table-box stage-layers" data-part="layers">{_titled("Layers", "layers", "layers-title")}
<div class="table-scroll" tabindex="0" role="region" aria-label="Layers at this ratio"><table>
<thead><tr>{_COLUMNS}</tr></thead><tbody data-part="rows"></tbody></table></div>
<p class="stage-legend"><em>Under a state its ranks: the least · the median · the most of the experts.</em></p></div></div></section>"""
_RETAINED = f"""
<section class="stage" data-stage="retained" aria-label="Every ratio">{_EMPTY}<div class="stage-body">
{_titled("Kept by each layer, at every ratio", "retained")}
<canvas data-part="layers" class="stage-retained" role="img"
  aria-label="Share kept of each layer, by ratio; the CSV says the same"></canvas>
<p class="stage-legend"><span>0 % kept</span><i class="magnitude"></i><span>100 %</span>
<em>Ratios down, layers across; press a row to go there.</em></p></div></section>"""


def control() -> gr.HTML:
    """Slider and figures. Its `.release` says {"percent", "flops"} once the hand lets go of either; its value is that of `drawing`."""
    return _part("control", _CONTROL, 262)


def expert_map() -> gr.HTML:
    """Expert map and table of layers. Its `.select` says {"layer"}: the index of a layer that was chosen, or None."""
    return _part("map", _MAP, 580)


def retained() -> gr.HTML:
    """Share of each layer that is kept, at every ratio."""
    return _part("retained", _RETAINED, 470)


def drawing(run: RunFolder | None, state: ViewState, dataset: str = "sotu") -> str:
    """The value of `control`: the plans of the view's method, or what to do to have them.

    Args:
        dataset: whose measured plans tell how large predicted losses really are.

    Raises:
        RunError: a file of the run is damaged.
    """
    table, most, problem = None, 0, None
    if run is not None:
        for problem in beyond_reach(run, state):
            warn(problem)
        most = flops_percent(run, state.method)
        try:
            table = plan_table.read(run, state.method, flops_within(run, state))
        except RunError as error:
            if state.flops_ratio is None:
                raise
            problem = str(error)
    if problem is not None:
        empty = (f"No plans by {state.method} with fewer operations yet", problem)
    elif run is None:
        empty = ("No run is chosen", "Choose a model on the Model page and analyse it: its plans appear here.")
    elif analysed(run):
        hint = "Press “Plan this method” below: the model is decomposed that way, and every ratio planned."
        empty = (f"No plans by {state.method} yet", hint)
    elif _failed(run):
        empty = ("The analysis of this run failed", "So it has no plans: the Model page says why, and what to do about it.")
    else:
        empty = ("This run has no plans yet", "They are made at the end of its analysis; the Model page says how far that is.")
    flops = 0.0 if run is None else flops_within(run, state) or 0.0
    weighing = {"weighs": state.method in WEIGHING, "weighing": ", ".join(WEIGHING)}
    bound = {"flops": round(100 * flops), "flopsMost": most, **weighing}
    view = {"run": state.run, "method": state.method, "percent": round(100 * state.ratio), "layer": state.layer, **bound}
    law = None if run is None or table is None else loss_laws(run, [state.method], dataset).get(state.method)
    return json.dumps({**view, "table": table, "law": None if law is None else vars(law), "empty": empty}, separators=(",", ":"))


def _failed(run: RunFolder) -> bool:
    """Whether the latest analysis of the run failed."""
    analyses = [job for job in read_jobs(run.log).values() if job.action == "analyze"]
    return bool(analyses) and analyses[-1].state == "failed"


def _part(name: str, template: str, height: int) -> gr.HTML:
    """One component; it takes its height from the start, so that nothing jumps when plans arrive."""
    return gr.HTML("", html_template=template, js_on_load=mount("ratio"), elem_id=f"ratio-{name}", min_height=height)
