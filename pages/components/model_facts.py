"""A model in figures, and what analysing it needs against what the machine has, as HTML."""

from collections.abc import Mapping
from typing import Any

from moesvd_core.live import live_memory
from moesvd_core.runs.estimate import Estimate
from pages.components import tables
from pages.components.machine import Machine
from pages.components.text import count, duration, escape, notice, share, size


def facts_html(name: str, remark: str, facts: Mapping[str, Any]) -> str:
    """What a model is.

    Args:
        name: of the model, for people.
        remark: where these figures come from.
        facts: `ModelFacts.as_dict()`.
    """
    shared = facts["shared_experts"]
    pairs = [
        ("Family", str(facts["family"]), "" if facts["model_type"] == facts["family"] else str(facts["model_type"])),
        ("Layers", str(facts["layers"]), f"{facts['moe_layers']} with experts"),
        ("Experts a layer", str(facts["experts"]), f"{facts['hidden']:,} × {facts['width']:,} each"),
        ("Active a token", str(facts["active"]), f"and {shared} shared" if shared else "no shared experts"),
        ("Parameters", count(facts["parameters"]), f"{share(facts['expert_parameters'] / facts['parameters'])} in experts"),
        ("Active parameters", count(facts["active_parameters"]), f"{share(facts['active_parameters'] / facts['parameters'])} of all"),
        ("On disk", size(facts["bytes"]), str(facts["dtype"])),
        ("Context", f"{facts['context_length']:,}" if facts["context_length"] else "–", "tokens"),
        ("Licence", str(facts["licence"] or "–"), "as the model card says" if facts["licence"] else "none is named"),
    ]
    warnings = [notice(str(text), "warning") for text in facts["warnings"]]
    if facts["factored"]:
        warnings.insert(0, notice("This model is compressed already: analyse the original.", "error"))
    head = f'<div class="card-head"><h2>{escape(name)}</h2><p>{escape(remark)}</p></div>'
    return f"{head}{tables.facts(pairs, f'Facts of {name}')}<div class=notices>{''.join(warnings)}</div>"


def needs_html(facts: Mapping[str, Any], needed: Estimate, calibration_seconds: float, machine: Machine, download: int = 0) -> str:
    """What analysis and comparison need, each against what there is; says in words whether it fits.

    Args:
        download: bytes that are to be fetched from the hub first.
    """
    disk, written = needed.run_disk, "statistics, factors, hidden states"
    if download and machine.hub_free is None:
        disk, written = disk + download, f"{size(download)} to download, then {written}"
    rows = [
        _need("Memory to analyse", needed.memory, machine.memory_free, "one layer at a time"),
        _need("Disk to analyse", disk, machine.disk_free, written),
        _need(
            "Memory to compare", live_memory(int(facts["bytes"])), machine.models_free,
            f"original and compressed side by side{', on the graphics card' if machine.gpus else ''}",
        ),
    ]
    if download and machine.hub_free is not None:
        rows.insert(1, _need("Disk to download", download, machine.hub_free, "weights, kept in the hub's cache"))
    time = f"<dd>about {duration(_rounded(calibration_seconds))}<span>roughly, when nothing else runs</span></dd>"
    rows.append(f"<div class=need><dt>Time to calibrate</dt>{time}</div>")
    cards = f", {', '.join(machine.gpus)}" if machine.gpus else ", no graphics card"
    text = f"This machine: {machine.cores} cores, {size(machine.memory_total)} memory{cards}."
    head = '<h3 class="figure-title">What it takes</h3>'
    return f'{head}<dl class="needs">{"".join(rows)}</dl><p class="quiet-text">{escape(text)}</p>'


def _need(name: str, needed: int, there: int, remark: str) -> str:
    fits = needed <= there
    word = "" if fits else f"<strong>does not fit: {size(needed - there)} short</strong>"
    part = min(1.0, needed / there) if there else 1.0
    meter = (
        f'<div class="meter{"" if fits else " short"}" role="meter" aria-label="{escape(name)}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * part:.0f}"><div style="width:{max(1.0, 100 * part):.1f}%"></div></div>'
    )
    return (
        f"<div class=need><dt>{escape(name)}</dt><dd>{size(needed)} of {size(there)} free {word}"
        f"{meter}<span>{escape(remark)}</span></dd></div>"
    )


def _rounded(value: float) -> float:
    """To one digit: an estimate should not look like a measurement."""
    if value < 10:
        return max(1.0, float(round(value)))
    digits = 10.0 ** (len(str(int(value))) - 1)
    return round(value / digits) * digits if value < 600 else round(value / 600) * 600
