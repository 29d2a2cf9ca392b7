"""How fast models are, and how much they compute and hold, measured so that a ratio of two figures means something.

Models take turns in every repetition, in alternating order, so that a machine that slows down slows all of them; figures are medians with
their spread. Operations are counted from the kernels that really ran, padding included, not from the parameter count.

Shapes: T prompt tokens.
"""

import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from moesvd_core.errors import InputError
from moesvd_core.evaluation.hidden import context_limit
from moesvd_core.progress import Progress, Report, silent


@dataclass(frozen=True)
class Rate:
    """Tokens a second over the repetitions: median, and the quartiles as its spread."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """What one model takes.

    Attributes:
        prefill, decode: tokens a second of the prompt, and of the tokens after it.
        weight_bytes: parameters and buffers.
        peak_bytes: the most that was held at once, weights included, while answering (accelerator: the allocator's figure; host: all
            tensors that lived at once).
        flops_per_token: floating-point operations of the prompt (2 a multiply-add), by token.
    """

    prefill: Rate
    decode: Rate
    weight_bytes: int
    peak_bytes: int
    flops_per_token: float


@dataclass(frozen=True)
class SpeedTest:
    """What is timed: a random prompt of `prompt_tokens`, then `new_tokens` one by one, `repeats` times each model."""

    prompt_tokens: int = 256
    new_tokens: int = 32
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("new_tokens", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")


def measure_speed(models: Mapping[str, PreTrainedModel], test: SpeedTest | None = None, *, report: Report = silent) -> dict[str, Speed]:
    """Time every model on the same prompt, interleaved; the first pass of each warms it up and counts operations and memory.

    Raises:
        InputError: no models, or a prompt that does not fit the models' positions.
    """
    test = test or SpeedTest()
    if not models:
        raise InputError("at least one model must be given to measure, got none")
    for name, model in models.items():
        limit = context_limit(model.config)
        if limit is not None and test.prompt_tokens + test.new_tokens > limit:
            raise InputError(f"prompt_tokens + new_tokens must be at most {limit} for {name}, got {test.prompt_tokens} + {test.new_tokens}")
    prompts = {name: _prompt(model, test) for name, model in models.items()}
    held = {name: (_flops(model, prompts[name]), _peak_bytes(model, prompts[name], test)) for name, model in models.items()}
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for repeat in range(test.repeats):
        for name in list(models)[:: 1 if repeat % 2 == 0 else -1]:
            timings[name].append(_time(models[name], prompts[name], test.new_tokens))
        report(Progress("speed", repeat + 1, test.repeats))
    result = {}
    for name, model in models.items():
        prefill, decode = zip(*timings[name], strict=True)
        flops, peak = held[name]
        result[name] = Speed(_rate(prefill), _rate(decode), weight_bytes(model), peak, flops / test.prompt_tokens)
    return result


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; tied ones once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _prompt(model: PreTrainedModel, test: SpeedTest) -> torch.Tensor:
    noise = torch.Generator().manual_seed(test.seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (1, test.prompt_tokens), generator=noise).to(model.device)


@torch.no_grad()
def _time(model: PreTrainedModel, prompt_1T: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Tokens a second of prompt and of decoding."""
    _synchronise(model)
    start = time.perf_counter()
    output = model(input_ids=prompt_1T, use_cache=True, logits_to_keep=1)
    token_11 = output.logits[:, -1:].argmax(-1)
    _synchronise(model)
    middle = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=token_11, past_key_values=output.past_key_values, use_cache=True)
        token_11 = output.logits[:, -1:].argmax(-1)
    _synchronise(model)
    return prompt_1T.shape[1] / (middle - start), new_tokens / (time.perf_counter() - middle)


def _synchronise(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _rate(values: tuple[float, ...]) -> Rate:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Rate(quartiles[1], quartiles[0], quartiles[2])


def _grouped_flops(input_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    """Rows [S, a] times one of several [G, a, b] each."""
    return 2 * input_shape[0] * input_shape[1] * weight_shape[-1]


def _attention_flops(query_shape: torch.Size, key_shape: torch.Size, value_shape: torch.Size, *_: Any, **__: Any) -> int:
    """Scores and mix of [B, heads, T, a] queries with [B, heads, S, a] keys and [B, heads, S, b] values."""
    batch, heads, queries, width = query_shape
    return 2 * batch * heads * queries * key_shape[2] * (width + value_shape[3])


def _flops(model: PreTrainedModel, prompt_1T: torch.Tensor) -> int:
    """Floating-point operations of one pass over the prompt."""
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.aten._grouped_mm: _grouped_flops,
        torch.ops.transformers.grouped_mm_fallback: _grouped_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(input_ids=prompt_1T, use_cache=False, logits_to_keep=1)
    return int(counter.get_total_flops())


def _peak_bytes(model: PreTrainedModel, prompt_1T: torch.Tensor, test: SpeedTest) -> int:
    """Most bytes held at once while answering, weights included."""
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        _time(model, prompt_1T, test.new_tokens)
        return weight_bytes(model) + torch.cuda.max_memory_allocated(model.device) - before
    live = _LiveBytes()
    with live:
        _time(model, prompt_1T, test.new_tokens)
    return weight_bytes(model) + live.peak


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as each lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage(), inputs)
        return result

    def _add(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = id(storage)
        if key in inputs or key in self._known:
            return  # a view of, or a write into, what is there already
        size = storage.nbytes()
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
