"""Scores by token add up to what perplexity reports."""

from pathlib import Path

import pytest
import torch
from tiny_models import TINY, save_tiny
from transformers import AutoTokenizer

from moesvd_core.errors import InputError
from moesvd_core.evaluation.text_scores import token_scores

torch.set_num_threads(1)


def test_scores_are_the_models_log_probabilities(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny("mixtral", tmp_path / "model", fused=True))
    model, original = TINY["mixtral"]().eval(), TINY["qwen3_moe"]().eval()
    text = "once upon a time there was a fox"
    ids_1L = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        columns = [each(ids_1L).logits[0, :-1].log_softmax(-1).gather(-1, ids_1L[0, 1:, None]).flatten() for each in (model, original)]
    scores = token_scores(model, original, tokenizer, text)
    assert [score.logp for score in scores] == pytest.approx(columns[0].tolist(), rel=1e-4)
    assert [score.change for score in scores] == pytest.approx((columns[0] - columns[1]).tolist(), rel=1e-3, abs=1e-4)
    assert [score.text for score in scores] == [tokenizer.decode([token]) for token in ids_1L[0, 1:].tolist()]


@pytest.mark.parametrize("text", ["", "word " * 80])
def test_says_how_long_a_text_may_be(text: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny("mixtral", tmp_path / "model", fused=True))
    model = TINY["mixtral"]().eval()
    with pytest.raises(InputError, match="2 to 64 tokens"):
        token_scores(model, model, tokenizer, text)
