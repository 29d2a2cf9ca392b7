"""From a run's plan to a folder that others load: written, verified, and counted."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from moesvd_core.architectures.headers import dtype_name
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.checkpoint.card import CardFacts, describe_again
from moesvd_core.checkpoint.export import Format, export_streamed
from moesvd_core.checkpoint.manifest import MANIFEST, read_manifest
from moesvd_core.checkpoint.staging import FACTS
from moesvd_core.checkpoint.verify import verify
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.errors import CheckpointError
from moesvd_core.evaluation.perplexity import Evaluation
from moesvd_core.planning import Plan
from moesvd_core.runs.workbench import Workbench
from moesvd_core.sizes import expert_dtype

TOLERANCE = 1e-3
"""By how much stored parameters may differ from the plan's, as a share."""


def write_export(bench: Workbench, plan: Plan, output: Path, form: Format, card: CardFacts, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the model; returns what was stored: ratio, parameters and bytes, counted from the files.

    Of a dense export also active_parameters: the plan's are those of factors.

    No weights are written when this very export is already there and whole: an earlier worker was killed just after it had finished, or the
    plan was measured since, which the card then tells. One that is damaged is written anew, outside of the run only where overwriting is
    allowed.

    Raises:
        InputError: the output is occupied.
        CheckpointError: what was stored is not what was planned, or did not pass verification; or a damaged export may not be overwritten.
    """
    if not _same_export(bench, plan, output, form):
        _write(bench, plan, output, form, card, overwrite)
    elif _to_replace(bench, output, overwrite):
        _write(bench, plan, output, form, card, overwrite=True)
    else:
        describe_again(output, card)
    facts = json.loads((output / FACTS).read_text(encoding="utf-8"))
    if form == "factored" and abs(facts["parameters"] - plan.parameters) > TOLERANCE * plan.parameters:
        stored, planned = f"{facts['parameters']:,}", f"{plan.parameters:,}"
        raise CheckpointError(f"{output}: stores {stored} parameters, planned were {planned}; plan and export again")
    return {name: facts[name] for name in ("ratio", "parameters", "bytes", *(["active_parameters"] if form == "dense" else []))}


def _write(bench: Workbench, plan: Plan, output: Path, form: Format, card: CardFacts, overwrite: bool) -> None:
    pipeline = bench.pipeline
    pipeline.compensate(plan, bench.report)

    def factors(layer: ExpertLayer) -> LayerFactors | None:
        with bench.stream.layer(layer.index):
            return pipeline.factors(plan, layer.index)

    written = pipeline.dtype or expert_dtype(bench.stream)
    source = bench.stream if bench.stream.dtype == written else bench.files  # what is written must be what was run
    export_streamed(source, factors, output, format=form, dtype=pipeline.dtype, card=card, overwrite=overwrite, report=bench.report)


def _to_replace(bench: Workbench, output: Path, overwrite: bool) -> bool:
    """Whether an export that is to be made again is damaged, rather than whole.

    Raises:
        CheckpointError: it is damaged, and replacing it unasked could delete what is not ours.
    """
    try:
        verify(output, report=bench.report)
    except CheckpointError as error:
        if not overwrite and not _ours_alone(bench, output):
            advice = "name another folder or allow overwriting"
            raise CheckpointError(f"{output} holds this very export, but damaged ({error}): {advice}") from error
        return True
    return False


def _ours_alone(bench: Workbench, output: Path) -> bool:
    """Whether the output lies among the run's exports and holds nothing beside what its manifest, where that can be read, lists."""
    if output.resolve().parent != bench.run.station("exports").resolve():
        return False
    try:
        listed = read_manifest(output).keys() | {MANIFEST}
    except CheckpointError:
        return True
    return listed >= {path.name for path in output.iterdir()}


def _same_export(bench: Workbench, plan: Plan, output: Path, form: Format) -> bool:
    """Whether the output is an export of this plan in this format and number format, as far as it says; one that names none is not."""
    try:
        facts = json.loads((output / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    dtype = dtype_name(bench.pipeline.dtype or expert_dtype(bench.stream))
    asked = {"format": form, "dtype": dtype, "plan": json.loads(json.dumps(plan.as_dict()))}
    return isinstance(facts, dict) and all(facts.get(name) == value for name, value in asked.items())


def card_facts(bench: Workbench, plan: Plan, known: Mapping[str, Any], command: str | None) -> CardFacts:
    """What the model card says beyond the files.

    Args:
        known: the plan's record in the run; has the figures of an evaluation if there was one.
        command: the command that makes the export again.
    """
    calibration, statistics = bench.calibration, bench.statistics
    fewer = "" if calibration.gradient_samples is None else f", gradients of {calibration.gradient_samples} of them"
    figures = []
    if "perplexity" in known:
        on = f"{known['dataset']}, {known['windows']} windows of {known['length']} tokens"
        before, after = Evaluation(**known["original"]), Evaluation(**{item.name: known[item.name] for item in fields(Evaluation)})
        figures = [
            (f"perplexity ({on})", _pm(before), _pm(after)),
            (f"KL to the original, nats a token ({on})", "0", f"{after.kl_mean:.4f}"),
            (f"same most likely token ({on})", "100 %", f"{100 * (after.top1_agreement or 0):.1f} %"),
        ]
    return CardFacts(
        source=Path(bench.run.identity.model).name,
        method=", ".join([plan.method, *plan.fits]),
        calibration=f"{calibration.dataset}, {statistics.windows} windows of {statistics.length} tokens{fewer}, seed {calibration.seed}",
        command=command,
        figures=tuple(figures),
        licence=bench.source.facts.get("licence"),
        plan=plan.as_dict(),
    )


def _pm(evaluation: Evaluation) -> str:
    error = evaluation.perplexity_stderr
    return f"{evaluation.perplexity:.2f}" + ("" if error is None else f" ± {error:.2f}")
