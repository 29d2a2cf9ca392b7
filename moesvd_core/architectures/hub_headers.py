"""What the hub says of a model before it is downloaded: configuration, tensor headers, licence and gate. No weight is fetched."""

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub
from huggingface_hub.utils._safetensors import SafetensorsRepoMetadata

from moesvd_core.architectures.files import CONFIG, ModelFiles, read_config, refuse_remote_code
from moesvd_core.architectures.headers import DTYPES, StoredTensor, shortened
from moesvd_core.errors import CheckpointError, UnreachableHubError


@dataclass(frozen=True)
class HubHeaders:
    """Everything about a model of the hub but its weights.

    Attributes:
        files: its configuration and headers as of a local folder; reading a tensor is a `CheckpointError`, since no weights are there.
        licence: as the model card names it, or None.
        gated: whether its author must let a person in before it can be downloaded.
    """

    files: ModelFiles
    licence: str | None
    gated: bool


def hub_headers(repository: str) -> HubHeaders:
    """Fetch a model's configuration and the headers of its weights files, all of one revision.

    Raises:
        CheckpointError: unknown, gated, without safetensors files, or damaged.
        UnreachableHubError: the hub cannot be asked.
        UnsupportedModelError: the model needs code of its own.
    """
    name = shortened(repository)
    try:
        info = huggingface_hub.HfApi().model_info(repository)
        folder = Path(huggingface_hub.hf_hub_download(repository, CONFIG, revision=info.sha)).parent
        metadata = huggingface_hub.get_safetensors_metadata(repository, revision=info.sha)
    except hub.GatedRepoError as error:
        raise CheckpointError(f"{name} is gated: accept its terms on the hub, log in with `hf auth login`, and try again") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise CheckpointError(f"{name} is neither a model folder nor a model of the hub ('owner/name'); check the spelling") from error
    except (hub.NotASafetensorsRepoError, hub.SafetensorsParsingError) as error:
        raise CheckpointError(f"{name} has no readable safetensors files on the hub, and pickled weights are refused") from error
    except Exception as error:  # the network has many ways to fail, and the hub's library passes on those of its HTTP client
        reason = type(error).__name__
        raise UnreachableHubError(
            f"{name} is no model folder, and the hub cannot be asked for it ({reason}); give a folder, or try again once the hub is reached"
        ) from error
    config = read_config(folder)
    refuse_remote_code(config, folder)
    licence = info.card_data.get("license") if info.card_data else None
    return HubHeaders(ModelFiles(folder, config, _tensors(folder, metadata)), licence, bool(info.gated))


def _tensors(folder: Path, metadata: SafetensorsRepoMetadata) -> dict[str, StoredTensor]:
    """The headers in our own form."""
    tensors = {}
    for file, header in metadata.files_metadata.items():
        for key, tensor in header.tensors.items():
            if tensor.dtype not in DTYPES:
                raise CheckpointError(f"{file}: tensor {shortened(key)} has dtype {shortened(tensor.dtype)}, known are {', '.join(DTYPES)}")
            tensors[key] = StoredTensor(key, folder / file, DTYPES[tensor.dtype], tuple(tensor.shape), *tensor.data_offsets)
    return tensors
