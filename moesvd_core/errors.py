"""Every error that a person can cause or must act on. Each message names the value, the bound and the fix."""

from typing import TypeGuard


class MoesvdError(Exception):
    """Base of all errors raised on purpose; the command line prints its message in one line, the pages show it as it is."""


class InputError(MoesvdError, ValueError):
    """A parameter, a name or a text that cannot be used (exit status 2)."""


class UnsupportedModelError(InputError):
    """The model has no routed experts, or keeps them in a form that this project cannot factor."""


class CheckpointError(InputError):
    """A model file that is missing, damaged, unsafe or inconsistent; the message names the file and, where known, the tensor."""


class UnreachableHubError(CheckpointError):
    """The hub cannot be asked for a model now; nothing is known of whether there is one of that name."""


class StatisticsError(MoesvdError):
    """Calibration produced or met something that cannot be used; the message names the layer and the expert."""


class EvaluationError(MoesvdError):
    """A model's answer that cannot be measured (a loss that is not finite); the message names the window."""


class ResourceError(MoesvdError):
    """Not enough memory or disk; the message says how much is needed and how much there is."""


class HubError(MoesvdError):
    """The hub cannot be reached or refuses; the message says what was changed there."""


class RunError(MoesvdError):
    """A run folder that cannot be used as asked: unknown, busy, damaged or of another model."""


class Cancelled(MoesvdError):  # noqa: N818 - it is not a fault
    """The person asked to stop; what was finished is kept."""


MOST_WINDOWS = 1_000_000
"""Windows that anybody may ask for: more is a slip of the hand, and would be found out after minutes of reading text."""
_MOST_SEED = 2**32 - 1


def is_number(value: object) -> TypeGuard[float]:
    """Whether a setting is a number, which can be held against bounds; text is none, nor is a truth value that stands where one belongs."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_flag(name: str, value: object) -> None:
    """Refuse what is neither true nor false, though it could be taken for one of them.

    Raises:
        InputError: it is.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, got {value!r}")


def require_whole(name: str, value: object, least: int, unit: str = "", *, most: int | None = None) -> None:
    """Refuse what is no whole number, or too small or too large a one; rounding would do something else than was asked for.

    Raises:
        InputError: it is.
    """
    if most is not None and is_number(value) and value > most:  # first: large numbers that are typed come as 1e+30
        raise InputError(f"{name} must be at most {most:,} {unit}".rstrip() + f", got {value:,}")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least} {unit}".rstrip() + f", got {value!r}")


def require_seed(value: object) -> None:
    """Refuse what not every generator of random numbers takes for a seed.

    Raises:
        InputError: it is none.
    """
    require_whole("seed", value, 0, most=_MOST_SEED)
