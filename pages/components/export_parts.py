"""What the Export page shows: what would be written, what was written, and how a push stands."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesvd_core.architectures.files import CONFIG, read_config
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.checkpoint import fewer_experts
from moesvd_core.checkpoint.card import CARD
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import InputError
from moesvd_core.planning import DENSE, Plan, Recipe
from moesvd_core.planning.loss_law import layer_losses
from moesvd_core.runs.command_line import compress_command, export_command
from moesvd_core.runs.exports import ExportFolder
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import loss_laws, measurements
from moesvd_core.runs.pushes import Push
from moesvd_core.runs.source import SOURCE_FILE
from moesvd_core.runs.workbench import Text
from pages.components import code, tables
from pages.components.downloads import archive_address, file_address
from pages.components.text import count, duration, empty, escape, moment, notice, number, sentence, share, size

_NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def planned_bytes(plan: Plan | None, recipe: Recipe, form: str, dtype: str | None, facts: Mapping[str, Any]) -> int:
    """Bytes of the tensors that an export would hold: exact in the model's own number format, else close to it.

    Args:
        facts: `ModelFacts.as_dict()` of the original.
    """
    original, own = int(facts["bytes"]), _NUMBER_BYTES.get(str(facts["dtype"]))
    if form == "dense" and not _prunes_experts(recipe):
        stored = float(original)
    elif plan is None:
        stored = original * (1 - recipe.ratio)
    else:
        stored = plan.bytes - (own or 2) * (_router_parameters(plan, facts) if form == "dense" else 0)
    return round(stored * (_NUMBER_BYTES[dtype] / own if dtype and own else 1))


def kept_experts(plan: Plan, facts: Mapping[str, Any]) -> dict[int, list[int]]:
    """Experts that each layer keeps, by its index, of layers in which some are pruned.

    Args:
        facts: `ModelFacts.as_dict()` of the original.
    """
    planned = {layer["index"]: plan.layer(layer["index"]) for layer in facts["expert_layers"]}
    return {
        index: [expert for expert, rank in enumerate(layer.input.ranks) if rank == DENSE]
        for index, layer in planned.items()
        if layer is not None and layer.selected and layer.input.structure == "kept-experts"
    }


def refusal(run: RunFolder, plan: Plan | None, form: str, facts: Mapping[str, Any]) -> str:
    """Why a plan cannot be written in a format, in a sentence; "" where it can, or where that is not known yet.

    Args:
        facts: `ModelFacts.as_dict()` of the original.
    """
    kept = kept_experts(plan, facts) if plan is not None and form == "dense" else {}
    if not kept:
        return ""
    folder = Path((run.read_json(SOURCE_FILE) or {"path": "gone"})["path"])
    config = read_config(folder) if (folder / CONFIG).exists() else {}
    try:
        fewer_experts.check([ExpertLayer(**layer) for layer in facts["expert_layers"]], kept, config.get("text_config") or config)
    except InputError as error:
        return str(error)
    return ""


def summary_html(
    run: RunFolder, plan: Plan | None, recipe: Recipe, *, name: str, form: str, dtype: str | None, facts: Mapping[str, Any], free: int
) -> str:
    """What would be written: size beside the original's and the free disk, parameters, and its quality; or why it cannot be."""
    if refused := refusal(run, plan, form, facts):
        return notice(f"{sentence(refused)}.", "error")
    needed = planned_bytes(plan, recipe, form, dtype, facts)
    whole = form == "dense" and not _prunes_experts(recipe)
    about = "" if (plan or whole) and not dtype else "about "
    if whole:
        kept = ("Parameters", count(facts["parameters"]), "as many as the original")
    elif plan is None:
        kept = ("Parameters", f"about {count(facts['parameters'] * (1 - recipe.ratio))}", f"{share(recipe.ratio)} removed")
    else:
        left = plan.parameters - (_router_parameters(plan, facts) if form == "dense" else 0)
        kept = ("Parameters", count(left), f"{share(1 - left / plan.original_parameters)} removed of {count(plan.original_parameters)}")
    active = ("Active a token", count(facts["active_parameters"]), "as many as the original")
    if not whole:
        known = ("–", "known once planned; ") if plan is None else (count(plan.active_parameters), "")
        active = ("Active a token", known[0], f"{known[1]}the original has {count(facts['active_parameters'])}")
    computed = [("Operations a token", count(plan.flops), f"the original does {count(plan.original_flops)}")] if plan else []
    bars = [("Original", int(facts["bytes"]), ""), ("This export", needed, about)]
    pairs = [
        kept,
        active,
        *([] if whole else computed),
        _quality(run, recipe, plan),
    ]
    notes = [notice(f"It will be written to exports/{name} of this run; {size(free)} are free there.")]
    if needed > free:
        notes = [notice(f"{size(needed)} do not fit on the disk, {size(free)} are free: make room, or choose a higher ratio.", "error")]
    if plan is None:
        notes.append(notice("This plan was not made yet: size and ranks are found when it is written, which takes longer."))
    return f"{_bars(bars)}{tables.facts(pairs, 'What will be written')}<div class=notices>{''.join(notes)}</div>"


