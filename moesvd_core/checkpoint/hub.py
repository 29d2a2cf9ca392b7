"""Publishing an export on the Hugging Face hub: checked, then sent as one commit, so that nobody meets half of it.

The token is used for this and kept nowhere; no message and no log line of this project ever holds it.
"""

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from moesvd_core.checkpoint.manifest import MANIFEST, check_manifest, read_manifest
from moesvd_core.errors import HubError, InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TOKEN = re.compile(r"[\x21-\x7e]{8,400}")
_MEANING = {
    401: "the hub does not know this token: copy it again from your account's access tokens",
    403: "this token may not write there: make one with write access, or name a repository of your own",
    404: "the hub finds no such place for this token: check the owner's name, and that the token may write",
    409: "the repository changed meanwhile: push again",
    429: "the hub asks to wait: push again in some minutes",
}


def check_request(repository: str, token: str) -> None:
    """Refuse at once what cannot be a repository or a token.

    Raises:
        InputError: it cannot; a token is never repeated in the message.
    """
    if not _NAME.fullmatch(repository) or ".." in repository or "--" in repository:
        raise InputError(f"repository must be owner/name, of letters, digits, dots, dashes and underscores, got {repository[:200]!r}")
    if not _TOKEN.fullmatch(token):
        raise InputError("token must be an access token of your hub account, 8 to 400 characters without spaces: paste it again")


def push(folder: Path, repository: str, token: str, *, private: bool = True, endpoint: str | None = None) -> str:
    """Publish an export as one commit, in a repository that is made where there is none; returns the address of the commit.

    Files of the repository that the export does not have stay as they are.

    Args:
        repository: "owner/name".
        token: with write access; the machine's own login is never used.
        private: of a repository that is made; an existing one stays as it is.
        endpoint: address of the hub; None: the public one, or that of `$HF_ENDPOINT`.

    Raises:
        InputError: no repository name or token.
        CheckpointError: the export is not whole.
        HubError: the hub cannot be reached, or refuses.
    """
    check_request(repository, token)
    check_manifest(folder)
    files = (*sorted(read_manifest(folder)), MANIFEST)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
    try:
        api = HfApi(endpoint=endpoint, token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message=f"Add {folder.name}, compressed with moesvd")
    except HFValidationError as error:
        raise InputError(f"repository {repository!r} cannot be used: {_safe(error, token)}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = _MEANING.get(status) or _safe(error.server_message or error, token)
        raise HubError(f"{repository} was not changed, the hub answers {status}: {reason}") from None
    except OfflineModeIsEnabled:
        raise HubError("this machine is set to work offline (HF_HUB_OFFLINE): nothing was pushed, the export is still here") from None
    except Exception as error:  # the hub's library passes on whatever its HTTP and transfer libraries raise
        reason = f"{type(error).__name__}: {_safe(error, token)}"
        raise HubError(f"the hub cannot be reached, or the transfer broke off ({reason}): check the network and push again") from None
    return str(commit.commit_url)


def _safe(error: Exception | str, token: str) -> str:
    """The first line of an error, without the token."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__).replace(token, "[token]")[:300]
