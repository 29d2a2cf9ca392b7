"""How fast models are, and how much they compute and hold, measured so that a ratio of two figures means something.

Models take turns in every repetition, in alternating order, so that a machine that slows down slows all of them; figures are medians with
their spread. Operations are counted from the kernels that a model runs, not from its parameters; what factored experts compute for nothing
on a CPU, because it takes less time than to leave it out, is not among them.

Shapes: B prompts, T tokens of each.
"""

import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel

from moesvd_core.architectures.find import expert_layers
from moesvd_core.devices import finish_all, on_card
from moesvd_core.errors import InputError, require_seed, require_whole
from moesvd_core.evaluation.hidden import context_limit
from moesvd_core.kernels import has_grouped_product
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
        prefill, decode: tokens a second of the prompts, and of the tokens after them.
        experts_prefill, experts_decode: the same, counting only the time within the layers' experts: what compression is about. On GPUs
            that of the experts' calls alone, one after the other, called or played back as a graph, whichever is faster for the model.
        weight_bytes: parameters and buffers.
        peak_bytes: the most that was held at once, weights included, while answering (accelerator: the allocator's figure; host: all
            tensors that lived at once).
        flops_per_token: floating-point operations of the prompt (2 a multiply-add), by token.
    """

    prefill: Rate
    decode: Rate
    experts_prefill: Rate
    experts_decode: Rate
    weight_bytes: int
    peak_bytes: int
    flops_per_token: float


@dataclass(frozen=True)
class SpeedTest:
    """What is timed: `batch` random prompts of `prompt_tokens` each, then `new_tokens` one by one, `repeats` times each model."""

    prompt_tokens: int = 256
    new_tokens: int = 32
    repeats: int = 5
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "repeats", "batch"):
            require_whole(name, getattr(self, name), 1)
        require_seed(self.seed)

    def require_room(self, config: PretrainedConfig, name: str) -> None:
        """Refuse what is longer than a model was made for.

        Raises:
            InputError: it is; the message calls the model by its name.
        """
        limit = context_limit(config)
        if limit is not None and self.prompt_tokens + self.new_tokens > limit:
            raise InputError(f"prompt_tokens + new_tokens must be at most {limit} for {name}, got {self.prompt_tokens} + {self.new_tokens}")


def measure_speed(models: Mapping[str, PreTrainedModel], test: SpeedTest | None = None, *, report: Report = silent) -> dict[str, Speed]:
    """Time every model on the same prompt, interleaved; the first pass of each warms it up and counts operations and memory.

    Raises:
        InputError: no models, or a prompt that does not fit the models' positions.
    """
    test = test or SpeedTest()
    if not models:
        raise InputError("at least one model must be given to measure, got none")
    for name, model in models.items():
        test.require_room(model.config, name)
    prompts = {name: _prompt(model, test) for name, model in models.items()}
    held = {name: (_flops(model, prompts[name]), _peak_bytes(model, prompts[name], test)) for name, model in models.items()}
    timings: dict[str, list[tuple[float, ...]]] = {name: [] for name in models}
    played = {name: _ExpertsPlayed(model, prompts[name], test.new_tokens) for name, model in models.items() if on_card(model.device)}
    for repeat in range(test.repeats):
        for name in list(models)[:: 1 if repeat % 2 == 0 else -1]:
            timings[name].append(_timed(models[name], prompts[name], test.new_tokens, played.get(name)))
        report(Progress("speed", repeat + 1, test.repeats))
    result = {}
    for name, model in models.items():
        flops, peak = held[name]
        prefill, decode, experts_prefill, experts_decode = (_rate(values) for values in zip(*timings[name], strict=True))
        per_token = flops / prompts[name].numel()
        result[name] = Speed(prefill, decode, experts_prefill, experts_decode, weight_bytes(model), peak, per_token)
    return result


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones once, and of what was packed instead of them."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "meta"]
    packed: int = sum(getattr(module, "packed_bytes", 0) for module in model.modules())
    return packed + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _prompt(model: PreTrainedModel, test: SpeedTest) -> torch.Tensor:
    noise = torch.Generator().manual_seed(test.seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (test.batch, test.prompt_tokens), generator=noise).to(model.device)


def _timed(
    model: PreTrainedModel, prompt_BT: torch.Tensor, new_tokens: int, played: "_ExpertsPlayed | None"
) -> tuple[float, ...]:
    """Tokens a second of prompts and of decoding, of the whole model and of its experts alone."""
    if played is None:
        with _ExpertsClock(model) as clock:
            seconds = _answer(model, prompt_BT, new_tokens, between=clock.lap)
            clock.lap()
        laps = clock.laps
    else:
        seconds = _answer(model, prompt_BT, new_tokens)
        laps = played.laps()
    tokens = prompt_BT.numel(), prompt_BT.shape[0] * new_tokens
    return tuple(count / each for taken in (seconds, laps) for count, each in zip(tokens, taken, strict=True))


@torch.no_grad()
def _answer(
    model: PreTrainedModel, prompt_BT: torch.Tensor, new_tokens: int, between: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """Seconds for the prompts and for decoding."""
    finish_all(model.device)
    start = time.perf_counter()
    output = model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
    token_B1 = output.logits[:, -1:].argmax(-1)
    finish_all(model.device)
    middle = time.perf_counter()
    between()
    for _ in range(new_tokens):
        output = model(input_ids=token_B1, past_key_values=output.past_key_values, use_cache=True)
        token_B1 = output.logits[:, -1:].argmax(-1)
    finish_all(model.device)
    return middle - start, time.perf_counter() - middle


class _ExpertsClock:
    """Adds up the seconds within the experts of all layers by the host's clock, lap by lap.

    Attributes:
        laps: seconds of each lap so far.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.laps: list[float] = []
        self._modules = [model.get_submodule(layer.name) for layer in expert_layers(model)]
        self._marks: list[float] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "_ExpertsClock":
        for module in self._modules:
            self._handles += [module.register_forward_pre_hook(self._mark), module.register_forward_hook(self._mark)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def lap(self) -> None:
        """Close a lap. Everything before it must have been waited for."""
        self.laps.append(sum(end - begin for begin, end in zip(self._marks[::2], self._marks[1::2], strict=True)))
        self._marks = []

    def _mark(self, *_: object) -> None:
        self._marks.append(time.perf_counter())


class _ExpertsPlayed:
    """The calls that a GPU's experts get while a model answers, to be made again by themselves: in between, the host's launches of all
    else would be timed. What can be recorded as a graph is also played back as one, since launches take longer than small experts do.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, prompt_BT: torch.Tensor, new_tokens: int) -> None:
        calls = list[partial[torch.Tensor]]()
        modules = [model.get_submodule(layer.name) for layer in expert_layers(model)]
        handles = [module.register_forward_pre_hook(partial(_note, calls), with_kwargs=True) for module in modules]
        _answer(model, prompt_BT, new_tokens)
        for handle in handles:
            handle.remove()
        laps = calls[: len(modules)], calls[len(modules) :]
        self._calls = calls  # whose tensors graphs read
        self._devices = {parameter.device for module in modules for parameter in module.parameters() if parameter.is_cuda}
        recordable = len(self._devices) == 1 and _recordable(model)  # a graph does not go from one GPU to another
        with torch.cuda.device(next(iter(self._devices), None)):  # whose streams work and record
            self._plays = [self._faster(lap, recordable) for lap in laps]

    @torch.no_grad()
    def laps(self) -> list[float]:
        """Seconds of the prompts' calls, and of those of decoding."""
        return [self._seconds(play) for play in self._plays]

    def _faster(self, calls: "Sequence[partial[torch.Tensor]]", recordable: bool) -> Callable[[], None]:
        plays: list[Callable[[], None]] = [partial(_in_sequence, calls)]
        if recordable and (recorded := _recorded(calls)) is not None:
            plays.append(recorded)
        for play in plays:
            play()
        return min(plays, key=lambda play: min(self._seconds(play) for _ in range(3)))

    def _seconds(self, play: Callable[[], None]) -> float:
        """By events in the GPU's own stream; where there are several GPUs, by the host's clock."""
        for device in self._devices:
            torch.cuda.synchronize(device)
        if len(self._devices) != 1:
            start = time.perf_counter()
            play()
            for device in self._devices:
                torch.cuda.synchronize(device)
            return time.perf_counter() - start
        with torch.cuda.device(next(iter(self._devices))):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            play()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def _note(calls: "list[partial[torch.Tensor]]", module: torch.nn.Module, args: Any, kwargs: Any) -> None:
    calls.append(partial(module.forward, *args, **kwargs))


def _in_sequence(calls: "Sequence[partial[torch.Tensor]]") -> None:
    for call in calls:
        call()


def _recordable(model: PreTrainedModel) -> bool:
    """Whether the experts' calls wait for nothing, as a graph cannot: a loop over the experts that were asked does, and torch's grouped
    products of other numbers than bfloat16, or on GPUs that they have no kernels for, are one."""
    implementation = getattr(model.config.get_text_config(), "_experts_implementation", None)
    return implementation == "batched_mm" or (implementation != "eager" and has_grouped_product(model.dtype, model.device))


def _recorded(calls: "Sequence[partial[torch.Tensor]]") -> Callable[[], None] | None:
    """What plays the calls back; None where something in them cannot be recorded, or somebody else's work got in between."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is made at the first call must not be recorded
        _in_sequence(calls)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()):  # to come back to: a recording that fails does not
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                _in_sequence(calls)
        except RuntimeError:
            return None
    return graph.replay


def _rate(values: tuple[float, ...]) -> Rate:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Rate(quartiles[1], quartiles[0], quartiles[2])


def _grouped_flops(x_Sa: torch.Tensor, weight_Gab: torch.Tensor, offs: torch.Tensor | None = None, *_: Any, **__: Any) -> int:
    """Rows times one of several matrices each; those behind the last group's, which only GPUs are given, are not computed."""
    rows = len(x_Sa) if offs is None else int(offs[-1])
    return 2 * rows * x_Sa.shape[1] * weight_Gab.shape[-1]


_grouped_flops._get_raw = True  # type: ignore[attr-defined] # is given tensors, of which others see the shapes


def _packed_flops(input_shape: torch.Size, *others: Any, **_: Any) -> int:
    """Rows [S, a] times a matrix [b, a], which may come behind what is added to the product."""
    weight_shape = [shape for shape in others if isinstance(shape, torch.Size)][-1]
    return 2 * input_shape[0] * input_shape[1] * weight_shape[0]


def _summed_flops(rows_shape: torch.Size, chosen_shape: torch.Size, *_: Any, **__: Any) -> int:
    """Sums of weighted rows: so many chosen ones of [R, b]."""
    return 2 * chosen_shape.numel() * rows_shape[-1]


def _attention_flops(query_shape: torch.Size, key_shape: torch.Size, value_shape: torch.Size, *_: Any, **__: Any) -> int:
    """Scores and mix of [B, heads, T, a] queries with [B, heads, S, a] keys and [B, heads, S, b] values."""
    batch, heads, queries, width = query_shape
    return 2 * batch * heads * queries * key_shape[2] * (width + value_shape[3])


def _flops(model: PreTrainedModel, prompt_BT: torch.Tensor) -> int:
    """Floating-point operations of one pass over the prompts; of packed experts with the rows that fill up their products."""
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.aten._grouped_mm: _grouped_flops,
        torch.ops.transformers.grouped_mm_fallback: _grouped_flops,
        torch.ops.mkldnn._linear_pointwise: _packed_flops,
        torch.ops.aten._embedding_bag_forward_only: _summed_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    }
    packed = any(getattr(module, "packed", ()) for module in model.modules())
    with _frozen(model), torch.set_grad_enabled(not packed), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(input_ids=prompt_BT, use_cache=False, logits_to_keep=1)
    return int(counter.get_total_flops())


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Let no parameter ask for a gradient: where gradients may be recorded experts compute what they are asked and no more, and with none
    to record nothing is kept for them."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _peak_bytes(model: PreTrainedModel, prompt_BT: torch.Tensor, test: SpeedTest) -> int:
    """Most bytes held at once while answering, weights included, once a CPU's first answer has arranged what there is to arrange."""
    if on_card(model.device):
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        _answer(model, prompt_BT, test.new_tokens)
        return weight_bytes(model) + torch.cuda.max_memory_allocated(model.device) - before
    _answer(model, prompt_BT, 1)
    live = _LiveBytes()
    with live:
        _answer(model, prompt_BT, test.new_tokens)
    return weight_bytes(model) + live.peak


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as each lives."""

    only_watches = True  # kernels of our own go on

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _stored(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _stored(leaf):
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


def _stored(leaf: Any) -> bool:
    """Whether it is a tensor with a storage, which packed matrices have not."""
    return isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn
