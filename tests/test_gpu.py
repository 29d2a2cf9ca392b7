"""What a graphics card finds out, beside what the host does; nothing is run where there is no card."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_factors import model_factors
from tiny_models import TINY, tiny_tokenizer
from torch import Tensor

from moesvd_core import devices
from moesvd_core.architectures.streaming import MemoryStream
from moesvd_core.calibration import Calibration, Statistics, calibrate, products
from moesvd_core.calibration.products import add_gram_, counts_above, multiplies_rounded
from moesvd_core.calibration.states import DeviceStates, MemoryStates
from moesvd_core.checkpoint.apply import compressed
from moesvd_core.decomposition.decompose import Decomposition, decompose
from moesvd_core.decomposition.latent import LatentBasis
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.decomposition.parallel import in_parallel
from moesvd_core.decomposition.registry import method
from moesvd_core.evaluation.benchmarks.decompose import DecomposeBenchmark, planned
from moesvd_core.evaluation.benchmarks.inference import InferenceBenchmark
from moesvd_core.evaluation.benchmarks.layer import LayerBenchmark
from moesvd_core.evaluation.benchmarks.synthetic import ModelSize, RandomLayer, random_layer
from moesvd_core.evaluation.speed import SpeedTest, measure_speed
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import SIDES, Metric, Recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card")
CARD = torch.device("cuda")


def close(ours: Tensor, theirs: Tensor, share: float) -> None:
    """Equal up to a share of the largest entry."""
    assert float((ours.double().cpu() - theirs.double().cpu()).abs().max()) <= share * float(theirs.abs().max())


class TestCopies:
    @pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 5000, 300_000])
    def test_tensors_arrive_whole(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "STAGED", 4096)
        monkeypatch.setattr(devices, "SMALL", 100)
        source = torch.randn(size)
        there = devices.to_device(source, CARD)
        assert there.device.type == "cuda"
        assert torch.equal(devices.to_host(there), source)
        rounded = devices.copy_to_host_(torch.empty(size), there.double() / 3)
        assert torch.equal(rounded, (source.double() / 3).float())

    def test_many_large_ones_do_not_overwrite_each_other(self) -> None:
        sources = [torch.full((1 << 25,), float(number)) for number in range(4)]
        there = [devices.to_device(source, CARD) for source in sources]
        for source, each in zip(sources, there, strict=True):
            assert torch.equal(devices.to_host(each), source)

    def test_states_stay_on_the_card_while_it_has_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        states = DeviceStates(CARD, MemoryStates())
        states.put("a", (torch.ones(10, device=CARD) for _ in range(3)))
        assert [states.get("a", number).device.type for number in range(3)] == ["cuda"] * 3
        monkeypatch.setattr(devices, "SPARED", 1.0)
        states.put("a", (torch.full((10,), float(number), device=CARD) for number in range(3)))
        assert [float(states.get("a", number)[0]) for number in range(3)] == [0, 1, 2]
        assert states.get("a", 2).device.type == "cpu"


class TestProducts:
    @pytest.mark.parametrize("rows", [7, 1000])
    def test_rounded_grams_are_off_by_eleven_bits_at_most(self, rows: int) -> None:
        x_nS = torch.randn(rows, 64, device=CARD) * torch.logspace(-4, 4, 64, device=CARD)
        sum_SS = torch.zeros(64, 64, dtype=torch.float64, device=CARD)
        add_gram_(sum_SS, x_nS, rounded=True)
        exact_SS = x_nS.double().T @ x_nS.double()
        scale_SS = exact_SS.diagonal().sqrt()[:, None] * exact_SS.diagonal().sqrt()
        assert float(((sum_SS - exact_SS).abs() / scale_SS).max()) < 2**-10  # each of two factors by half a unit
        assert multiplies_rounded(torch.ones(1, dtype=torch.bfloat16, device=CARD))
        assert not multiplies_rounded(torch.ones(1, device=CARD))

    @pytest.mark.parametrize("size", [40, 600])
    def test_eigenvalues_are_counted_as_the_host_counts_them(self, size: int) -> None:
        basis = torch.linalg.qr(torch.randn(3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
        value = torch.stack([10.0 ** torch.linspace(low, 3, size, dtype=torch.float64) for low in (-9.123, -4.123, 2)])
        gram_ESS = basis @ (value[:, :, None] * basis.mT)
        expected = [products._counted(gram_SS, 1e-4) for gram_SS in gram_ESS]
        found = counts_above(gram_ESS.to(CARD), 1e-4)
        assert max(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True)) <= 1


class TestParts:
    def test_results_come_in_order_and_survive_their_streams(self) -> None:
        def work(part: int) -> Tensor:
            x = torch.full((1 << 20,), float(part), device=CARD)
            for _ in range(20):
                x = x + 0.5
            return x

        total = torch.zeros(1 << 20, device=CARD)
        for part, result in enumerate(in_parallel(work, 40, CARD)):
            total += result
            assert float(result[0]) == part + 10
        assert float(total.max()) == float(total.min()) == sum(range(40)) + 400


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "gpt_oss"])
def both(request: pytest.FixtureRequest) -> tuple[Statistics, Statistics]:
    """A tiny model's statistics, by the host and by a card."""
    chosen = Calibration(samples=24, length=32, batch=8)
    return tuple(calibrate(MemoryStream(TINY[request.param]().to(device)), tiny_tokenizer(), chosen) for device in ("cpu", "cuda"))  # type: ignore[return-value]


