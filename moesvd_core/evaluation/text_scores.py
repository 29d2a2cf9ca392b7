"""What each token of one given text cost a model, and what compression changed: the same figures as perplexity, not summed."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesvd_core.architectures.streaming import DecoderStream, as_stream
from moesvd_core.calibration.text import window_length
from moesvd_core.errors import EvaluationError, InputError
from moesvd_core.evaluation.hidden import context_limit, final_hidden
from moesvd_core.evaluation.perplexity import next_tokens


@dataclass(frozen=True)
class TokenScore:
    """One token of the text.

    Attributes:
        text: the token as it reads.
        logp: log-probability that the model gave it, in nats.
        original_logp: the same of the original model.
    """

    text: str
    logp: float
    original_logp: float

    @property
    def change(self) -> float:
        """Nats gained (positive) or lost (negative) by compression."""
        return self.logp - self.original_logp


def token_scores(
    model: PreTrainedModel | DecoderStream, original: PreTrainedModel | DecoderStream, tokenizer: PreTrainedTokenizerBase, text: str
) -> list[TokenScore]:
    """Log-probability of every token after the first, by a model and by its original.

    Raises:
        InputError: fewer than two tokens, or more than the model has positions.
        EvaluationError: a log-probability is not finite.
    """
    stream = as_stream(model)
    ids = tokenizer(text, verbose=False)["input_ids"]
    limit = window_length(None, context_limit(stream.config))
    if not 2 <= len(ids) <= limit:
        raise InputError(f"text must have 2 to {limit} tokens, got {len(ids)}: write more, or give a shorter part of it")
    window_1L = torch.tensor([ids], dtype=torch.int64)
    columns = [_log_probabilities(source, window_1L) for source in (stream, original)]
    pieces = [tokenizer.decode([token]) for token in ids[1:]]
    return [TokenScore(piece, mine, expected) for piece, mine, expected in zip(pieces, *columns, strict=True)]


def _log_probabilities(model: PreTrainedModel | DecoderStream, window_1L: torch.Tensor) -> list[float]:
    parts = [piece.logp.gather(-1, piece.target.unsqueeze(-1)).flatten().cpu() for piece in next_tokens(final_hidden(model, window_1L))]
    logp_P = torch.cat(parts)
    if not logp_P.isfinite().all():
        position = int((~logp_P.isfinite()).nonzero()[0]) + 1
        raise EvaluationError(f"the log-probability of token {position} is not finite: check the weights for NaN or Inf")
    return [float(value) for value in logp_P]
