"""Every benchmark from its command line, on the smallest model there is."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from moesvd_core import experts
from moesvd_core.decomposition.registry import METHODS, method
from moesvd_core.errors import InputError, ResourceError
from moesvd_core.evaluation.benchmarks import inference, memory
from moesvd_core.evaluation.benchmarks.command import add_arguments, run
from moesvd_core.evaluation.benchmarks.decompose import DecomposeBenchmark, compressed, warm_up
from moesvd_core.evaluation.benchmarks.memory_probe import peak_bytes, resident_bytes
from moesvd_core.evaluation.benchmarks.synthetic import random_layer
from moesvd_core.evaluation.benchmarks.table import Table

torch.set_num_threads(1)


def benchmark(*words: str | Path) -> Table:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words])).table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("command") / "model", fused=False)


CALIBRATION = ("--samples", "4", "--calibration-length", "32")


def test_quality_writes_what_it_prints(folder: Path, tmp_path: Path) -> None:
    scored = ("--windows", "3", "--length", "24", "--dtype", "float32", "--work", tmp_path / "work", "--output", tmp_path / "out")
    table = benchmark("quality", folder, "--methods", "svd-llm", "--ratios", "0.3", *CALIBRATION, *scored)
    assert [row["method"] for row in table.records] == ["original", "svd-llm"]
    assert "3 windows of 24 tokens" in table.notes[0] and "4 windows of 32 tokens" in table.notes[0] and "float32" in table.notes[0]
    assert json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf-8"))["rows"] == table.records
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"quality.json", "quality.csv", "quality-seeds.csv", "quality.html"}
    assert len(list((tmp_path / "work").glob("*/statistics/statistics.json"))) == 1


def test_decompose_compares_with_the_loop_at_the_same_ratio() -> None:
    size = ("--hidden", "128", "--width", "192", "--experts", "4", "--ratio", "0.5")
    table = benchmark("decompose", *size, "--methods", "svd", "svd-llm", "latent", "--device", "cpu")
    loop, *ours = table.records
    assert "4 experts, float32, 1 threads" in table.title
    assert loop["times as fast"] == 1
    for row in ours:
        assert float(row["experts' ratio"] or 0) == pytest.approx(0.5, abs=0.06)
        assert float(row["times as fast"] or 0) == pytest.approx(float(loop["seconds"] or 0) / float(row["seconds"] or 0))
    errors = {row["method"]: float(row["output error"] or 0) for row in (loop, *ours)}
    assert 0.1 < errors["svd-llm"] < errors["svd"] < 1.5, "weighting by activations helps where inputs have a falling spectrum"


def test_what_a_card_is_warmed_up_with_suits_every_method() -> None:
    small = random_layer(64, 64, 8, tokens=64)
    for name in METHODS:
        compressed(small.weights, small.layer, small.statistics, method(name), DecomposeBenchmark.ratio, "cpu")
    warm_up(lambda sample, name: pytest.fail("a CPU needs no warming up"), ["latent"], "cpu")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_layer_is_timed_step_by_step(family: str, tmp_path: Path) -> None:
    size = ("--family", family, "--hidden", "64", "--width", "48", "--experts", "4", "--active", "2", "--ratio", "0.5")
    text = ("--samples", "3", "--length", "32", "--batch", "2", "--gradient-samples", "2")
    table = benchmark("layer", *size, *text, "--methods", "latent", "svd-llm", "--output", tmp_path)
    seconds = {str(row["step"]): float(row["seconds"] or 0) for row in table.records}
    passes = ["calibration, forward pass", "calibration, backward pass"]
    assert list(seconds) == [*passes, "latent decomposed", "latent in all", "svd-llm decomposed", "svd-llm in all"]
    assert min(seconds.values()) > 0
    for name in ("latent", "svd-llm"):
        assert seconds[f"{name} in all"] == pytest.approx(sum(seconds[each] for each in (*passes, f"{name} decomposed")))
    assert all(float(row["experts' ratio"] or 0) == pytest.approx(0.5, abs=0.06) for row in table.records[2:])
    assert f"{family}, d 64, m 48, 4 experts, 2 active, bfloat16" in table.title
    assert "3 windows of 32 tokens, 2 at once; gradients of 2 of them, 3 labels" in table.notes[0]
    assert "layer.html" in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("small", [True, False], ids=["small experts", "large experts"])
def test_inference_times_the_original_and_every_compressed_model(small: bool, computed_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "SMALL_EXPERT", 1 << 20 if small else 0)
    size = ("--hidden", "64", "--width", "96", "--experts", "4", "--layers", "1")
    test = ("--prompts", "4", "16", "--batches", "2", "--new-tokens", "2", "--repeats", "1", "--kept", "0.5")
    table = benchmark("inference", *size, *test, *CALIBRATION, "--methods", "latent", "auto").records
    compressed = ["latent 50% kept", "auto 50% kept", "auto, per-expert 50% kept"]
    names = ["original, grouped_mm", "original, eager", "original, batched_mm", *compressed]
    if not small and computed_by == "torch" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        names += [f"{name}, packed" for name in compressed]
    expected = [f"{name}, 2 × 4" for name in names] + [f"{name}, 2 × 16" for name in names if "batched" not in name]
    assert [row["model"] for row in table] == expected, "copying a matrix for each pair is for few pairs"
    original, _, _, latent, auto, per_expert = table[:6]
    assert max(float(row["prefill × original"] or 0) for row in table[:3]) == 1, "beside the fastest"
    for half in (latent, auto, per_expert):
        assert float(half["experts kept"] or 0) <= 0.5
        assert float(half["MFLOP/token"] or 0) < float(original["MFLOP/token"] or 0)
        assert int(half["weights, bytes"] or 0) < int(original["weights, bytes"] or 0)
        assert half["decode, of ideal"] == pytest.approx(float(half["decode, experts × original"] or 0) * float(half["experts kept"] or 0))


def test_files_hold_the_ratio_that_was_planned(folder: Path) -> None:
    table = benchmark("ratios", folder, "--methods", "auto", "moe-svd-refit", "--ratios", "0.2", "0.3", *CALIBRATION).records
    assert [(row["method"], row["asked"]) for row in table] == [(name, ratio) for name in ("auto", "moe-svd-refit") for ratio in (0.2, 0.3)]
    for row in table:
        assert float(row["asked"] or 0) <= float(row["planned"] or 0)
        assert row["in files"] == pytest.approx(row["planned"], abs=1e-9)
        assert abs(float(row["difference %"] or 0)) <= 0.1
        assert 0 < float(row["ready in, s"] or 0) < 60
        assert 0 < int(row["bytes beside the original"] or 0) <= int(row["planned bytes"] or 0), "one set of factors"


@pytest.mark.slow
def test_memory_measures_a_process_of_its_own(tmp_path: Path) -> None:
    size = ("--hidden", "64", "--width", "96", "--experts", "4", "--layers", "1", "--samples", "2", "--length", "32")
    table = benchmark("memory", *size, "--ratio", "0.3", "--folder", tmp_path)
    by_name = {row["what"]: float(row["MB"] or 0) for row in table.records}
    assert 100 < by_name["interpreter with torch and transformers"] < 1000
    assert 0 < by_name["peak above it while analysing"] <= by_name["peak above it in all"] < 1500
    assert not list(tmp_path.iterdir()), "checkpoint and export are removed"


def test_the_peak_counts_what_is_gone_again() -> None:
    before = peak_bytes()
    assert before >= resident_bytes() > 0
    block = torch.ones((before - resident_bytes()) // 4 + 10_000_000)
    del block
    assert peak_bytes() >= before + 30_000_000


def test_a_measured_process_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "executable", shutil.which("false"))
    with pytest.raises(ResourceError, match="did not finish: exit status 1"):
        benchmark("memory", "--hidden", "64", "--width", "8", "--experts", "2", "--layers", "1")


def test_bad_settings_are_told_before_any_work(folder: Path) -> None:
    with pytest.raises(InputError, match="method must be one of"):
        benchmark("ratios", folder, "--methods", "best")
    with pytest.raises(InputError, match=r"ratio must be in \(0, 1\), got 1.5"):
        benchmark("decompose", "--ratio", "1.5")
    with pytest.raises(InputError, match=r"active must be in \[1, 2\] \(experts\), got 3"):
        benchmark("layer", "--experts", "2", "--active", "3")
    with pytest.raises(InputError, match="hidden must be a multiple of 64"):
        benchmark("layer", "--hidden", "96")
    with pytest.raises(InputError, match="repeats must be a whole number of at least 1, got 0"):
        benchmark("decompose", "--repeats", "0")


@pytest.mark.parametrize("ratio", ["1.5", "1", "-0.1", "nan"])
@pytest.mark.parametrize("name", ["quality", "ablation", "prediction", "ratios"])
def test_ratios_that_no_method_reaches_are_refused_before_a_model_is_looked_for(name: str, ratio: str) -> None:
    with pytest.raises(InputError, match=rf"^ratios must be numbers in \[0, 1\), shares of the model's parameters .*got {float(ratio)}$"):
        benchmark(name, "nowhere", "--ratios", "0.2", "0.4", "0.6", ratio)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "4", "0"], "prompt_tokens must be a whole number of at least 1, got 0"),
        (["--batches", "0"], "batch must be a whole number of at least 1, got 0"),
        (["--new-tokens", "0"], "new_tokens must be a whole number of at least 1, got 0"),
        (["--prompts", "4", "300"], r"prompt_tokens \+ new_tokens must be at most 64 for model, got 300 \+ 8"),
    ],
)
def test_speed_that_cannot_be_measured_is_refused_before_the_model_is_loaded(
    words: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "AutoModelForCausalLM", None)
    with pytest.raises(InputError, match=message):
        benchmark("inference", "--model", folder, *words)


def test_a_random_model_has_its_bound_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "random_model", lambda *_: pytest.fail("the model was made"))
    with pytest.raises(InputError, match=r"at most 2048 for a random model \(mixtral, .*\), got 2041 \+ 8"):
        benchmark("inference", "--prompts", "2041")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "nope"], "method must be one of auto, .*got 'nope'"),
        (["--ratio", "1.5"], r"ratio must be a number in \[0, 1\), .*got 1.5"),
        (["--samples", "0"], "samples must be a whole number of at least 1 windows, got 0"),
        (["--length", "1"], "length must be a whole number of at least 2 tokens, got 1"),
        (["--length", "4096"], r"length must be in \[2, 2048\] tokens .*got 4096"),
        (["--gigabytes", "nan"], "gigabytes must be a finite number above 0, got nan"),
    ],
)
def test_what_cannot_be_compressed_is_refused_before_a_checkpoint_is_written(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "write_random_mixtral", lambda *_: pytest.fail("the checkpoint was written"))
    with pytest.raises(InputError, match=message):
        benchmark("memory", *words)


@pytest.mark.parametrize("name", ["decompose", "layer", "inference"])
@pytest.mark.parametrize(
    ("cards", "device", "message"),
    [
        (0, "xyz", "device must be cpu on this machine, where torch finds no graphics card, got 'xyz'"),
        (0, "cuda", "device must be cpu on this machine, where torch finds no graphics card, got 'cuda'"),
        (2, "cuda:2", "device must be one of cpu, cuda, cuda:0, cuda:1, got 'cuda:2'"),
        (2, "meta", "device must be one of cpu, cuda, cuda:0, cuda:1, got 'meta'"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    name: str, cards: int, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    with pytest.raises(InputError, match=f"^{message}$"):
        benchmark(name, "--device", device)
