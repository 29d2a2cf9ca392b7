"""Answers token by token, from one model or from several side by side, so that a person can watch where compression changes the text.

Sampling adds seeded Gumbel noise to the log-probabilities and takes the largest. Two models with the same seed meet the same noise at the
same step, so their answers part only where their distributions do, not because a random generator ran differently. Side by side, the
models take turns, each has the machine to itself during its turn, and only its own time is counted.

Shapes: V vocabulary.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesvd_core.architectures.streaming import require_known
from moesvd_core.errors import EvaluationError, InputError, is_number, require_flag, require_seed, require_whole
from moesvd_core.evaluation.hidden import context_limit

MAX_NEW_TOKENS = 4096
Ending = Literal["", "end", "length", "context", "stopped"]


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen.

    Attributes:
        new_tokens: longest answer, in [1, 4096]; it ends earlier where the model's context does.
        temperature: 0 takes the most probable token each time; else in (0, 5].
        top_p: sample from the smallest set of tokens that holds this share of the probability, in (0, 1].
        seed: of the noise; >= 0.
        chat: put the prompt into the tokenizer's chat template.
    """

    new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        if is_number(self.new_tokens) and not 1 <= self.new_tokens <= MAX_NEW_TOKENS:
            raise InputError(f"new_tokens must be in [1, {MAX_NEW_TOKENS}], got {self.new_tokens}")
        require_whole("new_tokens", self.new_tokens, 1)
        if not (is_number(self.temperature) and 0 <= self.temperature <= 5):
            raise InputError(f"temperature must be in [0, 5], got {self.temperature!r}: 0 always takes the most probable token")
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InputError(f"top_p must be in (0, 1], got {self.top_p!r}: 1 keeps every token")
        require_seed(self.seed)
        require_flag("chat", self.chat)


