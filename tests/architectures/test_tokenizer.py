"""A model folder's tokenizer is loaded, or refused in one line that names the folder."""

from pathlib import Path

import pytest
from tiny_models import tiny_tokenizer

from moesvd_core.architectures.tokenizer import load_tokenizer
from moesvd_core.errors import CheckpointError


def test_a_saved_tokenizer_comes_back(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("we the people")["input_ids"] == tiny_tokenizer()("we the people")["input_ids"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"{}", b"[]", b"\xff", b'{"version": "1.0", "model": {"type": "BPE"}}'])
def test_none_or_a_damaged_one_is_refused_in_one_line(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        tiny_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"no tokenizer can be loaded .* fetch tokenizer\.json") as raised:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
