"""A decoder run one layer at a time, so that a model larger than the memory can be calibrated, compressed and evaluated.

`LayerStream` reads each layer from disk when it is needed and drops it after; `MemoryStream` gives a model that is already loaded the
same manners. Masks, positions and whatever else a family hands to its layers are not built here: one pass with every layer replaced by a
recorder yields each layer's exact arguments (`embed`), and the model's own norm and head finish the job (`head`).

Shapes: B rows of a batch, T tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.find import decoder_layers, expert_layers
from moesvd_core.architectures.host_memory import bound_kernel_caches, return_freed_memory
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.loading import WeightLoader
from moesvd_core.architectures.skeleton import skeleton
from moesvd_core.errors import InputError, UnsupportedModelError

CHUNK_ELEMENTS = 2**24
"""Logits that whoever calls `head` holds at once (64 MiB in float32), whatever the vocabulary."""

_GROUPED_BYTES = 16
"""Bytes of which every row must be a multiple for torch's grouped product."""

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]
"""What a decoder layer is called with besides the hidden state: positional and keyword arguments."""


class DecoderStream(Protocol):
    """A decoder whose layers are used one after the other.

    Attributes:
        model: the whole model; weights of its layers are only there inside `layer`.
        layers: its decoder layers.
        config: its configuration.
        device, dtype: of hidden states.
        expert_layers: the layers with routed experts; asking a dense model for them raises `UnsupportedModelError`.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    config: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def expert_layers(self) -> list[ExpertLayer]: ...

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """The decoder layer with its weights, for as long as the context lasts; nested uses of one layer load it once."""
        ...

    def embed(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[LayerCall]]:
        """Hidden states [B, T, D] that enter the first layer, and every layer's other arguments.

        Raises:
            UnsupportedModelError: the decoder does more between its layers than handing on the hidden states.
        """
        ...

    def run_layer(self, index: int, hidden_BTD: Tensor, call: LayerCall) -> Tensor:
        """Hidden states [B, T, D] after the layer; differentiable. Hold `layer(index)` around several calls to load it once."""
        ...

    def head(self, hidden_BTD: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, T, V] of the last layer's hidden states; differentiable. Any chunk of tokens may come, with its part of the batch."""
        ...


class _Decoder:
    """What both streams have in common: everything but where the weights come from."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model = model
        self.config: Any = model.config
        self.device = device
        self.dtype: torch.dtype = model.dtype
        _avoid_grouped_product(model)
        name, self.layers = decoder_layers(model)
        self._decoder = model.get_submodule(name.rpartition(".")[0])

    @cached_property
    def expert_layers(self) -> list[ExpertLayer]:
        return expert_layers(self.model)

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        raise NotImplementedError

    @torch.no_grad()
    def embed(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[LayerCall]]:
        entered: list[Tensor] = []
        calls: list[LayerCall] = []

        def recorder(index: int) -> Callable[..., Tensor]:
            def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if index != len(calls) or (entered and hidden_states is not entered[-1]):
                    raise UnsupportedModelError(
                        f"{type(self.model).__name__} does not pass hidden states straight from layer to layer (seen at layer {index}), "
                        "so that its layers cannot be run one at a time"
                    )
                entered.append(hidden_states)
                calls.append((args, kwargs))
                return hidden_states

            return record

        with _replaced(self.layers, [recorder(index) for index in range(len(self.layers))]):
            self._decoder(**self._on_device(batch), use_cache=False)
        return entered[0], calls

    def run_layer(self, index: int, hidden_BTD: Tensor, call: LayerCall) -> Tensor:
        args, kwargs = call
        with self.layer(index) as module:
            after: Tensor | tuple[Tensor, ...] = module(hidden_BTD, *args, **kwargs)
        return after if isinstance(after, Tensor) else after[0]

    def head(self, hidden_BTD: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        def give(*args: Any, **kwargs: Any) -> Tensor:
            return hidden_BTD

        with _replaced(self.layers, [give] * len(self.layers)):
            logits: Tensor = self.model(**self._on_device(batch), use_cache=False).logits
        return logits

    def _on_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in batch.items()}


def _avoid_grouped_product(model: PreTrainedModel) -> None:
    """Let a model compute its experts one after the other where torch's grouped product refuses the size of their rows."""
    if getattr(model.config.get_text_config(), "_experts_implementation", None) != "grouped_mm":
        return
    with suppress(UnsupportedModelError):  # without experts, or with ones that only whoever asks for them has to know of
        sizes = {size for layer in expert_layers(model) for size in (layer.hidden, layer.width)}
        if any(size * model.dtype.itemsize % _GROUPED_BYTES for size in sizes):
            model.set_experts_implementation("eager")


