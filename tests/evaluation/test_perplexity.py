"""Perplexity and KL against the textbook formulas, for every family, streamed or loaded."""

import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moesvd_core.architectures.streaming import LayerStream, MemoryStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.errors import EvaluationError, InputError
from moesvd_core.evaluation import hidden
from moesvd_core.evaluation.generation import answer
from moesvd_core.evaluation.hidden import final_hidden, piece_tokens
from moesvd_core.evaluation.perplexity import compare, evaluate

torch.set_num_threads(1)


def windows(count: int = 5, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel, window_NL: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=window_NL, use_cache=False).logits.double()
    return result


def nll(model: PreTrainedModel, window_NL: torch.Tensor) -> torch.Tensor:
    logp = logits(model, window_NL)[:, :-1].log_softmax(-1)
    return -logp.gather(-1, window_NL[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("name", TINY)
def test_scores_every_token_of_every_window_of_every_family(name: str) -> None:
    model = TINY[name]().eval()
    expected = nll(model, windows())
    figures = compare(final_hidden(model, windows(), batch=2), None, "random")
    assert figures.nll == pytest.approx(expected.mean().item(), rel=1e-5)
    assert figures.perplexity == pytest.approx(expected.mean().exp().item(), rel=1e-5)
    assert (figures.windows, figures.length, figures.tokens) == (5, 12, 55)


def test_the_standard_error_is_over_windows() -> None:
    model = TINY["mixtral"]().eval()
    window_N = nll(model, windows()).mean(1)
    figures = compare(final_hidden(model, windows()), None, "random")
    assert figures.perplexity_stderr == pytest.approx((window_N.std() / 5**0.5 * window_N.mean().exp()).item(), rel=1e-5)
    assert compare(final_hidden(model, windows(1)), None, "random").perplexity_stderr is None


def other(model: PreTrainedModel) -> PreTrainedModel:
    """The same model a little off."""
    changed = TINY["mixtral"]().eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.3)
    return changed


def test_kl_and_agreement_follow_their_definitions() -> None:
    model = TINY["mixtral"]().eval()
    changed = other(model)
    p, q = (logits(each, windows())[:, :-1].log_softmax(-1) for each in (model, changed))
    kl = (p.exp() * (p - q)).sum(-1)
    figures = compare(final_hidden(changed, windows()), final_hidden(model, windows()), "random")
    assert figures.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert figures.kl_p95 == pytest.approx(kl.flatten().quantile(0.95).item(), rel=1e-4)
    assert figures.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    delta_N = (nll(changed, windows()) - nll(model, windows())).mean(1)
    assert figures.delta_nll == pytest.approx(delta_N.mean().item(), rel=1e-4)
    assert figures.delta_nll_stderr == pytest.approx((delta_N.std() / 5**0.5).item(), rel=1e-4)


def test_chunks_and_batches_do_not_change_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["mixtral"]().eval()
    whole = compare(final_hidden(other(model), windows()), final_hidden(model, windows(), batch=1), "random")
    monkeypatch.setattr(hidden, "CHUNK_ELEMENTS", 128 * 5)  # five tokens a piece
    pieces = compare(final_hidden(other(model), windows(), batch=3), final_hidden(model, windows(), batch=2), "random")
    whole_figures, figures = whole.as_dict(), pieces.as_dict()
    assert whole_figures.pop("dataset") == figures.pop("dataset")
    assert figures == pytest.approx(whole_figures, rel=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("mixtral", tmp_path / "model", fused=False)


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def text(folder: Path) -> str:
    path = folder.parent / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 40, encoding="utf-8")
    return str(path)


def test_streamed_from_disk_equals_loaded(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    stream = LayerStream(folder)
    loaded = TINY["mixtral"]().eval()
    figures = evaluate(stream, tokenizer, text(folder), length=16, windows=4, reference=loaded)
    assert figures.kl_mean == pytest.approx(0, abs=1e-9)
    assert figures.top1_agreement == 1
    assert (figures.windows, figures.length, figures.tokens) == (4, 16, 60)


def test_takes_the_models_own_limit_when_no_length_is_given(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert evaluate(LayerStream(folder), tokenizer, text(folder), windows=1).length == 64


def test_names_the_bound_of_the_length(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"\[2, 64\].*got 65"):
        evaluate(LayerStream(folder), tokenizer, text(folder), length=65)


def test_a_window_that_is_not_finite_is_named() -> None:
    model = TINY["mixtral"]().eval()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(EvaluationError, match=r"not finite in window 0 \(5 of 5 windows\)"):
        compare(final_hidden(model, windows()), None, "random")


@dataclass
class OnCard:
    """A stream that says it is on a card, where pieces of the text are larger; its tensors stay on the host."""

    stream: MemoryStream

    @property
    def device(self) -> Any:
        return type("Card", (str,), {"type": "cuda"})("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@pytest.mark.parametrize("card", ["model", "reference"])
def test_a_model_on_a_card_is_compared_with_a_reference_on_the_host(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "CACHED_ELEMENTS", 128 * 16)
    monkeypatch.setattr(hidden, "CACHED_TOKENS", 16)
    model = TINY["mixtral"]().eval()
    finals = {"model": final_hidden(other(model), windows()), "reference": final_hidden(model, windows())}
    expected = compare(finals["model"], finals["reference"], "random")
    finals[card] = replace(finals[card], stream=OnCard(MemoryStream(model if card == "reference" else other(model))))
    assert piece_tokens(finals["model"]) != piece_tokens(finals["reference"])
    assert compare(finals["model"], finals["reference"], "random") == expected


def test_masks_of_one_batch_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as large as the square of the length; gpt_oss, which computes attention by itself, has two."""
    model = TINY["gpt_oss"]().eval()
    masks: list[weakref.ref[torch.Tensor]] = []
    most = 0
    embed, run_layer = MemoryStream.embed, MemoryStream.run_layer

    def noted(stream: MemoryStream, batch: Any) -> Any:
        entered, calls = embed(stream, batch)
        for _, named in calls:
            masks.extend(weakref.ref(value) for value in named.values() if isinstance(value, torch.Tensor) and value.ndim == 4)
        return entered, calls

    def counted(*given: Any) -> Any:
        nonlocal most
        most = max(most, len({id(mask()) for mask in masks if mask() is not None}))
        return run_layer(*given)

    expected = final_hidden(model, windows(), batch=5).hidden_NLd
    monkeypatch.setattr(MemoryStream, "embed", noted)
    monkeypatch.setattr(MemoryStream, "run_layer", counted)
    torch.testing.assert_close(final_hidden(model, windows(), batch=1).hidden_NLd, expected)
    assert 0 < most <= 2


def test_a_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    small, tokenizer = tiny_model("mixtral", vocab_size=64), tiny_tokenizer()
    message = r"ids must be below 64, the rows of the model's embedding, got \d+: use the tokenizer that belongs"
    with pytest.raises(InputError, match=message):
        evaluate(small, tokenizer, text(tmp_path / "model"), length=16)
    with pytest.raises(InputError, match=message):
        list(answer(small, tokenizer, "the quick brown fox"))
    with pytest.raises(InputError, match=message):
        calibrate(MemoryStream(small), tokenizer, Calibration(samples=2, length=16))


def test_experts_of_odd_sizes_are_computed_in_bfloat16() -> None:
    """Their rows are no multiple of 16 bytes, which torch's grouped product refuses."""
    model = tiny_model("qwen3_moe", hidden_size=36, moe_intermediate_size=20)
    exact = compare(final_hidden(model, windows()), None, "random").nll
    assert model.config._experts_implementation == "grouped_mm", "these rows are a multiple in float32"
    assert compare(final_hidden(model.bfloat16(), windows()), None, "random").nll == pytest.approx(exact, rel=0.02)
    statistics = calibrate(MemoryStream(model), tiny_tokenizer(), Calibration(samples=2, length=16))
    assert statistics.gradient == "backward"


def test_refuses_what_cannot_be_compared() -> None:
    model = TINY["mixtral"]().eval()
    with pytest.raises(InputError, match="same windows"):
        compare(final_hidden(model, windows()), final_hidden(model, windows(4)), "random")
    larger = tiny_model("mixtral", vocab_size=136)
    with pytest.raises(InputError, match="must share one vocabulary, got 128 and 136 tokens"):
        compare(final_hidden(model, windows()), final_hidden(larger, windows()), "random")
    with pytest.raises(InputError, match="non-empty"):
        final_hidden(model, torch.empty(0, 8, dtype=torch.int64))
    with pytest.raises(InputError, match="got 0"):
        final_hidden(model, windows(), batch=0)
