"""Final hidden states of a text, made one decoder layer at a time: what every figure of quality is computed from.

The logits of a whole text would be vocabulary / hidden times as large, so only the last layer's output is kept; `logit_chunks` puts it
through the model's own norm and head a few hundred tokens at a time.

Shapes: N windows, L tokens a window, B windows a batch, W windows and P positions of a piece, d hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from moesvd_core.architectures.streaming import CHUNK_ELEMENTS, DecoderStream, LayerCall, as_stream, require_known
from moesvd_core.errors import InputError, StatisticsError, require_whole
from moesvd_core.progress import Progress, Report, silent
from moesvd_core.tensor_files import load_tensors, save_tensors

BATCH_TOKENS = 4096
"""Tokens that go through a layer at once unless the caller says otherwise: enough to keep a GPU busy, little beside the weights."""
CACHED_ELEMENTS, CACHED_TOKENS = 2**21, 128
"""Logits held at once on a processor, where a piece that stays in its caches takes half the time, and tokens that a piece has at least."""


def context_limit(config: PretrainedConfig) -> int | None:
    """Most tokens that the model was made for; None when its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class FinalHidden:
    """One model's last hidden states over a fixed text; kept to compare several models with the same original.

    Attributes:
        stream: the model, for its norm and head.
        window_NL: token ids, int64 on the host.
        hidden_NLd: output of the last decoder layer, on the host.
    """

    stream: DecoderStream
    window_NL: torch.Tensor
    hidden_NLd: torch.Tensor


def final_hidden(
    model: PreTrainedModel | DecoderStream,
    window_NL: torch.Tensor,
    *,
    batch: int | None = None,
    report: Report = silent,
    keep: Path | None = None,
) -> FinalHidden:
    """Run every window through the decoder, layer by layer; each layer's weights are read once.

    Args:
        model: a loaded model or a stream over model files.
        window_NL: token ids, int64.
        batch: windows that go through a layer at once; None: as many as make 4,096 tokens.
        report: called after every layer with stage "evaluate".
        keep: file for the hidden states after each layer; a call that was interrupted goes on from it, with the same result. It must
            be named after the model: nothing but the windows is compared.

    Raises:
        InputError: no windows, token ids that the model does not know, or a batch that is no whole number or below 1.
    """
    if window_NL.ndim != 2 or window_NL.numel() == 0:
        raise InputError(f"windows must be a non-empty table [windows, tokens], got {tuple(window_NL.shape)}: use a longer text")
    if batch is not None:
        require_whole("batch", batch, 1, "windows")
    stream = as_stream(model)
    require_known(stream.model, window_NL)
    size = batch or max(1, BATCH_TOKENS // window_NL.shape[1])
    rows = [slice(start, start + size) for start in range(0, len(window_NL), size)]
    with torch.no_grad():
        total = len(stream.layers)
        start, hidden_NLd = _kept(keep, window_NL) or (0, _embedded(stream, window_NL, rows))
        # Attention masks are as large as the square of the length: those of a single batch are held, those of many made again.
        only = _calls(stream, window_NL) if len(rows) == 1 else None
        for index in range(start, total):
            with stream.layer(index):
                for part in rows:
                    entering_BLd = hidden_NLd[part].to(stream.device)
                    hidden_NLd[part] = stream.run_layer(index, entering_BLd, (only or _calls(stream, window_NL[part]))[index]).cpu()
            if keep is not None:
                save_tensors(keep, {"hidden": hidden_NLd, "windows": window_NL}, {"layers": index + 1})
            report(Progress("evaluate", index + 1, total, f"layer {index}"))
    return FinalHidden(stream, window_NL, hidden_NLd)


def _embedded(stream: DecoderStream, window_NL: torch.Tensor, rows: Sequence[slice]) -> torch.Tensor:
    """Hidden states that enter the first layer, on the host."""
    return torch.cat([stream.embed({"input_ids": window_NL[part]})[0].cpu() for part in rows])


def _calls(stream: DecoderStream, window_BL: torch.Tensor) -> list[LayerCall]:
    """What every layer is called with beside the hidden states."""
    return stream.embed({"input_ids": window_BL})[1]


def _kept(keep: Path | None, window_NL: torch.Tensor) -> tuple[int, torch.Tensor] | None:
    """Layers done before, and the hidden states after them; None when there are none for these windows."""
    if keep is None or not keep.exists():
        return None
    try:
        tensors, facts = load_tensors(keep)
    except StatisticsError:
        return None  # damaged: it only saves time
    return (facts["layers"], tensors["hidden"]) if torch.equal(tensors["windows"], window_NL) else None


def piece_tokens(final: FinalHidden) -> int:
    """Tokens whose logits are held at once, as suits a model's vocabulary and where it is."""
    vocabulary = final.stream.config.get_text_config().vocab_size
    tokens: int = max(1, CHUNK_ELEMENTS // vocabulary)
    if final.stream.device.type == "cpu":
        tokens = min(tokens, max(CACHED_TOKENS, CACHED_ELEMENTS // vocabulary))
    return tokens


def logit_chunks(final: FinalHidden, tokens: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Float32 logits of the whole text in pieces of at most so many tokens, in order.

    Yields:
        the windows and the positions that the piece covers (slices of [N, L]), and its logits [W, P, V].
    """
    count, length = final.window_NL.shape
    rows, step = max(1, tokens // length), min(tokens, length)
    for row in range(0, count, rows):
        windows = slice(row, min(row + rows, count))
        for start in range(0, length, step):
            positions = slice(start, min(start + step, length))
            hidden_WPd = final.hidden_NLd[windows, positions].to(final.stream.device)
            with torch.no_grad():
                logits = final.stream.head(hidden_WPd, {"input_ids": final.window_NL[windows, positions]}).float()
            yield windows, positions, logits
