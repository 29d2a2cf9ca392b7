"""The tiny models themselves: every family saves and reloads with equal logits, under both sets of tensor names."""

from pathlib import Path

import pytest
import torch
from tiny_models import TINY, save_tiny, tiny_batch, tiny_tokenizer
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)


@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
@pytest.mark.parametrize("name", TINY)
def test_a_saved_tiny_model_reloads_with_equal_logits(name: str, fused: bool, tmp_path: Path) -> None:
    reloaded = AutoModelForCausalLM.from_pretrained(save_tiny(name, tmp_path, fused), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**tiny_batch()).logits, TINY[name]()(**tiny_batch()).logits, rtol=0, atol=1e-6)


def test_the_tiny_tokenizer_reads_back_what_it_writes() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer("Ab c\n!").input_ids == [65, 98, 32, 99, 10, 33]