def require_known(model: PreTrainedModel, ids: Tensor) -> None:
    """Refuse token ids that a model has no embedding for; a GPU would answer them with an assertion that ends the process.

    Raises:
        InputError: there are some.
    """
    embedding: Any = model.get_input_embeddings()
    rows, largest = len(embedding.weight), int(ids.max())
    if largest >= rows:
        raise InputError(
            f"the tokenizer's ids must be below {rows:,}, the rows of the model's embedding, got {largest:,}: "
            "use the tokenizer that belongs to the model"
        )


class LayerStream(_Decoder):
    """A model folder as a `DecoderStream`: memory for one decoder layer and for what lies outside the layers, no more.

    Attributes:
        files: the checked folder.
        unused: tensors on disk for which the model has no place (prediction heads that transformers leaves aside, for example).
    """

    def __init__(
        self,
        path: Path | str | ModelFiles,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        allow_remote_code: bool = False,
        kind: type[PreTrainedModel] | None = None,
        like: PreTrainedModel | None = None,
    ) -> None:
        """Check the folder, build the model without weights, and load what lies outside the layers.

        Args:
            path: a model folder (dense or factored), or one that was opened already.
            dtype: floating type to compute in; None keeps that of the checkpoint.
            device: where layers are loaded to.
            kind, like: class of the model, and a loaded one that it is to compute like; as `skeleton` takes them.

        Raises:
            CheckpointError: a file is missing, damaged, unsafe or inconsistent; every tensor's name, shape and dtype is checked here.
            UnsupportedModelError: the model cannot be built without code of its own.
        """
        bound_kernel_caches()
        self.files = path if isinstance(path, ModelFiles) else ModelFiles.open(path, allow_remote_code=allow_remote_code)
        model, quantizer = skeleton(self.files, dtype, allow_remote_code=allow_remote_code, kind=kind, like=like)
        super().__init__(model, torch.device(device))
        self._loader = WeightLoader(model, self.files, decoder_layers(model)[0], self.device, quantizer)
        self.unused = tuple(self._loader.unused)
        self._holders = [0] * len(self.layers)
        self._last = -1

    def key_of(self, name: str) -> str:
        """The tensor on disk that holds a parameter of the model, by their names.

        Raises:
            CheckpointError: it is made from several, or in another form.
        """
        return self._loader.key_of(name)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The decoder layer with its weights, for as long as the context lasts; nested uses of one layer load it once.

        Raises:
            InputError: no such layer.
            CheckpointError: a tensor of the layer cannot be read, or holds NaN or Inf.
        """
        if not 0 <= index < len(self.layers):
            raise InputError(f"layer must be in [0, {len(self.layers) - 1}], got {index}")
        self._holders[index] += 1
        try:
            if self._holders[index] == 1:
                return_freed_memory()  # what the last layer's work left behind
                self._loader.load(index)
                # Passes go up or down the layers: the next one is read from the disk while this one is worked on.
                self._loader.announce(index + (1 if index >= self._last else -1))
                self._last = index
            yield self.layers[index]
        finally:
            self._holders[index] -= 1
            if not self._holders[index]:
                self._loader.free(index)


class MemoryStream(_Decoder):
    """A loaded model as a `DecoderStream`: nothing to load, nothing to free."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap a model; put it into evaluation mode first if it has dropout. One whose experts torch's grouped product refuses computes
        them one after the other from then on."""
        super().__init__(model, next(model.get_input_embeddings().parameters()).device)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The decoder layer.

        Raises:
            InputError: no such layer.
        """
        if not 0 <= index < len(self.layers):
            raise InputError(f"layer must be in [0, {len(self.layers) - 1}], got {index}")
        yield self.layers[index]


@contextmanager
def _replaced(layers: nn.ModuleList, forwards: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    """Let every layer answer with a function of ours, and restore what it had before (hooks of other libraries included)."""
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.forward = own


def as_stream(model: PreTrainedModel | DecoderStream) -> DecoderStream:
    """The model itself when it already streams, else a stream over the loaded model.

    Raises:
        InputError: it is neither, but a folder's name perhaps.
    """
    if isinstance(model, PreTrainedModel):
        return MemoryStream(model)
    if not hasattr(model, "run_layer"):
        raise InputError(f"model must be a loaded model or a stream over one, got {type(model).__name__}: load it with load_model")
    return model
