"""What is said of a number that cannot be used: the name of its field, the bound, and what was given.

    tokens = gr.Number(96, label=_NAMES["new_tokens"])
    with named(_NAMES):
        sampling = Sampling(new_tokens=tokens)

Fields have no bounds and no precision of their own: Gradio says what is out of bounds without a word about which field that is, and rounds
where it has a precision. The engine, which knows the bounds, does neither, but calls a setting by its own name.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from moesvd_core.errors import InputError


@contextmanager
def named(labels: Mapping[str, str]) -> Iterator[None]:
    """Let an error about one of these settings call it by its field.

    Args:
        labels: name of a setting -> label of its field.

    Raises:
        InputError: "new_tokens must be …" as "“Tokens” must be …".
    """
    try:
        yield
    except InputError as error:
        name, _, rest = str(error).partition(" ")
        if name not in labels:
            raise
        raise InputError(f"“{labels[name]}” {rest}") from error
