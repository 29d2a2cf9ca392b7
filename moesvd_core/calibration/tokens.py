"""A document's token ids without tokenizing more of it than is asked for.

A tokenizer needs a hundred times as much memory as the text that it is given, and a text file is one document, however long. So a long one
is tokenized in pieces, cut where the pieces give the ids of the whole.
"""

import re
from collections.abc import Iterator
from itertools import islice

from transformers import PreTrainedTokenizerBase

WHOLE = 2**20
"""Characters up to which a document is tokenized at once."""
PIECE = 2**18
"""Characters of a longer one that are tokenized at a time, at least."""
_OVERLAP = 2**11
"""Characters before and behind a cut that are tokenized with both of its sides; many times what one token depends on."""
_REACH = 2**13
"""Characters in which a cut is looked for."""
_TRIES = 4
"""Cuts of each kind that are tried there."""
_KINDS = (re.compile(r"(?<=\n)(?=\S)"), re.compile(r"(?<=\S)(?=[^\S\n]\S)"), re.compile(r"(?=[\s\S])"))
"""Where a cut may be: at the beginning of a line, at the end of a word, and, for a text that has neither, anywhere."""


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without any that a tokenizer puts before or behind it."""
    # verbose=False: a document longer than the model's context is normal here, and is cut into windows afterwards.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def document_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[int]:
    """Token ids of a document, of which only as much is tokenized as is consumed.

    Up to `WHOLE` characters are tokenized at once. A longer document is tokenized in pieces that give the ids of the whole: each begins
    with some of the text before it, whose ids are left out, and ends where the ids behind the cut are the same whether the tokenizer begins
    a short way before the cut or with the piece. That holds for every tokenizer whose ids do not depend on what is further away than
    `_OVERLAP` characters, as they do with none of the usual kinds. Where no such place is found the piece grows, up to the rest of the
    document.
    """
    begin, skipped, size = 0, 0, PIECE
    while len(text) - begin > max(WHOLE, size + _REACH + _OVERLAP):
        reach = begin + size + _REACH
        stop = reach + _OVERLAP
        ids = encode(tokenizer, text[begin:stop])
        for cut in _cuts(text, begin + size, reach):
            before = encode(tokenizer, text[cut - _OVERLAP : cut])
            both = encode(tokenizer, text[cut - _OVERLAP : stop])
            behind = both[len(before) :]
            if behind and both[: len(before)] == before and ids[-len(behind) :] == behind:
                yield from islice(ids, skipped, len(ids) - len(behind))
                begin, skipped, size = cut - _OVERLAP, len(before), PIECE
                break
        else:
            size *= 2
    yield from islice(encode(tokenizer, text[begin:]), skipped, None)


def _cuts(text: str, start: int, stop: int) -> Iterator[int]:
    """Where the text may be cut between two places, the likeliest first."""
    for kind in _KINDS:
        yield from (found.start() for found in islice(kind.finditer(text, start, stop), _TRIES))
