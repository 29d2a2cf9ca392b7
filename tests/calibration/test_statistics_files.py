"""Statistics on disk: the same numbers back, and damage noticed wherever it is."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import TINY, save_tiny, tiny_model, tiny_tokenizer

from moesvd_core.architectures.streaming import LayerStream, MemoryStream
from moesvd_core.calibration import Calibration, LayerStatistics, Statistics, calibrate
from moesvd_core.calibration.identity import identify
from moesvd_core.calibration.statistics import load, save
from moesvd_core.errors import StatisticsError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    return calibrate(MemoryStream(TINY["mixtral"]()), tiny_tokenizer(), Calibration(samples=2, length=16))


@pytest.fixture
def layer(statistics: Statistics) -> LayerStatistics:
    return statistics.layers[1]


def test_comes_back_bit_for_bit(layer: LayerStatistics, tmp_path: Path) -> None:
    save(layer, tmp_path / "layer.safetensors")
    back = load(tmp_path / "layer.safetensors")
    for field, value in vars(layer).items():
        got = getattr(back, field)
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value, field


def test_stores_symmetric_matrices_once(layer: LayerStatistics, tmp_path: Path) -> None:
    save(layer, tmp_path / "layer.safetensors")
    with safe_open(tmp_path / "layer.safetensors", "pt") as file:
        assert file.get_slice("input_gram_EDD").get_shape() == [4, 32 * 33 // 2]


def test_missing_parts_stay_missing(layer: LayerStatistics, tmp_path: Path) -> None:
    bare = LayerStatistics(**{**vars(layer), "intermediate_gram_EMM": None, "gradient_gram_DD": None, "gradient_tokens": 0})
    save(bare, tmp_path / "layer.safetensors")
    back = load(tmp_path / "layer.safetensors")
    assert back.intermediate_gram_EMM is None and back.gradient_gram_DD is None and back.gradient_tokens == 0


def test_sums_of_answers_are_kept_of_experts_with_output_biases_alone(layer: LayerStatistics, tmp_path: Path) -> None:
    biased = calibrate(MemoryStream(TINY["gpt_oss"]()), tiny_tokenizer(), Calibration(samples=2, length=16))
    biased.save(tmp_path / "biased")
    back = Statistics.load(tmp_path / "biased")
    for index, own in biased.layers.items():
        assert own.output_sum_ED is not None and torch.equal(own.output_sum_ED, back.layers[index].output_sum_ED)
    for name, each in {"other-family": layer, "older": replace(biased.layers[1], output_sum_ED=None)}.items():
        save(each, tmp_path / name)
        with safe_open(tmp_path / name, "pt") as file:
            assert "output_sum_ED" not in {*file.keys(), *json.loads(file.metadata()["moesvd"])["facts"]}
        assert load(tmp_path / name).output_sum_ED is None


def test_damage_is_noticed_at_every_place(layer: LayerStatistics, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    save(layer, path)
    content = path.read_bytes()
    places = random.Random(0)
    for _ in range(300):
        flipped = bytearray(content)
        flipped[places.randrange(len(content))] ^= 1 << places.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(StatisticsError, match=r"layer\.safetensors"):
            load(path)
    for size in [*range(0, 64), *(places.randrange(len(content)) for _ in range(50))]:
        path.write_bytes(content[:size])
        with pytest.raises(StatisticsError, match=r"layer\.safetensors is damaged"):
            load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="missing"):
        load(tmp_path / "layer.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(StatisticsError, match="damaged"):
        load(tmp_path / "other.safetensors")


def test_a_folder_is_complete_only_with_its_summary(statistics: Statistics, tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="holds no finished calibration"):
        Statistics.load(tmp_path)
    statistics.save(tmp_path)
    back = Statistics.load(tmp_path)
    assert back.summary() == statistics.summary() and back.expert_layers == statistics.expert_layers
    assert torch.equal(back.layers[2].input_gram_EDD, statistics.layers[2].input_gram_EDD)
    (tmp_path / "layer-002.safetensors").unlink()
    with pytest.raises(StatisticsError, match="lacks the statistics of layer 2"):
        Statistics.load(tmp_path)
    (tmp_path / "statistics.json").write_text("{", encoding="utf-8")
    with pytest.raises(StatisticsError, match=r"statistics.json is damaged"):
        Statistics.load(tmp_path)


@pytest.mark.parametrize("written", [0, 1, 2])
def test_an_interrupted_save_over_other_statistics_is_not_taken_for_complete(
    written: int, statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = calibrate(MemoryStream(TINY["mixtral"]()), tiny_tokenizer(), Calibration(samples=3, length=16, seed=1))
    other.save(tmp_path)
    done: list[Path] = []

    def killed(layer: LayerStatistics, path: Path) -> None:
        if len(done) == written:
            raise KeyboardInterrupt
        done.append(path)
        save(layer, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("moesvd_core.calibration.statistics.save", killed)
        statistics.save(tmp_path)
    with pytest.raises(StatisticsError, match="holds no finished calibration"):
        Statistics.load(tmp_path)
    statistics.save(tmp_path)
    assert {layer.tokens for layer in Statistics.load(tmp_path).layers.values()} == {2 * 16}


def test_what_was_in_a_folder_before_is_gone(statistics: Statistics, tmp_path: Path) -> None:
    statistics.save(tmp_path)
    fewer = replace(statistics, layers={0: statistics.layers[0]}, expert_layers=statistics.expert_layers[:1], window_NL=None)
    fewer.save(tmp_path)
    back = Statistics.load(tmp_path)
    assert list(back.layers) == [0] and back.window_NL is None


def test_statistics_can_be_saved_where_they_lie(statistics: Statistics, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    statistics.save(tmp_path / "real")
    Statistics.load(tmp_path / "real").save(tmp_path / "link")
    assert list(Statistics.load(tmp_path / "real").layers) == list(statistics.layers)


def test_identity_tells_models_apart(tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path / "a")
    copy = save_tiny("mixtral", tmp_path / "b")
    assert identify(LayerStream(folder)).digest == identify(LayerStream(copy)).digest
    assert identify(LayerStream(folder)).source == str(folder)
    assert identify(LayerStream(folder, dtype=torch.bfloat16)).dtype == "bfloat16"
    one, other = (identify(MemoryStream(tiny_model("mixtral", seed=seed))).digest for seed in (0, 1))
    assert one != other