def _bars(rows: Sequence[tuple[str, int, str]]) -> str:
    """Sizes beside each other: (name, bytes, word before the figure); drawn to one scale, and said in figures."""
    longest = max(stored for _, stored, _ in rows)
    return "".join(
        f'<div class="size-row"><span>{escape(name)}</span>'
        f'<div class="size-bar"><div style="width:{100 * stored / longest:.1f}%"></div></div>'
        f"<strong>{escape(about + size(stored))}</strong></div>"
        for name, stored, about in rows
    )


def _prunes_experts(recipe: Recipe) -> bool:
    """Whether a dense export is a smaller model too: one with fewer experts."""
    return METHODS[recipe.method].structures == ("kept-experts",)


def _router_parameters(plan: Plan, facts: Mapping[str, Any]) -> int:
    """Of the rows of routers that go with their experts, which the plan's own form keeps."""
    layers = {layer["index"]: layer for layer in facts["expert_layers"]}
    kept = kept_experts(plan, facts)
    return sum(int(layers[index]["hidden"]) * (int(layers[index]["experts"]) - len(experts)) for index, experts in kept.items())


def _quality(run: RunFolder, recipe: Recipe, plan: Plan | None) -> tuple[str, str, str]:
    for wanted, when in ((recipe, ""), (recipe.unfitted(), ", before it is fitted")):
        measured = [row for row in measurements(run) if row.recipe == wanted]
        if measured:
            last = measured[-1]
            figures, original = last.figures, number(last.original_perplexity, 4)
            words = f"original {original} on the same {count(figures['windows'])} windows of {Path(figures['dataset']).name}{when}"
            return "Perplexity", number(figures["perplexity"], 4), f"{words}; KL {number(figures['kl_mean'])} nats a token"
    if plan is not None:
        law = loss_laws(run, [recipe.method], Text().dataset).get(recipe.method)
        if law is None:
            return "Predicted loss", number(plan.predicted_loss), "nats a token, from calibration alone: several times too small"
        return "Predicted loss", number(law.loss(layer_losses(plan))), f"nats a token, ± {share(law.error)}; not measured yet"
    return "Quality", "–", "not measured yet"


def twin_html(run: RunFolder, recipe: Recipe, *, name: str, form: str, dtype: str | None) -> str:
    """The commands and the recipe that do what the button does."""
    output = f"out/{name}"
    boxes = [code.box("From this run", code.folded(export_command(run, recipe, output=output, form=form, dtype=dtype)))]
    nothing = compress_command(run.identity, recipe, output=output, form=form, dtype=dtype)
    if nothing is not None:
        boxes.append(code.box("From nothing, with calibration and measurement", code.folded(nothing)))
    boxes.append(code.box("To the hub", f"moesvd push {output} owner/name", "The token is that of HF_TOKEN, or of hf auth login."))
    boxes.append(code.box("recipe.yaml", recipe.to_yaml(), "Both take it by --recipe recipe.yaml, instead of method and ratio."))
    return "".join(boxes)


def files_html(run: str, export: ExportFolder) -> str:
    """An export: its figures, everything as one archive, every file with its checksum."""
    facts = export.facts
    pairs = [
        ("Format", str(export.facts["format"]), ""),
        ("Removed", share(export.facts["ratio"]), f"of {count(facts['original_parameters'])} parameters"),
        ("On disk", size(export.size), f"{len(export.files)} files"),
        ("Verified", "reloaded", f"answers equal, {moment(export.created)}"),
    ]
    link = f'<a class="take" href="{escape(archive_address(run, export.name))}" download>Download everything</a>'
    columns = [
        tables.Column("name", "File", link=lambda row: file_address(run, export.name, row["name"])),
        tables.Column("size", "Size", size, number=True),
        tables.Column("sha256", "SHA-256", lambda value: value[:16] + "…" if value else "–"),
    ]
    rows = [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in export.files]
    table = tables.table(rows, columns, caption="Files", name=f"{export.name}-files", height=360)
    return (
        f"{tables.facts(pairs, f'Facts of {export.name}')}"
        f'<div class="take-row">{link}<span class="quiet-text">one .tar of {size(export.size)}, made while it is sent</span></div>{table}'
    )


def card_text(export: ExportFolder) -> str:
    """The model card as Markdown for the page: without its front matter, and its title one step lower than the page's."""
    text = export.card() if CARD in [file.name for file in export.files] else "This export has no model card."
    _, mark, body = text.partition("\n---\n")
    return (body if mark and text.startswith("---\n") else text).strip().replace("# ", "## ", 1)


def no_exports() -> str:
    """What stands there before the first export."""
    return empty("Nothing was written yet", "Choose a method and a ratio above, and write the model: it appears here once it is verified.")


def push_html(push: Push | None, online: Sequence[str] = ("https://",)) -> str:
    """How the push of an export stands.

    Args:
        online: beginnings of addresses that are made a link.
    """
    if push is None:
        return ""
    if push.state == "running":
        return notice(f"Pushing to {push.repository}. You may close this page; the server has to stay on.")
    if push.state == "failed":
        return notice(push.error, "error")
    took = duration((push.ended or push.started) - push.started)
    if not push.address.startswith(tuple(online)):
        return notice(f"Pushed to {push.repository} in {took}.")
    address = escape(push.address)
    return f'<p class="notice" role="status">Pushed in {took}: <a href="{address}" rel="noopener noreferrer">{address}</a></p>'
