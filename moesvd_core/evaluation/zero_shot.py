"""Zero-shot accuracy on the seven sets of the paper (Table 2), through lm-evaluation-harness, which is an optional dependency.

The harness brings prompts and metrics; this module only points its stock tasks at local files, so that a score needs no network and says
exactly which rows it was measured on. Rows keep the schema that the set has on the hub.
"""

import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesvd_core.errors import InputError, require_whole

STOCK_TASKS = {
    "openbookqa": "openbookqa/openbookqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "mathqa": "mathqa/mathqa.yaml",
}
"""The paper's sets, and where the harness keeps their definitions."""

_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class TaskScore:
    """Accuracy on one set.

    Attributes:
        accuracy, stderr: share of right answers and its standard error over rows (None for a single row).
        normalised: the same with answers' log-likelihoods divided by their length, where the set defines it.
        rows: questions asked.
    """

    accuracy: float
    stderr: float | None
    normalised: float | None
    rows: int


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, TaskScore]:
    """Accuracy by task on local rows.

    Args:
        data: folder with one `<task>.jsonl` or `<task>.json` a set.
        tasks: names out of `STOCK_TASKS`; None: every set that the folder holds.
        limit: rows a set; None: all.

    Raises:
        InputError: the harness is not installed, a task is unknown or has no file, or a number is out of bounds.
    """
    files = task_files(data, tasks)
    for name, value in (("limit", limit), ("batch", batch)):
        if value is not None:
            require_whole(name, value, 1)
    require_harness()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        for task, file in files.items():
            definition = task_definition(task, file, Path(lm_eval.__file__).parent / "tasks" / STOCK_TASKS[task])
            (Path(folder) / f"{task}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            tasks=list(files),
            limit=limit,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
        )
    return {task: _score(results["results"][task], results["n-samples"][task]["effective"]) for task in files}


def task_definition(task: str, file: Path, stock: Path) -> dict[str, Any]:
    """A harness task that keeps the stock prompts and metrics and reads a local file."""
    return {
        "include": str(stock),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(file.resolve())}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }


def require_harness() -> None:
    """
    Raises:
        InputError: the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("zero-shot evaluation needs lm-evaluation-harness: pip install lm-eval")


def task_files(data: Path, tasks: Sequence[str] | None = None) -> dict[str, Path]:
    """The file of every set that is asked for, or that the folder holds.

    Raises:
        InputError: a set that is not known, or has no file.
    """
    found = {task: file for task in STOCK_TASKS for suffix in _SUFFIXES if (file := data / f"{task}{suffix}").is_file()}
    for task in tasks or ():
        if task not in STOCK_TASKS:
            raise InputError(f"task must be one of {', '.join(STOCK_TASKS)}, got {task}")
        if task not in found:
            raise InputError(f"no rows of {task}: put {task}.jsonl with the rows of the hub's data set into {data}")
    if not found:
        raise InputError(f"no rows of any task: put one or more of {', '.join(f'{task}.jsonl' for task in STOCK_TASKS)} into {data}")
    return {task: found[task] for task in tasks or found}


def _score(figures: dict[str, Any], rows: int) -> TaskScore:
    error = figures.get("acc_stderr,none")
    return TaskScore(figures["acc,none"], error if isinstance(error, float) else None, figures.get("acc_norm,none"), rows)