class TestCalibration:
    def test_statistics_are_those_of_the_host(self, both: tuple[Statistics, Statistics]) -> None:
        host, card = both
        for index, theirs in host.layers.items():
            ours = card.layers[index]
            assert ours.count_E.tolist() == theirs.count_E.tolist() and ours.tokens == theirs.tokens
            assert ours.principal_rank_E.tolist() == theirs.principal_rank_E.tolist()
            for name, value in vars(theirs).items():
                if isinstance(value, Tensor):
                    assert getattr(ours, name).device.type == "cpu", name
                    close(getattr(ours, name), value, 1e-3)

    def test_wide_experts_need_no_row_gradients(self) -> None:
        chosen = Calibration(samples=8, length=32, row_gram=False)
        host, card = (
            calibrate(MemoryStream(TINY["mixtral"]().to(device)), tiny_tokenizer(), chosen).layers[0] for device in ("cpu", "cuda")
        )
        for name in ("row_square_EN", "weighted_input_gram_EDD", "gradient_gram_EDD"):
            close(getattr(card, name), getattr(host, name), 1e-3)

    def test_a_model_of_16_bits_is_calibrated_nearly_as_on_the_host(self) -> None:
        chosen = Calibration(samples=24, length=32)
        host, card = (
            calibrate(MemoryStream(TINY["mixtral"]().bfloat16().to(device)), tiny_tokenizer(), chosen).layers[0]
            for device in ("cpu", "cuda")
        )
        for name in ("input_gram_EDD", "output_gram_EDD", "gradient_gram_EDD", "weighted_input_gram_EDD"):
            close(getattr(card, name), getattr(host, name), 0.2)  # another route or label here and there

    def test_a_pipeline_on_a_card_makes_the_same_plan(self, both: tuple[Statistics, Statistics]) -> None:
        for name in ("latent", "fisher"):
            host, card = (Pipeline(each.stream, each).plan(Recipe(name, 0.15)) for each in both)  # type: ignore[arg-type]
            assert card.ratio == pytest.approx(host.ratio, abs=0.01)
            assert card.predicted_loss == pytest.approx(host.predicted_loss, rel=0.02)


    def test_a_pipeline_that_goes_on_from_its_files_works_on_the_card(self, both: tuple[Statistics, Statistics], tmp_path: Path) -> None:
        card = both[1]
        first = Pipeline(card.stream, card, folder=tmp_path)  # type: ignore[arg-type]
        plan = first.plan(Recipe("latent", 0.15))
        again = Pipeline(card.stream, card, folder=tmp_path)  # type: ignore[arg-type]
        index = next(layer.layer for layer in plan.layers if layer.selected)
        assert again._decomposition(index, method("latent"))._metric.device.type == "cuda"
        theirs, ours = first.factors(plan, index), again.factors(plan, index)
        assert theirs is not None and ours is not None
        close(ours.input.reconstruct(), theirs.input.reconstruct(), 1e-5)


@pytest.fixture(scope="module")
def layers() -> Iterator[tuple[RandomLayer, RandomLayer]]:
    """One random layer, its weights on the host and on a card."""
    host = random_layer(96, 72, 4, tokens=2000)
    card = random_layer(96, 72, 4, tokens=2000)
    for name, value in vars(card.weights).items():
        setattr(card.weights, name, None if value is None else value.to(CARD))
    yield host, card


