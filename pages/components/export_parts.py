"""What the Export page shows: what would be written, what was written, and how a push stands."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesvd_core.planning import Plan, Recipe
from moesvd_core.planning.loss_law import layer_losses
from moesvd_core.runs.command_line import compress_command, export_command
from moesvd_core.runs.exports import CARD, ExportFolder
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import loss_laws, measurements
from moesvd_core.runs.pushes import Push
from moesvd_core.runs.workbench import Text
from pages.components import code, tables
from pages.components.downloads import archive_address, file_address
from pages.components.text import count, duration, empty, escape, moment, notice, number, share, size

_NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def planned_bytes(plan: Plan | None, recipe: Recipe, form: str, dtype: str | None, facts: Mapping[str, Any]) -> int:
    """Bytes of the tensors that an export would hold: exact in the model's own number format, else close to it.

    Args:
        facts: `ModelFacts.as_dict()` of the original.
    """
    original = int(facts["bytes"])
    if form == "dense":
        stored = float(original)
    else:
        stored = plan.bytes if plan else original * (1 - recipe.ratio)
    own = _NUMBER_BYTES.get(str(facts["dtype"]))
    return round(stored * (_NUMBER_BYTES[dtype] / own if dtype and own else 1))


def summary_html(
    run: RunFolder, plan: Plan | None, recipe: Recipe, *, name: str, form: str, dtype: str | None, facts: Mapping[str, Any], free: int
) -> str:
    """What would be written: size beside the original's and the free disk, parameters, and what is known of its quality."""
    needed = planned_bytes(plan, recipe, form, dtype, facts)
    about = "" if plan and not dtype else "about "
    if form == "dense" or plan is None:
        kept = ("Parameters", count(facts["parameters"]), "as many as the original") if form == "dense" else _unknown(recipe, facts)
    else:
        kept = ("Parameters", count(plan.parameters), f"{share(plan.ratio)} removed of {count(plan.original_parameters)}")
    active = count(plan.active_parameters) if plan and form == "factored" else count(facts["active_parameters"])
    computed = [("Operations a token", count(plan.flops), f"the original does {count(plan.original_flops)}")] if plan else []
    bars = [("Original", int(facts["bytes"]), ""), ("This export", needed, about)]
    pairs = [
        kept,
        ("Active a token", active, f"the original has {count(facts['active_parameters'])}"),
        *(computed if form == "factored" else []),
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


def _unknown(recipe: Recipe, facts: Mapping[str, Any]) -> tuple[str, str, str]:
    return "Parameters", f"about {count(facts['parameters'] * (1 - recipe.ratio))}", f"{share(recipe.ratio)} removed"


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
        loss = plan.predicted_loss if law is None else law.loss(layer_losses(plan))
        return "Predicted loss", number(loss), "nats a token; not measured yet"
    return "Quality", "–", "not measured yet"


def twin_html(run: RunFolder, recipe: Recipe, *, name: str, form: str, dtype: str | None) -> str:
    """The commands and the recipe that do what the button does."""
    output = f"out/{name}"
    boxes = [code.box("From this run", code.folded(export_command(run.name, recipe, output=output, form=form, dtype=dtype)))]
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
