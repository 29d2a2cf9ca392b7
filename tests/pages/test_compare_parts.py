"""Coloured text, votes and measurements: figures are those that were given, and text from outside stays text."""

from math import exp, log

from moesvd_core.evaluation.text_scores import TokenScore
from moesvd_core.planning import Recipe
from moesvd_core.runs.known import Measured
from moesvd_core.runs.votes import Tally, Vote
from pages.components import token_colors
from pages.components.measured import measured_html
from pages.components.vote_parts import verdict, votes_html

EVIL = "<img src=x onerror=alert(1)>"


def score(change: float, text: str = " word", original: float = 0.5) -> TokenScore:
    return TokenScore(text, log(original) + change, log(original))


def test_the_colour_follows_sign_and_size_of_the_change() -> None:
    scores = [score(-5.0), score(-0.5), score(0.0), score(0.02), score(0.6), score(9.0)]
    shown = token_colors.colored(scores, "The")
    kinds = [part.split('"')[1] for part in shown.partition("</p>")[0].split("<span class=")[1:]]
    assert kinds == ["less s8 marked", "less s4", "", "", "more s5", "more s8"]
    assert "50 % → 0.337 %, −5.000 nats" in shown


def test_a_halved_probability_is_marked_without_colour() -> None:
    assert "marked" in token_colors.colored([score(log(0.499))], "").partition("</p>")[0]
    assert "marked" not in token_colors.colored([score(log(0.501))], "").partition("</p>")[0]


def test_the_summary_is_the_perplexity_of_this_text() -> None:
    shown = token_colors.summary([score(-0.3), score(0.1)])
    assert "<dd>2<span>of 2 tokens" in shown
    assert f"{2 * exp(0.1):.4g}" in shown
    assert "+0.100 nats a token" in shown
    assert "1 of 2" in shown
    assert "−0.300" in shown


def test_tokens_from_outside_stay_text() -> None:
    scores = [score(-1, EVIL), score(1, '"'), score(1, "\n")]
    for shown in (token_colors.colored(scores, EVIL), token_colors.summary(scores), token_colors.table(scores)):
        assert "<img" not in shown
    assert "⏎" in token_colors.table(scores)


def vote(preferred: str, ratio: float = 0.4) -> Vote:
    return Vote("auto", ratio, preferred, "original", EVIL, EVIL, EVIL)  # type: ignore[arg-type]


def test_votes_are_counted_by_ratio_with_their_interval() -> None:
    shown = votes_html([vote("compressed"), vote("original"), vote("neither"), vote("original", 0.6)])
    assert "auto 40 %" in shown
    assert "50 % (9 to 91 %)" in shown  # Wilson, 1 of 2
    assert "auto 60 %" in shown
    assert "0 % (0 to 79 %)" in shown  # Wilson, 0 of 1
    assert "<img" not in shown
    assert "No votes yet" in votes_html([])


def test_the_verdict_claims_no_more_than_the_interval() -> None:
    assert verdict(Tally(5, 5, 3)) == "Compressed preferred in 5 of 10 decided votes: no preference is shown yet."
    assert verdict(Tally(0, 4, 0)).endswith("more often than chance.")  # 0.51 to 1
    assert verdict(Tally(0, 3, 0)).endswith("no preference is shown yet.")  # 0.44 to 1
    assert verdict(Tally(20, 5, 0)).endswith("less often than chance.")
    assert verdict(Tally(0, 0, 1)) == "Once no difference was seen."


def test_measurements_stand_in_a_table_with_the_view_s_own_lit() -> None:
    text = {"dataset": f"/home/someone/{EVIL}.txt", "windows": 4, "length": 24}
    before = Measured(None, 0.0, 4_000_000, {**text, "perplexity": 12.0, "perplexity_stderr": 0.5, "kl_mean": None})
    distance = {"kl_mean": 0.012, "kl_p95": 0.2, "top1_agreement": 0.95, "delta_nll": 0.028}
    after = Measured(Recipe(), 0.401, 2_400_000, {**text, "perplexity": 12.34, "perplexity_stderr": None, **distance})
    shown = measured_html([before, after], Recipe())
    assert shown.count("class=chosen") == 1
    assert "auto 40.1 %" in shown
    assert "+0.0280" in shown
    assert "95.0 %" in shown
    assert "<img" not in shown
    assert "/home/someone" not in shown
    assert "Nothing was measured yet" in measured_html([], Recipe())
