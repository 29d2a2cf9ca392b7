"""The tokenizer of a model folder that was checked."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moesvd_core.architectures.headers import shortened
from moesvd_core.errors import CheckpointError


def load_tokenizer(folder: Path, *, allow_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder that `ModelFiles` has opened.

    Args:
        allow_remote_code: run code that comes with the model.

    Raises:
        CheckpointError: there is none, or its files are damaged.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=allow_remote_code)
    except Exception as error:  # each kind of tokenizer fails in its own way
        reason = f"{type(error).__name__}: {shortened(str(error).strip().partition(chr(10))[0])}"
        raise CheckpointError(f"{folder}: no tokenizer can be loaded ({reason}); fetch tokenizer.json and its settings as well") from error
    return tokenizer
