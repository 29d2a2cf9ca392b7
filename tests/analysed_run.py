"""A tiny model's run with everything that the pages of layers and experts show: analysed, measured layer by layer, experts compared."""

from pathlib import Path

from runs.tiny_runs import TEXT, do, named, tiny_run

from moesvd_core.runs.folder import RunFolder

METHODS = ["auto", "moe-svd", "svd-llm"]


def analysed_run(root: Path, name: str = "analysed-0000000a") -> RunFolder:
    """Make it under `root`, older than any other run, so that no page opens on it unasked."""
    made = tiny_run(root / name)
    for action, arguments in (
        ("similarity", {"experts": 3}),
        ("sensitivity", {"recipe": {"method": "auto", "ratio": 0.5}, "text": TEXT}),
        ("analyze", {"methods": METHODS, "text": TEXT}),
    ):
        job = do(made, action, **arguments)
        assert job.state == "finished", job.error
    return named(made, name, created="2024-01-01T00:00:00+00:00")
