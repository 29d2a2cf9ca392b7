"""What the commands of `moesvd` that look at models, with no run, do once their words are understood.

Torch and transformers are imported only by those that need them.
"""

from argparse import Namespace
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesvd_core.console import LABELS, ProgressBars, plain, show_facts, show_json, show_rows
from moesvd_core.errors import InputError, require_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moesvd_core.architectures.streaming import LayerStream
    from moesvd_core.evaluation.speed import Rate
    from moesvd_core.evaluation.zero_shot import TaskScore


def inspect(given: Namespace) -> None:
    """`moesvd inspect`: what a model is."""
    from moesvd_core.architectures.inspect import inspect as look

    facts = look(given.model, trust_remote_code=given.allow_remote_code).as_dict()
    if given.json:
        show_json(facts)
        return
    told = {name: value for name, value in facts.items() if name not in ("warnings", "expert_layers")}
    show_facts(given.model, told, LABELS["factored"] if facts["factored"] else {})
    for warning in facts["warnings"]:
        print(plain(f"- {warning}"))


def evaluate(given: Namespace) -> None:
    """`moesvd evaluate`: perplexity of any model and its distance to a reference, or accuracy on questions with given answers."""
    from moesvd_core.architectures.tokenizer import load_tokenizer
    from moesvd_core.evaluation.perplexity import evaluate as measure

    if given.zero_shot is not None:
        _ask(given)
        return
    stream = _stream(given.model, given)
    reference = None if given.reference is None else _stream(given.reference, given)
    tokenizer = load_tokenizer(stream.files.folder, allow_remote_code=given.allow_remote_code)
    with ProgressBars() as bars:
        evaluation = measure(
            stream, tokenizer, given.dataset, windows=given.windows, length=given.length, reference=reference, report=bars
        )
    facts = {"model": given.model, "reference": given.reference, "bytes": stream.files.bytes, **evaluation.as_dict()}
    if given.json:
        show_json(facts)
    else:
        show_facts(given.model, {name: value for name, value in facts.items() if value is not None})


def _ask(given: Namespace) -> None:
    """Accuracy of the model, and of the reference beside it, on every set of questions that the folder holds."""
    from moesvd_core.evaluation.zero_shot import require_harness, task_files, zero_shot

    data = Path(given.zero_shot)
    if given.limit is not None:  # refused before a model is loaded, as is what follows
        require_whole("limit", given.limit, 1, "questions")
    task_files(data)
    require_harness()
    names = [name for name in (given.reference, given.model) if name is not None]
    scores = {}
    for name in names:
        model, tokenizer = _loaded(name, given)
        scores[name] = zero_shot(model, tokenizer, data, limit=given.limit)
        del model  # both need not fit
    if given.json:
        show_json([{"model": name, "tasks": {task: vars(score) for task, score in scores[name].items()}} for name in names])
        return
    rows = [(task, scores[names[0]][task].rows, *(_accuracy(scores[name][task]) for name in names)) for task in scores[names[0]]]
    show_rows("accuracy, zero-shot (by length where the set has it), ± standard error", ["set", "questions", *names], rows)


def _accuracy(score: "TaskScore") -> str:
    spread = "" if score.stderr is None else f" ± {score.stderr:.1%}"
    normalised = "" if score.normalised is None else f" ({score.normalised:.1%})"
    return f"{score.accuracy:.1%}{spread}{normalised}"


