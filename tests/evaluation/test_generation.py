"""Answers against transformers' own generate, and what must hold when two models answer side by side."""

import re
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import TINY, save_tiny
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moesvd_core.errors import EvaluationError, InputError
from moesvd_core.evaluation import generation
from moesvd_core.evaluation.generation import Sampling, answer, first_divergence, side_by_side, warm_up

torch.set_num_threads(1)
PROMPT = "once upon a time"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tokenizer") / "model"
    return AutoTokenizer.from_pretrained(save_tiny("mixtral", folder, fused=True))


def endless(name: str) -> PreTrainedModel:
    """A tiny model that never ends by itself."""
    model = TINY[name]().eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", TINY)
def test_the_most_probable_tokens_are_those_of_generate(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = endless(name)
    ids_1L = tokenizer(PROMPT, return_tensors="pt").input_ids
    mask_1L = torch.ones_like(ids_1L)
    expected = model.generate(ids_1L, attention_mask=mask_1L, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2)
    *_, last = answer(model, tokenizer, PROMPT, Sampling(new_tokens=6))
    tokens = [token for token in expected[0, ids_1L.shape[1] :].tolist() if token != 2]
    assert list(last.tokens) == tokens
    assert last.finished == ("length" if len(tokens) == 6 else "end")


def test_a_seed_gives_the_same_answer_and_another_seed_another(tokenizer: PreTrainedTokenizerBase) -> None:
    model = endless("mixtral")
    answers = [list(answer(model, tokenizer, PROMPT, Sampling(new_tokens=12, temperature=1.5, seed=seed)))[-1].tokens for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_sampling_follows_the_tempered_and_cut_distribution(tokenizer: PreTrainedTokenizerBase) -> None:
    model = endless("mixtral")
    with torch.no_grad():
        logit_V = model(tokenizer(PROMPT, return_tensors="pt").input_ids).logits[0, -1]
    p_V, order_V = (logit_V / 0.7).softmax(-1).sort(descending=True)
    kept = int((p_V.cumsum(-1) < 0.5).sum()) + 1
    expected = dict(zip(order_V[:kept].tolist(), (p_V[:kept] / p_V[:kept].sum()).tolist(), strict=True))
    draws = [next(answer(model, tokenizer, PROMPT, Sampling(1, 0.7, 0.5, seed))).tokens[0] for seed in range(400)]
    assert set(draws) <= set(expected)
    for token, share in expected.items():
        assert draws.count(token) / 400 == pytest.approx(share, abs=4 * (share * (1 - share) / 400) ** 0.5)


def test_the_answer_ends_with_the_context(tokenizer: PreTrainedTokenizerBase) -> None:
    model = endless("mixtral")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
        model.lm_head.weight[5] = model.lm_head.weight[6] * 2  # never a tie at zero
    prompt = "w" * 60
    *_, last = answer(model, tokenizer, prompt, Sampling(new_tokens=100))
    assert len(last.tokens) == 64 - len(tokenizer(prompt).input_ids)
    assert last.finished == "context"
    *_, exact = answer(model, tokenizer, prompt, Sampling(new_tokens=len(last.tokens)))
    assert (exact.finished, exact.tokens) == ("length", last.tokens)


def test_side_by_side_equals_one_after_the_other(tokenizer: PreTrainedTokenizerBase) -> None:
    models = [endless("mixtral"), endless("qwen3_moe")]
    sampling = Sampling(new_tokens=8, temperature=1.0, seed=3)
    turns = list(side_by_side(models, tokenizer, PROMPT, sampling))
    alone = [list(answer(model, tokenizer, PROMPT, sampling))[-1] for model in models]
    assert [each.tokens for each in turns[-1]] == [each.tokens for each in alone]
    assert [len(turn[0].tokens) for turn in turns] == list(range(1, 9)), "one token a turn"


def test_equal_models_with_one_seed_never_part(tokenizer: PreTrainedTokenizerBase) -> None:
    model = endless("mixtral")
    *_, (left, right) = side_by_side([model, model], tokenizer, PROMPT, Sampling(new_tokens=8, temperature=1.0))
    assert first_divergence(left.tokens, right.tokens) is None


def test_an_answer_that_ended_waits_for_the_other(tokenizer: PreTrainedTokenizerBase) -> None:
    model, brief = endless("mixtral"), endless("mixtral")
    *_, full = answer(model, tokenizer, PROMPT, Sampling(new_tokens=5))
    brief.generation_config.eos_token_id = [full.tokens[2]]
    *_, (left, right) = side_by_side([brief, model], tokenizer, PROMPT, Sampling(new_tokens=5))
    stop = full.tokens.index(full.tokens[2])
    assert (left.finished, left.tokens) == ("end", full.tokens[:stop])
    assert (right.finished, right.tokens) == ("length", full.tokens)


def test_time_is_each_models_own(tokenizer: PreTrainedTokenizerBase) -> None:
    model = endless("mixtral")
    turns = list(side_by_side([model, model], tokenizer, PROMPT, Sampling(new_tokens=4)))
    assert turns[0][0].tokens_per_second is None
    left = turns[-1][0]
    assert 0 < left.first_token_seconds < left.seconds
    assert left.tokens_per_second == pytest.approx(3 / (left.seconds - left.first_token_seconds))


@pytest.mark.parametrize("shown", [0, 1, 3])
def test_the_step_that_ends_an_answer_does_not_slow_it(
    shown: int, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sampling = endless("mixtral"), Sampling(new_tokens=6, temperature=3.0, seed=1)
    *_, full = answer(model, tokenizer, PROMPT, sampling)
    assert full.tokens[shown] not in full.tokens[:shown]
    model.generation_config.eos_token_id = [full.tokens[shown]]
    ticks = count()
    monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=lambda: 0.1 * next(ticks)))  # every step takes 0.1 s
    answers = list(answer(model, tokenizer, PROMPT, sampling))
    assert (answers[-1].finished, answers[-1].tokens) == ("end", full.tokens[:shown])
    for each in answers:
        assert each.first_token_seconds == pytest.approx(0.1)
        assert each.seconds == pytest.approx(0.1 * max(1, len(each.tokens)))
        assert each.tokens_per_second == (pytest.approx(10) if len(each.tokens) > 1 else None)


@pytest.mark.parametrize("top_p", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1e-20, 1e-39, 5e-324])
def test_the_smallest_temperatures_take_the_most_probable_tokens(
    temperature: float, top_p: float, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = endless("mixtral")
    *_, greedy = answer(model, tokenizer, PROMPT, Sampling(new_tokens=4))
    *_, sampled = answer(model, tokenizer, PROMPT, Sampling(4, temperature, top_p))
    assert sampled.tokens == greedy.tokens != (0, 0, 0, 0)


@pytest.mark.parametrize(("left", "right", "index"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None)])
def test_first_divergence(left: list[int], right: list[int], index: int | None) -> None:
    assert first_divergence(left, right) == index


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ("  \n", Sampling(), "must not be empty"),
        ("word " * 80, Sampling(new_tokens=4), r"fewer than 64 tokens.*got \d+"),
        ("word", Sampling(new_tokens=4, chat=True), "no chat template"),
    ],
)
def test_says_what_is_wrong_with_a_prompt(prompt: str, sampling: Sampling, message: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=message):
        answer(endless("mixtral"), tokenizer, prompt, sampling)


