"""What was measured of a run's model and its plans, as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesvd_core.planning import Recipe
from moesvd_core.runs.known import Measured
from pages.components import tables
from pages.components.text import empty, number, recipe_name, share, size


def measured_html(rows: Sequence[Measured], chosen: Recipe) -> str:
    """Perplexity and distance to the original of everything measured, the view's own recipe lit."""
    if not rows:
        advice = "Choose a text and measure this plan: original and compressed are scored on the same tokens."
        return empty("Nothing was measured yet", advice)
    columns = [
        tables.Column("text", "Text"),
        tables.Column("model", "Model"),
        tables.Column("bytes", "Size", size, number=True),
        tables.Column("perplexity", "Perplexity", lambda value: f"{value:,.2f}", number=True),
        tables.Column("perplexity_stderr", "± error", lambda value: f"{value:,.2f}", number=True),
        tables.Column("delta_nll", "ΔNLL, nats", _signed, number=True),
        tables.Column("kl_mean", "KL mean, nats", number, number=True),
        tables.Column("kl_p95", "KL 95 %, nats", number, number=True),
        tables.Column("top1_agreement", "Same first choice", share, number=True),
    ]
    shown = [_row(row) for row in rows]
    return tables.table(
        shown, columns, caption="Measured on data", name="measured", chosen=lambda row: row["recipe"] == chosen, height=420,
    )


def _row(row: Measured) -> dict[str, Any]:
    figures = row.figures
    text = f"{Path(str(figures['dataset'])).name}, {figures['windows']} × {figures['length']} tokens"
    model = "original" if row.recipe is None else f"{recipe_name(row.recipe)} {share(row.ratio)}"
    return {**figures, "text": text, "model": model, "bytes": row.bytes, "recipe": row.recipe}


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")