@dataclass(frozen=True)
class Answer:
    """An answer as far as it has come.

    Attributes:
        text: decoded so far, without half a character at its end.
        tokens: ids so far, without the token that ended the answer.
        first_token_seconds: from the prompt to the first token, or to the one that ended the answer before there was any.
        seconds: this model's own time up to the last token in `tokens`; where there is none, as `first_token_seconds`.
        finished: "end" when the model stopped, "length" at the longest answer, "context" at the model's limit before it, "stopped"
            where nobody waits for the rest, "" while it goes on.
    """

    text: str
    tokens: tuple[int, ...]
    first_token_seconds: float
    seconds: float
    finished: Ending

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding rate after the first token; None before a second one."""
        return (len(self.tokens) - 1) / (self.seconds - self.first_token_seconds) if len(self.tokens) > 1 else None


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling | None = None) -> Iterator[Answer]:
    """The answer after every token; the last one has `finished` set. Stop iterating to stop the model.

    Raises:
        InputError: the prompt is empty or too long, or there is no chat template.
        EvaluationError: the model's logits are not finite.
    """
    sampling = sampling or Sampling()
    ids_1L = encode_prompt(model, tokenizer, prompt, sampling)
    return _answer(model, tokenizer, ids_1L, sampling)


def side_by_side(
    models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling | None = None
) -> Iterator[tuple[Answer, ...]]:
    """Answers of several models to one prompt, one token each a turn; a finished answer stays while the others go on.

    Raises:
        InputError, EvaluationError: as `answer`.
    """
    streams = [answer(model, tokenizer, prompt, sampling) for model in models]
    return _take_turns(streams)


def warm_up(
    models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling | None = None
) -> None:
    """Let every model read the prompt and write two tokens, unseen: kernels and caches are made ready on nobody's time.

    Raises:
        InputError, EvaluationError: as `answer`.
    """
    for model in models:
        for _ in answer(model, tokenizer, prompt, replace(sampling or Sampling(), new_tokens=2)):
            pass


def first_divergence(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token at which two answers part (the end of one counts); None when they are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def encode_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling) -> torch.Tensor:
    """Token ids [1, L] of a prompt that leaves room for the answer.

    Raises:
        InputError: nothing to answer, no chat template, too long for the model, or a tokenizer of another model's.
    """
    if not prompt.strip():
        raise InputError("prompt must not be empty: write at least one word")
    if sampling.chat and not tokenizer.chat_template:
        raise InputError("this tokenizer has no chat template: ask without `chat`")
    if sampling.chat:
        prompt = str(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True))
    ids = tokenizer(prompt, add_special_tokens=not sampling.chat, verbose=False)["input_ids"]
    limit = context_limit(model.config)
    if limit is not None and len(ids) >= limit:
        raise InputError(f"prompt must have fewer than {limit} tokens, the model's limit, for an answer to fit; got {len(ids)}: shorten it")
    ids_1L = torch.tensor([ids], dtype=torch.int64)
    require_known(model, ids_1L)
    return ids_1L.to(model.device)


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids_1L: torch.Tensor, sampling: Sampling) -> Iterator[Answer]:
    ends = _end_tokens(model, tokenizer)
    limit = context_limit(model.config)
    longest = sampling.new_tokens if limit is None else min(sampling.new_tokens, limit - ids_1L.shape[1])
    noise = torch.Generator().manual_seed(sampling.seed)
    tokens: list[int] = []
    seconds = first = 0.0
    cache = None
    # positions are given, because some caches (minimax) cannot tell their length
    position_1L = torch.arange(ids_1L.shape[1], device=ids_1L.device).unsqueeze(0)
    finished: Ending = ""
    full: Ending = "length" if longest == sampling.new_tokens else "context"
    while not finished:
        start = time.perf_counter()
        with torch.inference_mode():
            output = model(input_ids=ids_1L, position_ids=position_1L, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = _choose(output.logits[0, -1].float().cpu(), sampling, noise)
        took = time.perf_counter() - start
        first = first or took
        if token not in ends:
            tokens.append(token)
            seconds += took  # the step that ends an answer brings no token: with its time a rate would be too low
        finished = "end" if token in ends else full if len(tokens) == longest else ""
        ids_1L, position_1L = ids_1L.new_tensor([[token]]), position_1L[:, -1:] + 1
        text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        yield Answer(text if finished else text.rstrip("�"), tuple(tokens), first, seconds or first, finished)


def _choose(logit_V: torch.Tensor, sampling: Sampling, noise: torch.Generator) -> int:
    """The next token: the largest logit, or the largest after tempering, cutting the tail and adding Gumbel noise."""
    top = logit_V.max()
    if not top.isfinite():
        raise EvaluationError("the model's logits are not finite: check the weights for NaN or Inf, or use bfloat16 instead of float16")
    if sampling.temperature == 0:
        return int(logit_V.argmax())
    # The largest is 0 at every temperature and the others tend to -Inf: divided as they come, a small one would make several of them Inf.
    logp_V = ((logit_V - top).double() / sampling.temperature).log_softmax(-1)
    sorted_V, order_V = logp_V.exp().sort(descending=True)
    beyond_V = sorted_V.cumsum(-1) - sorted_V >= sampling.top_p
    logp_V[order_V[beyond_V]] = -torch.inf
    uniform_V = torch.rand(logp_V.shape, generator=noise, dtype=torch.float64)
    gumbel_V = -(-uniform_V.clamp_min(torch.finfo(torch.float64).tiny).log()).log()
    return int((logp_V + gumbel_V).argmax())


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: the generation settings' and the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = set(configured) if isinstance(configured, list) else {configured}
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


def _take_turns(streams: list[Iterator[Answer]]) -> Iterator[tuple[Answer, ...]]:
    current = [next(stream) for stream in streams]
    yield tuple(current)
    while not all(reached.finished for reached in current):
        current = [reached if reached.finished else next(stream) for reached, stream in zip(current, streams, strict=True)]
        yield tuple(current)