def compare(given: Namespace) -> None:
    """`moesvd compare`: two models side by side: quality, size, speed, and what they answer."""
    from transformers.utils.logging import disable_progress_bar

    from moesvd_core.api import load_model
    from moesvd_core.checkpoint.apply import pack_where_possible
    from moesvd_core.evaluation.generation import Sampling, encode_prompt, side_by_side
    from moesvd_core.evaluation.hidden import context_limit
    from moesvd_core.evaluation.perplexity import evaluate as measure
    from moesvd_core.evaluation.speed import SpeedTest, measure_speed

    disable_progress_bar()  # loading takes seconds
    original, tokenizer = load_model(given.original)
    compressed, _ = load_model(given.compressed)
    pack_where_possible(compressed)
    if given.prompt is not None:
        encode_prompt(original, tokenizer, given.prompt, Sampling())  # refused before minutes of measuring
    with ProgressBars() as bars:
        text = {"windows": given.windows, "report": bars}
        before = measure(original, tokenizer, given.dataset, **text)
        after = measure(compressed, tokenizer, given.dataset, reference=original, **text)
        limit = context_limit(original.config) or 1024
        test = SpeedTest(prompt_tokens=min(256, limit // 2), new_tokens=min(32, limit // 4))
        speeds = measure_speed({"original": original, "compressed": compressed}, test, report=bars)
    turns = side_by_side([original, compressed], tokenizer, given.prompt) if given.prompt is not None else ()
    answers: tuple[Any, ...] = deque(turns, maxlen=1).pop() if given.prompt is not None else (None, None)
    rows = []
    for name, evaluation, speed, answer in zip((given.original, given.compressed), (before, after), speeds.values(), answers, strict=True):
        figures = {**_rates("prefill", speed.prefill), **_rates("decode", speed.decode)}
        size = {"weight_bytes": speed.weight_bytes, "peak_bytes": speed.peak_bytes, "flops_per_token": speed.flops_per_token}
        rows.append({"model": name, **evaluation.as_dict(), **size, **figures, "answer": None if answer is None else answer.text})
    if given.json:
        show_json(rows)
        return
    names = [name for name in rows[0] if name not in ("model", "answer") and not name.endswith("_quartiles")]
    table = [[LABELS["speed"].get(name, name), *(_with_spread(row, name) for row in rows)] for name in names]
    show_rows("compared on the same text and prompt", ["", *(str(row["model"]) for row in rows)], table)
    for row in rows if given.prompt is not None else []:
        print(plain(f"\n{row['model']}: {given.prompt}{row['answer']}"))


def _rates(phase: str, rate: "Rate") -> dict[str, Any]:
    return {f"{phase}_tokens_per_second": rate.median, f"{phase}_quartiles": [rate.low, rate.high]}


def _with_spread(row: Mapping[str, Any], name: str) -> Any:
    """A figure, and its quartiles where it has them."""
    quartiles = row.get(name.replace("_tokens_per_second", "_quartiles")) if name.endswith("_tokens_per_second") else None
    return row[name] if quartiles is None else f"{row[name]:,.1f} ({quartiles[0]:,.1f} to {quartiles[1]:,.1f})"


def push(given: Namespace) -> None:
    """`moesvd push`: an export to the hub; prints the address of the commit."""
    from huggingface_hub import get_token

    from moesvd_core.checkpoint.hub import push as publish

    token = get_token()
    if token is None:
        raise InputError("no access token of the hub is known: set HF_TOKEN, or log in by `hf auth login`")
    address = publish(Path(given.export), given.repository, token, private=not given.public)
    if given.json:
        show_json({"repository": given.repository, "address": address})
    else:
        print(address)


def benchmark(given: Namespace) -> None:
    """`moesvd benchmark`: prints the figures of the documentation again."""
    from moesvd_core.evaluation.benchmarks.command import run

    with ProgressBars() as bars:
        result = run(given, bars)
    print(result.json() if getattr(given, "json", False) else result.text(), end="")


def _stream(name: str, given: Namespace) -> "LayerStream":
    import torch

    from moesvd_core.architectures.files import ModelFiles, resolve_model
    from moesvd_core.architectures.streaming import LayerStream

    folder = resolve_model(name, allow_remote_code=given.allow_remote_code)
    files = ModelFiles.open(folder, allow_remote_code=given.allow_remote_code)
    dtype = None if given.dtype is None else getattr(torch, given.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LayerStream(files, dtype=dtype, device=device, allow_remote_code=given.allow_remote_code)


def _loaded(name: str, given: Namespace) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The whole model in memory, on the GPU where there is one."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from moesvd_core.api import load_model

    disable_progress_bar()
    dtype = "auto" if given.dtype is None else getattr(torch, given.dtype)
    return load_model(name, dtype=dtype, allow_remote_code=given.allow_remote_code)