class TestDecomposition:
    @pytest.mark.parametrize("name", ["latent", "svd", "svd-llm", "fisher", "d2-moe", "moe-svd", "neuron-pruning", "expert-merging"])
    def test_curves_and_factors_are_those_of_the_host(self, name: str, layers: tuple[RandomLayer, RandomLayer]) -> None:
        host, card = (_decomposed(each, name) for each in layers)
        for known, found in zip(host.curves, card.curves, strict=True):
            close(torch.from_numpy(found.loss_SR), torch.from_numpy(known.loss_SR), 1e-4)
        plan = planned(host, layers[0].layer, method(name), 0.4)
        theirs, ours, kept = host.materialise(plan), card.materialise(plan), card.materialise(plan, on_host=True)
        for side in ("input", "output"):
            made, moved = (getattr(each, side).reconstruct() for each in (ours, kept))
            assert (made.device.type, moved.device.type) == ("cuda", "cpu")
            close(moved, getattr(theirs, side).reconstruct(), 2e-2)
            close(made.cpu(), moved, 1e-3)
        card.release()
        again = card.materialise(plan)
        close(again.input.reconstruct(), ours.input.reconstruct(), 1e-4)

    @pytest.mark.parametrize("kind", ["plain", "scaled", "input", "output"])
    def test_experts_worked_on_together_are_those_of_the_host(self, kind: Metric, layers: tuple[RandomLayer, RandomLayer]) -> None:
        host, card = (
            LatentBasis.both(LayerMetric(each.weights, each.layer, each.statistics, each.weights.input_END.device), kind) for each in layers
        )
        for side in SIDES:
            close(torch.from_numpy(card[side].curve.loss_SR), torch.from_numpy(host[side].curve.loss_SR), 1e-4)

    def test_random_layers_are_made_where_they_are_asked_for(self) -> None:
        sample = random_layer(64, 48, 2, tokens=100, device="cuda")
        assert {each.device.type for each in (sample.weights.input_END, sample.weights.output_EDM, *sample.held_out)} == {"cuda"}
        assert {value.device.type for value in vars(sample.statistics).values() if isinstance(value, Tensor)} == {"cpu"}


class TestSpeed:
    def test_a_gpus_experts_are_timed_by_themselves_on_tensors_that_stay(self) -> None:
        model = TINY["mixtral"]().bfloat16().eval().to(CARD)
        factored = compressed(model, model_factors(model))
        models = {"original": model, "factored": factored}
        result = measure_speed(models, SpeedTest(prompt_tokens=16, new_tokens=3, repeats=3, batch=2))
        for speed in result.values():
            assert min(speed.experts_prefill.median, speed.experts_decode.median, speed.prefill.median, speed.decode.median) > 0


class TestBenchmarks:
    def test_decompose(self) -> None:
        table = DecomposeBenchmark(128, 192, 4, methods=("svd-llm", "latent", "fisher"), device="cuda").run()
        assert torch.cuda.get_device_name() in table.title
        assert all(float(row["seconds"] or 0) > 0 for row in table.records)

    @pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
    def test_layer(self, family: str) -> None:
        settings = {"hidden": 128, "width": 64, "samples": 4, "length": 64, "batch": 2, "methods": ("latent", "fisher"), "device": "cuda"}
        table = LayerBenchmark(family=family, **settings).run()  # type: ignore[arg-type]
        assert len(table.records) == 6 and torch.cuda.get_device_name() in table.title

    @pytest.mark.parametrize("card", ["cuda", "cuda:1"])
    @pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
    def test_inference(self, family: str, card: str) -> None:
        if (torch.device(card).index or 0) >= torch.cuda.device_count():
            pytest.skip("needs a second card")
        size = ModelSize(family, hidden=128, width=192, layers=2, context=64, vocabulary=300)  # type: ignore[arg-type]
        test, calibration = SpeedTest(new_tokens=2, repeats=2), Calibration(samples=4, length=32)
        table = InferenceBenchmark(
            size=size, kept=(0.6,), batches=(1, 32), prompts=(48,), test=test, calibration=calibration, device=card
        ).run()
        assert {row["batch"] for row in table.records} == {1, 32}
        assert all(float(row[f"{kind}, of ideal"] or 0) > 0 for row in table.records for kind in ("prefill", "decode"))


def _decomposed(sample: RandomLayer, name: str) -> Decomposition:
    device = sample.weights.input_END.device
    return decompose(sample.weights, sample.layer, sample.statistics, method(name), device=device)
