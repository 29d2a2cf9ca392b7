"""The command line: what it prints, where, and how it ends."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from runs.run_helpers import new_run
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, LlamaConfig

from moesvd_core import atomic, commands
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.inspect import inspect
from moesvd_core.cli import main, parser
from moesvd_core.evaluation import zero_shot
from moesvd_core.evaluation.zero_shot import TaskScore
from moesvd_core.planning import Recipe
from moesvd_core.runs import worker
from moesvd_core.runs.client import Client, enqueue
from moesvd_core.runs.folder import Identity, RunFolder
from moesvd_core.runs.jobs import Job, read_jobs
from moesvd_core.runs.process import this_process

HOUSE = Path(__file__).parents[1]
FAST = ["--samples", "4", "--length", "24", "--windows", "4"]
WINDOWS = "windows must be a whole number of at least 1"
IS_A_SHARE = "the share of the model's parameters to remove"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(save_tiny("mixtral", tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(autouse=True)
def runs_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESVD_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.mark.parametrize(("words", "file", "expected"), [
    ([], "", False), (["--refit-router"], "", True), ([], "refit_router: true\nratio: 0.2", True),
    (["--no-refit-router"], "refit_router: true\nratio: 0.2", False),
])
def test_a_recipe_file_says_whether_routers_are_refitted_unless_the_command_does(
    words: list[str], file: str, expected: bool, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(file)
    source = ["--recipe", str(tmp_path / "recipe.yaml")] if file else ["--ratio", "0.2"]
    typed = ["compress", "model", *source, "--output", "out", *words]
    assert commands._recipe(parser(typed).parse_args(typed))["refit_router"] is expected


@pytest.mark.parametrize(("words", "file", "expected"), [
    ([], "method: mpifa\nratio: 0.3", True),
    ([], "ratio: 0.3", True),
    ([], "method: svd-llm\nratio: 0.3", False),
    ([], "method: mpifa\nratio: 0.3\ncompensate: false", False),
    ([], "method: svd-llm\nratio: 0.3\ncompensate: true", True),
    (["--no-compensate"], "method: mpifa\nratio: 0.3\ncompensate: true", False),
    (["--method", "mpifa"], "method: svd-llm\nratio: 0.3", True),
])
def test_a_recipe_file_that_says_nothing_of_compensation_leaves_it_to_the_method(
    words: list[str], file: str, expected: bool, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(file)
    typed = ["compress", "model", "--recipe", str(tmp_path / "recipe.yaml"), "--output", "out", *words]
    assert commands._recipe(parser(typed).parse_args(typed))["compensate"] is expected
    assert not Recipe.from_yaml("method: mpifa\nratio: 0.3").compensate  # nobody fills anything in there


def test_compress_prints_figures_of_what_it_wrote(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main(["compress", model, "--ratio", "0.2", "--output", str(output), *FAST, "--json"]) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert {
        "ratio", "expert_ratio", "original_parameters", "parameters", "active_parameters", "bytes",
        "perplexity", "perplexity_stderr", "tokens", "kl_mean", "top1_agreement", "layers",
    } <= set(figures)
    assert {"selected", "ranks", "predicted_loss"} <= set(figures["layers"][0])
    assert figures["bytes"] == ModelFiles.open(output).bytes
    assert "calibrate" in printed.err
    assert main(["compress", model, "--ratio", "0.2", "--output", str(output), *FAST]) == 0
    printed = capsys.readouterr().out
    assert "truncation loss, nats" in printed and "predicted" not in printed
    assert "active_parameters (experts by use)" in printed
    assert main(["inspect", str(output)]) == 0
    assert "active_parameters (all experts alike)" in capsys.readouterr().out


def test_one_run_serves_plans_exports_and_lists(model: str, tmp_path: Path, runs_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", model, *FAST, "--measure", "--json"]) == 0
    analysis = json.loads(capsys.readouterr().out)
    run = analysis["run"]
    assert (runs_root / run / analysis["sensitivity"]).exists()
    assert main(["plan", run, "--method", "latent", "--ratio", "0.3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["ratio"] >= 0.3 and plan["method"] == "latent"
    assert main(["plan", run, "--method", "latent", "--ratio", "0.3", "--flops-ratio", "0.35", "--json"]) == 0
    bounded = json.loads(capsys.readouterr().out)
    assert bounded["flops"] <= 0.65 * bounded["original_flops"] + 2 < plan["flops"]
    assert bounded["ratio"] >= 0.3
    (tmp_path / "recipe.yaml").write_text("method: fisher\nratio: 0.1\n")
    output = str(tmp_path / "dense")
    assert main(["export", str(runs_root / run), "--recipe", str(tmp_path / "recipe.yaml"), "--output", output, "--format", "dense"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"fisher at 1\d\.\d%, stored as whole matrices", printed)
    assert re.search(r"ratio \(of the factors\) +│ 0\.1", printed)
    original = inspect(model)
    for name in ("parameters", "active_parameters", "bytes"):
        assert re.search(rf"│ {name} +│ {getattr(original, name):,} ", printed), name
    assert main(["runs", "--json"]) == 0
    [status] = json.loads(capsys.readouterr().out)
    assert (status["id"], status["state"]) == (run, "finished")
    assert main(["runs"]) == 0
    assert run in capsys.readouterr().out


def test_evaluate_and_inspect(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", model, "--reference", model, "--windows", "2", "--length", "24", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert main(["inspect", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == 4
    assert main(["inspect", model]) == 0
    assert "experts alike" not in capsys.readouterr().out, "there all are of one size"


def test_evaluate_asks_sets_of_questions(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "piqa.jsonl").write_text('{"goal": "to open a door", "sol1": "turn", "sol2": "eat", "label": 0}\n')
    asked: list[int | None] = []

    def scores(*_: object, limit: int | None, **__: object) -> dict[str, TaskScore]:
        asked.append(limit)
        return {"piqa": TaskScore(0.5, 0.25, 0.75, 2)}

    monkeypatch.setattr(zero_shot, "zero_shot", scores)  # the harness is optional
    monkeypatch.setattr(zero_shot, "require_harness", lambda: None)
    words = ["evaluate", model, "--reference", model + "/.", "--zero-shot", str(tmp_path), "--limit", "2"]
    assert main(words) == 0
    assert re.search(r"piqa +│ +2 +│ 50\.0% ± 25\.0% \(75\.0%\) +│ 50\.0% ± 25\.0% \(75\.0%\)", capsys.readouterr().out)
    assert main([*words, "--json"]) == 0
    [reference, own] = json.loads(capsys.readouterr().out)
    assert (reference["model"], own["model"]) == (model + "/.", model)
    assert own["tasks"] == {"piqa": {"accuracy": 0.5, "stderr": 0.25, "normalised": 0.75, "rows": 2}}
    assert asked == [2] * 4


def test_compare_shows_both_models(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # for the names of both folders
    assert main(["compare", model, model, "--windows", "2", "--prompt", "we the people", "--json"]) == 0
    original, compressed = json.loads(capsys.readouterr().out)
    assert original["answer"] == compressed["answer"]
    assert compressed["top1_agreement"] == 1
    assert {"flops_per_token"} <= set(compressed)
    low, high = compressed["decode_quartiles"]
    assert 0 < low <= compressed["decode_tokens_per_second"] <= high
    assert main(["compare", model, model, "--windows", "1"]) == 0
    printed = capsys.readouterr().out
    assert "flops_per_token (as run on a prompt)" in printed and "quartiles" not in printed
    assert re.search(r"decode_tokens_per_second.*│ [\d,.]+ \([\d,.]+ to [\d,.]+\)", printed)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        *(
            (["compress", "MODEL", f"--ratio={ratio}", "--output", "OUT"], f"ratio must be a number in [0, 1), {IS_A_SHARE}, got {shown}")
            for ratio, shown in {"-1": "-1.0", "1": "1.0", "1.5": "1.5", "nan": "nan", "-inf": "-inf", "abc": "'abc'", "": "''"}.items()
        ),
        (["compress", "DENSE", "--ratio", "0.3", "--output", "OUT"], "model type 'llama' is dense: it has no routed experts"),
        (["inspect", "DENSE"], "model type 'llama' is dense"),
        (["evaluate", "DENSE"], "no tokenizer can be loaded"),
        (["compress", "MODEL", "--ratio", "0.99", "--output", "OUT"], "for auto on this model, got 0.99"),
        (["compress", "MODEL", "--output", "OUT"], "ratio is missing"),
        (["compress", "MODEL", "--ratio", "0.3", "--method", "magic", "--output", "OUT"], "method must be one of auto"),
        (["compress", "MODEL", "--ratio", "0.3", "--output", "OUT", "--samples", "0"], "samples must be a whole number of at least 1"),
        (["compress", "MODEL", "--ratio", "0.3", "--output", "OUT", "--dataset", "nowhere.txt"], "nowhere.txt"),
        (["compress", "MODEL", "--ratio", "0.3", "--output", "OUT", "--evaluate-on", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["compress", "MODEL", "--ratio", "0.3", "--output", "OUT", "--windows", "-1"], f"{WINDOWS}, got -1"),
        (["analyze", "MODEL", "--dataset", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["analyze", "MODEL", "--windows", "0"], f"{WINDOWS}, got 0"),
        (["analyze", "MODEL", "--method", "magic"], "method must be one of auto"),
        (["analyze", "MODEL", "--reference-ratio", "1.5"], "ratio must be a number in [0, 1)"),
        (["analyze", "DENSE"], "model type 'llama' is dense"),
        (["compress", "NOWHERE", "--ratio", "0.3", "--output", "OUT"], "neither a model folder nor a name of the hub"),
        (["plan", "../outside", "--ratio", "0.3"], "no run"),
        (["plan", "unknown", "--ratio", "0.3"], "no run"),
        (["compress", "MODEL", "--recipe", "nowhere.yaml", "--output", "OUT"], "nowhere.yaml cannot be read"),
        (["compress", "MODEL", "--ratio", "0.3", "--output", "OUT", "--dataset", "EMPTY"], "empty.txt holds no text"),
        (["compress", "MODEL", "--ratio", "0.3", "--output", "OUT", "--seed", "-1"], "seed must be a whole number of at least 0, got -1"),
        (["compress", "MODEL", "--ratio", "0.3", "--output", "OUT", "--seed", "9" * 20], "seed must be at most 4,294,967,295, got 99,999,"),
        (["compress", "MODEL", "--ratio", "0.3", "--output", "OUT", "--length", "1"], "length must be a whole number of at least 2"),
        (["compress", "MODEL", "--ratio", "0.3", "--output", "EMPTY"], "output must be a folder, got the file"),
        (["compress", "MODEL", "--ratio", "0.3", "--output", "MODEL"], "holds files that are no export"),
        (["compress", "MODEL", "--recipe", "EVIL", "--output", "OUT"], "could not determine a constructor for the tag"),
        (["analyze", "MODEL", "--run", "EMPTY/run"], "cannot be made (Not a directory): name another folder"),
        (["evaluate", "MODEL", "--windows", "0"], "windows"),
        (["evaluate", "MODEL", "--dataset", "EMPTY"], "empty.txt holds no text"),
        (["compare", "MODEL", "MODEL", "--prompt", ""], "prompt must not be empty: write at least one word"),
        (["compare", "MODEL", "MODEL", "--prompt", "a" * 1_000_000], "prompt must have fewer than 64 tokens, the model's limit"),
        (["evaluate", "MODEL", "--zero-shot", "EMPTY", "--limit", "0"], "limit must be a whole number of at least 1 questions, got 0"),
        (["evaluate", "MODEL", "--zero-shot", "EMPTY"], "no rows of any task: put one or more of openbookqa.jsonl"),
        (["cancel", "unknown"], "no run"),
        (["analyze", "no/such"], "'no/such' is no model folder, and the hub cannot be asked for it"),
        (["compress", "no/such", "--ratio", "0.3", "--output", "OUT"], "the hub cannot be asked for it"),
        (["analyze", "MODEL", "--length", "65"], "length must be in [2, 64] tokens for this model, got 65"),
        (["compress", "MODEL", "--ratio", "0.3", "--output", "OUT", "--length", "65"], "length must be in [2, 64]"),
        (["delete", "unknown"], "no run"),
        (["delete", "../outside"], "no run"),
        (["delete", str(HOUSE / "assets" / "demo-run"), "--yes"], "comes with the program"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(
    words: list[str], reason: str, model: str, tmp_path: Path, runs_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "MODEL": model, "OUT": str(tmp_path / "out"), "NOWHERE": str(tmp_path / "no such model"), "EVIL": str(tmp_path / "evil.yaml"),
        "DENSE": str(tmp_path / "dense"), "EMPTY": str(tmp_path / "empty.txt"), "EMPTY/run": str(tmp_path / "empty.txt" / "run"),
    }
    (tmp_path / "empty.txt").touch()
    (tmp_path / "evil.yaml").write_text(f"method: !!python/object/apply:os.mkdir ['{tmp_path / 'sprung'}']\nratio: 0.2\n")
    if "DENSE" in words:
        config = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
        capsys.readouterr()
    assert main([places.get(word, word) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith("moesvd: ") and reason in line
    assert not runs_root.exists(), "what can be known beforehand leaves no run behind"
    assert not (tmp_path / "out").exists() and not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "the following arguments are required: COMMAND; moesvd --help"),
        (["fly"], "invalid choice: 'fly'"),
        (["compress"], "required: MODEL, --output; moesvd compress --help"),
        (["compress", "m", "--ratio", "0.1", "--output", "o", "--samples", "many"], "argument --samples: invalid int value: 'many'"),
        (["benchmark", "fly"], "invalid choice: 'fly'"),
    ],
)
def test_words_that_make_no_command_end_with_2_and_one_line(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("moesvd: ") and reason in line


def test_the_options_of_benchmarks_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "quality", "--help"]) == 0
    assert "--methods" in capsys.readouterr().out


def test_serve_hands_its_options_to_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def replaced(program: str, words: list[str], environment: dict[str, str]) -> NoReturn:
        called.append(words)
        raise SystemExit(3)

    monkeypatch.setattr("os.execve", replaced)
    assert main(["serve", "--port", "1"]) == 3
    assert [Path(word).name for word in called[0][1:]] == ["app.py", "--port", "1"]
    assert Path(called[0][1]).is_file()


def test_the_help_of_serve_calls_it_by_what_was_typed() -> None:
    words = [sys.executable, "-m", "moesvd_core", "serve", "--help"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.startswith("usage: moesvd serve [-h] [--host HOST]")


def test_whoever_stops_serve_stops_the_explorer(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "moesvd_core", "serve", "--port", "0", "--no-demo", "--runs", str(tmp_path)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=quiet) as process:
        assert process.stdout is not None
        assert process.stdout.readline(), "it says where it can be seen"
        process.terminate()
        process.communicate(timeout=30)  # until nobody is left who would write: not while a process goes on
    assert process.returncode != 0


def test_stopping_by_signal_ends_within_seconds_and_the_run_goes_on(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", model, "--ratio", "0.2", "--output", str(tmp_path / "out"), "--length", "24", "--windows", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moesvd_core", *words, "--samples", "300", "--run", str(tmp_path / "run")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    assert "inspect" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert process.stderr.readline().startswith("moesvd: stopped by SIGINT")
    assert time.monotonic() - start < 8
    printed, _ = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert not (tmp_path / "out").exists()
    assert main(["resume", str(tmp_path / "run"), "--json"]) == 0
    [record] = json.loads(capsys.readouterr().out)
    assert (record["action"], record["output"]) == ("compress", str(tmp_path / "out"))
    assert ModelFiles.open(tmp_path / "out").bytes > 0


def test_jobs_that_are_resumed_together_wait_for_nobody(runs_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    run = new_run(runs_root)
    for name in "ab":
        enqueue(run, "plan", {"name": name})
    Client(runs_root).cancel(run)
    monkeypatch.setattr(worker, "_all_actions", lambda: {"plan": lambda run, arguments, report: arguments})
    assert main(["resume", run.name, "--json"]) == 0
    printed = capsys.readouterr()
    assert [record["name"] for record in json.loads(printed.out)] == ["a", "b"]
    assert "another process" not in printed.err


def test_code_of_a_model_runs_only_where_the_command_says_so(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(tmp_path / "run", Identity("a", model, {}, "", remote_code=True))
    output = ["--ratio", "0.2", "--output", str(tmp_path / "out")]
    words = (["plan", "run", "--ratio", "0.2"], ["export", "run", *output], ["resume", "run"], ["analyze", model, "--run", "run"],
             ["compress", model, *output, "--run", "run"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moesvd_core.runs.source.prepare", lambda *_, **__: run)
    for each in words:
        assert main(each) == 2
        assert "brings code of its own, which is not run unasked: say --allow-remote-code" in capsys.readouterr().err
    assert not read_jobs(run.log)
    assert main(["resume", "run", "--allow-remote-code"]) == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_whoever_waits_for_another_process_is_told_so(runs_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    run = new_run(runs_root)
    job = enqueue(run, "plan", {}).id
    atomic.write_json(run.worker_file, this_process().as_dict())

    def waited(self: Client, run: RunFolder, job: str) -> Job:
        run.log.append("finished", job, result={"name": "a"})
        return read_jobs(run.log)[job]

    monkeypatch.setattr(Client, "wait", waited)
    assert commands._followed(run, job) == {"name": "a"}
    assert capsys.readouterr().err.startswith("another process works on")


def test_a_push_needs_a_token_and_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["push", str(tmp_path), "owner/name"]) == 2
    assert "set HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_aVerySecretToken123")
    assert main(["push", str(tmp_path), "owner/name"]) == 2
    assert "no complete export" in (printed := capsys.readouterr().err)
    assert "hf_aVerySecretToken123" not in printed
    monkeypatch.setattr("moesvd_core.checkpoint.hub.push", lambda *_, **__: "https://hub/owner/name/commit/1")
    assert main(["push", str(tmp_path), "owner/name", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"repository": "owner/name", "address": "https://hub/owner/name/commit/1"}


def test_cancelling_says_what_became_of_the_run(runs_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(runs_root)
    enqueue(run, "analyze", {})
    assert main(["cancel", run.name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "cancelled"


def test_a_run_is_deleted_for_a_script_that_says_so(runs_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(runs_root)
    (run.path / "statistics" / "layer").write_bytes(bytes(1_000_000))
    assert main(["delete", run.name]) == 2
    refused = capsys.readouterr()
    assert (refused.out, run.path.exists()) == ("", True)
    assert "nobody can be asked whether to delete run tiny-00000001 of tiny, 1,000," in refused.err
    assert "say --yes" in refused.err
    assert main(["delete", run.name, "--yes"]) == 0
    assert capsys.readouterr().out.startswith("deleted run tiny-00000001 of tiny, 1,000,")
    assert not run.path.exists()
    assert main(["delete", str(new_run(runs_root).path), "--yes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["exports"], told["votes"], run.path.exists()) == ("tiny-00000001", 0, 0, False)
    assert told["bytes"] > 100


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("Yes\n", 0), ("n\n", 130), ("\n", 130), ("", 130), ("yesterday\n", 130)])
def test_a_person_is_asked_before_a_run_is_deleted(
    answer: str, status: int, runs_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(runs_root)
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["delete", run.name]) == status
    assert run.path.exists() == (status != 0)
    said = capsys.readouterr().err
    assert said.startswith("Delete run tiny-00000001 of tiny, ")
    assert ("run tiny-00000001 is kept" in said) == (status != 0)


def test_a_run_at_work_is_not_deleted_and_nobody_is_asked(runs_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(runs_root)
    enqueue(run, "analyze", {})
    for words in (["delete", run.name], ["delete", run.name, "--yes"]):
        assert main(words) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line == "moesvd: run tiny-00000001 is at work: cancel it before it is deleted"
    assert RunFolder.open(run.path).identity == run.identity


@pytest.mark.parametrize(("words", "reason"), [
    (["--ratio", "0.95"], r"ratio must be in [0, 0.8] for auto on this model, got 0.95: the rest is no expert"),
    (["--ratio", "0.75"], r"ratio must be in [0, 0.7] for auto on this model, got 0.75: choose a smaller ratio"),
])
@pytest.mark.parametrize("command", ["export", "plan"])
def test_a_ratio_out_of_reach_is_refused_before_the_run_notes_a_job(
    command: str, words: list[str], reason: str, runs_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(runs_root)
    facts = {"parameters": 1000, "expert_parameters": 800}
    (run.path / "source.json").write_text(json.dumps({"path": "tiny", "fingerprint": "1", "facts": facts}))
    (run.path / "plans" / "all-auto.json").write_text(json.dumps({"max_ratio": 0.7, "plans": []}))
    output = ["--output", str(tmp_path / "out")] if command == "export" else []
    assert main([command, run.name, *words, *output]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"moesvd: {reason}\n")
    assert read_jobs(run.log) == {}
    assert not (tmp_path / "out").exists()


def test_a_name_that_the_hub_does_not_know_leaves_no_run(
    runs_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    assert main(["analyze", "no/such"]) == 2
    assert "'no/such' is neither a model folder nor a model of the hub ('owner/name'); check the spelling" in capsys.readouterr().err
    assert not runs_root.exists()
