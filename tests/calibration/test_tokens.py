"""Long documents tokenized in pieces: the ids of the whole, from every kind of tokenizer, and no more work than was asked for."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moesvd_core.calibration import tokens
from moesvd_core.calibration.text import evaluation_windows, load_texts
from moesvd_core.calibration.tokens import document_ids, encode


def prose() -> str:
    """Running text with paragraphs, which both kinds of line end and some runs of white space have been worked into."""
    parts = "\n\n".join(load_texts("sotu", "test")[:4]).split(". ")
    return ". \n".join(part if number % 7 else f"{part}  \r\n\t" for number, part in enumerate(parts))[:120_000]


LETTERS = pre_tokenizers.ByteLevel.alphabet()


def byte_level() -> Tokenizer:
    """As in GPT-2 and most models after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator([prose()], trainers.BpeTrainer(vocab_size=900, initial_alphabet=LETTERS, show_progress=False))
    return tokenizer


def joined() -> Tokenizer:
    """As in Llama 2: a mark put before the text, spaces turned into it, and pairs merged over all of the text at once."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training alone, where it takes a thousandth of the time
    tokenizer.train_from_iterator([prose()], trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>"], show_progress=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    return tokenizer


def unigram() -> Tokenizer:
    """As in T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([prose()], trainer)
    return tokenizer


def word_pieces() -> Tokenizer:
    """As in BERT, which drops white space."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator([prose()], trainers.WordPieceTrainer(vocab_size=900, special_tokens=["<unk>"], show_progress=False))
    return tokenizer


KINDS = {each.__name__: each for each in (byte_level, joined, unigram, word_pieces)}


@pytest.fixture(scope="module", params=[*KINDS, "characters"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == "characters":
        return tiny_tokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[request.param](), unk_token="<unk>")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many characters were tokenized at a time, with pieces small enough for short texts to have many."""
    sizes: list[int] = []

    def noted(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        sizes.append(len(text))
        return encode(tokenizer, text)

    for name, value in {"WHOLE": 9000, "PIECE": 3000, "_OVERLAP": 300, "_REACH": 400, "encode": noted}.items():
        monkeypatch.setattr(tokens, name, value)
    return sizes


def test_pieces_give_the_ids_of_the_whole(tokenizer: PreTrainedTokenizerBase, given: list[int]) -> None:
    text = prose()
    assert list(document_ids(tokenizer, text)) == encode(tokenizer, text)
    assert max(given) < 10_000, "no piece had to grow"


@pytest.mark.parametrize(
    "text", ["a" * 50_001, "ab" * 20_000, " " * 30_000, "ab \n" * 9000, "日本語の文字" * 5000, "x\n" * 20_000, "e\u0301" * 20_000]
)
def test_texts_without_words_or_lines_stay_as_they_were(text: str, tokenizer: PreTrainedTokenizerBase, given: list[int]) -> None:
    assert list(document_ids(tokenizer, text)) == encode(tokenizer, text)


@pytest.mark.parametrize("characters", [0, 1, 9000])
def test_a_short_document_is_tokenized_at_once(characters: int, given: list[int]) -> None:
    text = prose()[:characters]
    assert list(document_ids(tiny_tokenizer(), text)) == encode(tiny_tokenizer(), text)
    assert given == [characters]


def test_a_tokenizer_that_looks_far_gets_all_of_the_text(given: list[int]) -> None:
    """Each id depends on how long the text before it is: no cut can be found."""

    def counting(text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}

    text = "some words " * 3000
    assert list(document_ids(counting, text)) == list(range(len(text)))  # type: ignore[arg-type]
    assert max(given) == len(text)


def test_no_more_is_tokenized_than_is_asked_for(given: list[int], tmp_path: Path) -> None:
    text = prose()
    assert list(islice(document_ids(tiny_tokenizer(), text), 100)) == encode(tiny_tokenizer(), text)[:100]
    assert sum(given) < 9000
    given.clear()
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8", newline="")
    assert evaluation_windows(tiny_tokenizer(), str(path), 32, 4).shape == (4, 32)
    assert sum(given) < 9000