@pytest.mark.parametrize("wrong", [{"new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"seed": -1}])
def test_refuses_settings_out_of_bounds(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be"):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["new_tokens", "temperature", "top_p", "seed", "chat"])
@pytest.mark.parametrize("wrong", ["1", None, [1]])
def test_refuses_settings_of_another_type(name: str, wrong: object) -> None:
    with pytest.raises(InputError, match=rf"^{name} must be .*, got {re.escape(repr(wrong))}"):
        Sampling(**{name: wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["new_tokens", "temperature", "top_p", "seed"])
def test_a_truth_value_is_no_number(name: str) -> None:
    with pytest.raises(InputError, match=rf"^{name} must be .*, got True"):
        Sampling(**{name: True})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logit", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_end_the_answer(logit: float, temperature: float, tokenizer: PreTrainedTokenizerBase) -> None:
    model = endless("mixtral")
    model.lm_head.register_forward_hook(lambda _, __, logit_BLV: logit_BLV.index_fill(-1, torch.tensor([5]), logit))
    with pytest.raises(EvaluationError, match="not finite"):
        next(answer(model, tokenizer, PROMPT, Sampling(temperature=temperature)))


def test_tokens_that_a_model_rules_out_are_not_taken(tokenizer: PreTrainedTokenizerBase) -> None:
    model = endless("mixtral")
    *_, full = answer(model, tokenizer, PROMPT, Sampling(new_tokens=1))
    out = torch.tensor([*range(5), *full.tokens])
    model.lm_head.register_forward_hook(lambda _, __, logit_BLV: logit_BLV.index_fill(-1, out, -torch.inf))
    for temperature in (0.0, 1e-39, 1.0):
        *_, last = answer(model, tokenizer, PROMPT, Sampling(new_tokens=4, temperature=temperature))
        assert not set(last.tokens) & set(out.tolist())


def test_warming_up_reads_the_prompt_and_writes_a_token_by_every_model(tokenizer: PreTrainedTokenizerBase) -> None:
    models, lengths = [endless("mixtral"), endless("mixtral")], []
    for model in models:
        model.register_forward_pre_hook(lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True)
    warm_up(models, tokenizer, PROMPT, Sampling(new_tokens=50))
    prompt = len(tokenizer(PROMPT).input_ids)
    assert lengths == [prompt, 1, prompt, 1]
    with pytest.raises(InputError, match="must not be empty"):
        warm_up(models, tokenizer, " ")
