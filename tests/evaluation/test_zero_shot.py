"""Task definitions for local rows; the harness itself is optional and only asked where it is installed."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_models import TINY, save_tiny
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moesvd_core.errors import InputError
from moesvd_core.evaluation import zero_shot as module
from moesvd_core.evaluation.zero_shot import task_definition, zero_shot

torch.set_num_threads(1)
ROWS = [
    {"goal": f"to open door {i}", "sol1": "turn the handle", "sol2": "eat the handle", "label": i % 2} for i in range(4)
]  # schema of the hub's piqa


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_tiny("mixtral", tmp_path / "model", fused=True))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "piqa.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return folder


def test_a_definition_keeps_the_stock_task_and_reads_the_local_file(tmp_path: Path) -> None:
    definition = task_definition("piqa", tmp_path / "piqa.jsonl", Path("stock.yaml"))
    assert definition["include"] == "stock.yaml"
    assert definition["dataset_kwargs"] == {"data_files": {"validation": str(tmp_path / "piqa.jsonl")}}
    assert (definition["validation_split"], definition["test_split"], definition["training_split"]) == ("validation", None, None)


@pytest.mark.parametrize(
    ("tasks", "message"), [(["piqua"], "one of openbookqa, .*got piqua"), (["mathqa"], r"no rows of mathqa: put mathqa\.jsonl")]
)
def test_says_which_tasks_and_files_there_are(tasks: list[str], message: str, data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=message):
        zero_shot(TINY["mixtral"](), tokenizer, data, tasks=tasks)


def test_says_what_to_put_into_an_empty_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"no rows of any task: put one or more of openbookqa\.jsonl"):
        zero_shot(TINY["mixtral"](), tokenizer, tmp_path)


def test_refuses_numbers_out_of_bounds(data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="limit must be a whole number of at least 1, got 0"):
        zero_shot(TINY["mixtral"](), tokenizer, data, limit=0)


def test_says_how_to_get_the_harness(data: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install lm-eval"):
        zero_shot(TINY["mixtral"](), tokenizer, data)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is an optional dependency")
@pytest.mark.filterwarnings("ignore")
def test_scores_local_rows(data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    score = zero_shot(TINY["mixtral"](), tokenizer, data)["piqa"]
    assert score.rows == 4
    assert score.stderr is not None and 0 <= score.stderr <= 0.3
    assert score.accuracy in (0, 0.25, 0.5, 0.75, 1)
