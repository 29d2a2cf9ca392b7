"""Model folders come from strangers: what is damaged, missing or unsafe ends in a typed error that names it, and nothing of it is run."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from moesvd_core.architectures import hub_download
from moesvd_core.architectures.files import STAGED_BYTES, ModelFiles, resolve_model
from moesvd_core.errors import CheckpointError, InputError, UnsupportedModelError

torch.set_num_threads(1)

INDEX = "model.safetensors.index.json"
SHARDS = {"one.safetensors": ["a", "b"], "two.safetensors": ["c"]}


def tensors() -> dict[str, torch.Tensor]:
    """Three tensors of different form and type."""
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(6, 5, generator=generator),
        "b": torch.randn(8, generator=generator).bfloat16(),
        "c": torch.randint(0, 9, (2, 3, 4), generator=generator),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded model folder, as far as `ModelFiles` looks."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "mixtral"}')
    for name, keys in SHARDS.items():
        save_file({key: tensors()[key] for key in keys}, path / name)
    write_index(path, {key: name for name, keys in SHARDS.items() for key in keys})
    return path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def point(folder: Path, name: str) -> None:
    """Let the index say that tensor "c" is in the file `name`."""
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": name})


class TestReading:
    def test_every_tensor_is_read_as_it_was_written(self, folder: Path) -> None:
        files = ModelFiles.open(folder)
        assert files.weight_map == {"a": folder / "one.safetensors", "b": folder / "one.safetensors", "c": folder / "two.safetensors"}
        assert files.bytes == 120 + 16 + 192
        for key, tensor in tensors().items():
            assert files.header(key) == (tensor.dtype, tuple(tensor.shape))
            assert torch.equal(files.read(key, finite=True), tensor)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float8_e4m3fn, torch.float16, torch.float64, torch.complex64])
    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (3, 5)])
    def test_every_type_and_form_is_read(self, dtype: torch.dtype, shape: tuple[int, ...], folder: Path) -> None:
        tensor = torch.rand(shape).mul(4).to(dtype)
        save_file({"x": tensor, "y": torch.ones(3)}, folder / "model.safetensors")
        found = ModelFiles.open(folder).read("x")
        assert found.dtype == dtype and torch.equal(found.to(torch.complex64), tensor.to(torch.complex64))

    def test_a_single_file_wins_over_an_index_as_in_transformers(self, folder: Path) -> None:
        save_file({"x": torch.ones(2)}, folder / "model.safetensors")
        assert list(ModelFiles.open(folder).weight_map) == ["x"]

    @pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 5), (3, 3)])
    def test_a_slice_is_rows_of_the_first_dimension(self, start: int, stop: int, folder: Path) -> None:
        assert torch.equal(ModelFiles.open(folder).read_slice("a", start, stop), tensors()["a"][start:stop])

    @pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 7), (4, 3)])
    def test_rows_that_are_not_there_are_refused(self, start: int, stop: int, folder: Path) -> None:
        with pytest.raises(CheckpointError, match=rf"rows {start}:{stop} of tensor 'a' asked for, it has 6"):
            ModelFiles.open(folder).read_slice("a", start, stop)

    def test_reading_into_a_place_converts_its_type(self, folder: Path) -> None:
        wide = torch.randn(5, STAGED_BYTES // 8)  # rows of half the staged size: several pieces, the last one smaller
        save_file({"wide": wide}, folder / "model.safetensors")
        for target in (torch.empty(wide.shape), torch.empty(wide.shape, dtype=torch.bfloat16), torch.empty(wide.shape[::-1]).T):
            ModelFiles.open(folder).read_into("wide", target)
            assert torch.equal(target, wide.to(target.dtype))

    def test_a_place_of_another_form_is_refused(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match=r"one\.safetensors: tensor 'a' has shape \[6, 5\].*asks for \[5, 6\]"):
            ModelFiles.open(folder).read_into("a", torch.empty(5, 6))

    def test_an_unknown_tensor_is_named(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match="no weights file holds tensor 'z'"):
            ModelFiles.open(folder).header("z")

    def test_no_file_stays_mapped_or_open(self, folder: Path) -> None:
        files = ModelFiles.open(folder)
        kept = [files.read(key) for key in files.weight_map]
        assert kept and str(folder) not in Path("/proc/self/maps").read_text()
        assert not any(str(folder) in os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


class TestDamage:
    def test_a_shard_cut_anywhere_is_named(self, folder: Path) -> None:
        shard = folder / "one.safetensors"
        content = shard.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        for size in sorted({*range(header), *random.Random(0).choices(range(len(content)), k=200)}):
            shard.write_bytes(content[:size])
            with pytest.raises(CheckpointError, match=r"one\.safetensors"):
                ModelFiles.open(folder)

    def test_bytes_after_the_last_tensor_are_refused(self, folder: Path) -> None:
        with (folder / "two.safetensors").open("ab") as stream:
            stream.write(b"x")
        with pytest.raises(CheckpointError, match=r"two\.safetensors: tensor 'c' ends at byte"):
            ModelFiles.open(folder)

    def test_a_shard_that_is_cut_after_opening_is_named_when_read(self, folder: Path) -> None:
        files = ModelFiles.open(folder)
        os.truncate(folder / "two.safetensors", 100)
        with pytest.raises(CheckpointError, match=r"two\.safetensors: tensor 'c' ends after \d+ of 192 bytes"):
            files.read("c")

    def test_a_shard_that_is_deleted_after_opening_is_named_when_read(self, folder: Path) -> None:
        files = ModelFiles.open(folder)
        (folder / "two.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"two\.safetensors: tensor 'c' cannot be read"):
            files.read("c")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_one_value_that_is_not_finite_is_found_wherever_it_stands(self, dtype: torch.dtype, value: float, folder: Path) -> None:
        for size in (1, 7, 1000):
            for position in {0, size // 2, size - 1}:
                tensor = torch.randn(size).to(dtype)
                tensor[position] = value
                save_file({"x": tensor}, folder / "model.safetensors")
                files = ModelFiles.open(folder)
                assert files.read("x").shape == (size,)
                for read in (lambda f: f.read("x", finite=True), lambda f: f.read_into("x", torch.empty(f.header("x")[1]))):
                    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'x' holds NaN or Inf"):
                        read(files)

    def test_large_finite_values_are_no_fault(self, folder: Path) -> None:
        save_file({"x": torch.full((1000,), torch.finfo(torch.float32).max)}, folder / "model.safetensors")
        assert ModelFiles.open(folder).read("x", finite=True).isfinite().all()

    def test_a_missing_shard_is_named(self, folder: Path) -> None:
        (folder / "two.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"two\.safetensors: is missing"):
            ModelFiles.open(folder)

    @pytest.mark.parametrize(
        ("weight_map", "reason"),
        [
            ({"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"}, r"one\.safetensors: tensor 'c' is not in this file"),
            ({"a": "one.safetensors", "c": "two.safetensors"}, r"one\.safetensors: tensor 'b' is in this file, but the index omits it"),
            ({"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors"}, r"tensor 'd' is not in"),
            ({}, "must map tensors to files"),
            ([["a", "one.safetensors"]], "must map tensors to files"),
            (None, "must map tensors to files"),
            ({"a": 1}, "tensor 'a' is said to be in 1"),
        ],
    )
    def test_an_index_that_disagrees_with_the_files_is_refused(self, weight_map: Any, reason: str, folder: Path) -> None:
        write_index(folder, weight_map)
        with pytest.raises(CheckpointError, match=reason):
            ModelFiles.open(folder)

    def test_a_tensor_in_two_shards_is_refused(self, folder: Path) -> None:
        save_file({"c": tensors()["c"], "a": tensors()["a"]}, folder / "two.safetensors")
        with pytest.raises(CheckpointError, match=r"two\.safetensors: tensor 'a' is in this file, but the index names another"):
            ModelFiles.open(folder)

    @pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"model_type": 3}', '{"model_type": ""}', "\x00", '{"a":1,"a":2}'])
    @pytest.mark.parametrize("name", ["config.json", INDEX])
    def test_a_damaged_json_file_is_named(self, name: str, content: str, folder: Path) -> None:
        (folder / name).write_text(content)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            ModelFiles.open(folder)

    def test_flipped_bits_of_configuration_and_index_never_crash(self, folder: Path) -> None:
        draw = random.Random(1)
        for name in ("config.json", INDEX):
            content = (folder / name).read_bytes()
            for bit in draw.sample(range(8 * len(content)), 150):
                flipped = bytearray(content)
                flipped[bit // 8] ^= 1 << bit % 8
                (folder / name).write_bytes(flipped)
                try:
                    files = ModelFiles.open(folder)
                except CheckpointError as error:
                    assert str(folder) in str(error)
                else:
                    assert set(files.weight_map) == set(tensors())
            (folder / name).write_bytes(content)

    @pytest.mark.parametrize("name", ["config.json", "one.safetensors", INDEX])
    def test_a_folder_instead_of_a_file_is_refused(self, name: str, folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(CheckpointError, match="is not a regular file"):
            ModelFiles.open(folder)

    def test_a_pipe_instead_of_a_file_is_refused_without_waiting_for_it(self, folder: Path) -> None:
        (folder / "two.safetensors").unlink()
        os.mkfifo(folder / "two.safetensors")
        with pytest.raises(CheckpointError, match="is not a regular file"):
            ModelFiles.open(folder)

    def test_a_folder_without_weights_or_configuration_says_what_is_missing(self, folder: Path) -> None:
        (folder / INDEX).unlink()
        with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor model\.safetensors\.index"):
            ModelFiles.open(folder)
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=rf"no config\.json in {folder}: this is no model folder; give the folder that holds one"):
            ModelFiles.open(folder)

    def test_a_snapshot_of_the_hub_without_configuration_is_to_be_fetched_again(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        (folder.parent / "blobs").mkdir()
        (folder.parent / "snapshots").mkdir()
        with pytest.raises(CheckpointError, match=r"config\.json: is missing; fetch the model again"):
            ModelFiles.open(folder.rename(folder.parent / "snapshots" / "0123"))

    @pytest.mark.parametrize("path", ["nowhere", "config.json", "a\0b", ""])
    def test_what_is_no_folder_is_refused(self, path: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        (folder / INDEX).unlink()
        with pytest.raises(CheckpointError, match="folder"):
            ModelFiles.open(path)


TRAVERSALS = {
    "parent": "../secret.safetensors",
    "absolute": "{outside}/secret.safetensors",
    "through a folder": "sub/../../secret.safetensors",
    "backslash": "..\\secret.safetensors",
    "encoded": "%2e%2e/secret.safetensors",
    "null byte": "one.safetensors\0/../../secret.safetensors",
    "home": "~/secret.safetensors",
    "url": "file:///secret.safetensors",
    "itself": INDEX,
    "this folder": ".",
    "parent folder": "..",
    "nothing": "",
    "hidden": ".safetensors",
    "other type": "one.bin",
}


class TestMalice:
    @pytest.mark.parametrize("form", TRAVERSALS)
    def test_an_index_cannot_name_a_file_outside_the_folder_or_itself(self, form: str, folder: Path) -> None:
        save_file({"c": tensors()["c"]}, folder.parent / "secret.safetensors")
        (folder / "sub").mkdir()
        point(folder, TRAVERSALS[form].format(outside=folder.parent))
        with pytest.raises(CheckpointError, match=r"index\.json: tensor 'c' is said to be in .* not the plain name"):
            ModelFiles.open(folder)

    @pytest.mark.parametrize("name", ["config.json", INDEX, "two.safetensors", "model.safetensors", "tokenizer.json", "special.txt"])
    @pytest.mark.parametrize("relative", [True, False])
    def test_a_link_out_of_the_folder_is_refused(self, name: str, relative: bool, folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../outside" if relative else outside)
        with pytest.raises(CheckpointError, match=r"points outside the model folder"):
            ModelFiles.open(folder)

    def test_a_link_to_a_folder_outside_is_refused(self, folder: Path) -> None:
        (folder / "additional_chat_templates").symlink_to(folder.parent)
        with pytest.raises(CheckpointError, match=r"additional_chat_templates: points outside the model folder"):
            ModelFiles.open(folder)

    def test_a_link_through_a_linked_folder_is_refused(self, folder: Path) -> None:
        (folder / "two.safetensors").rename(folder.parent / "two.safetensors")
        (folder / "door").symlink_to(folder.parent)
        (folder / "two.safetensors").symlink_to("door/two.safetensors")
        with pytest.raises(CheckpointError, match="points outside the model folder"):
            ModelFiles.open(folder)

    @pytest.mark.parametrize("target", ["two.safetensors", "nowhere"])
    def test_a_link_to_itself_or_to_nothing_is_refused(self, target: str, folder: Path) -> None:
        (folder / "two.safetensors").unlink()
        (folder / "two.safetensors").symlink_to(target)
        with pytest.raises(CheckpointError, match=r"two\.safetensors"):
            ModelFiles.open(folder)

    def test_a_link_within_the_folder_is_fine(self, folder: Path) -> None:
        (folder / "two.safetensors").rename(folder / "blob")
        (folder / "two.safetensors").symlink_to("blob")
        assert torch.equal(ModelFiles.open(folder).read("c"), tensors()["c"])

    def test_the_links_of_the_hubs_cache_are_followed_to_its_own_blobs_only(self, folder: Path) -> None:
        repository = folder.parent / "models--x--y"
        snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            shutil.copy(file, blobs / f"blob-{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
        assert torch.equal(ModelFiles.open(snapshot).read("c"), tensors()["c"])
        (blobs / "blob-two.safetensors").unlink()
        (blobs / "blob-two.safetensors").symlink_to(folder / "two.safetensors")
        with pytest.raises(CheckpointError, match="points outside the model folder"):
            ModelFiles.open(snapshot)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "model.pkl"])
    def test_pickled_weights_are_refused_unopened(self, name: str, folder: Path) -> None:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        trap = folder.parent / "sprung"
        (folder / name).write_bytes(pickle.dumps(Trap(trap)))
        with pytest.raises(CheckpointError, match=rf"{name}: pickled weights can run code"):
            ModelFiles.open(folder)
        assert not trap.exists()
        pickle.loads((folder / name).read_bytes())  # noqa: S301 - the trap works, so the test can fail
        assert trap.exists()

    def test_pickled_weights_under_the_name_of_a_shard_are_refused_unopened(self, folder: Path) -> None:
        trap = folder.parent / "sprung"
        (folder / "two.safetensors").write_bytes(pickle.dumps(Trap(trap)))
        with pytest.raises(CheckpointError, match=r"two\.safetensors"):
            ModelFiles.open(folder)
        assert not trap.exists()

    def test_an_index_of_pickled_files_is_refused(self, folder: Path) -> None:
        (folder / INDEX).rename(folder / "pytorch_model.bin.index.json")
        (folder / "pytorch_model-00001-of-00001.bin").write_bytes(b"")
        with pytest.raises(CheckpointError, match="pickled weights"):
            ModelFiles.open(folder)

    def test_code_that_a_model_brings_along_is_refused_and_never_run(self, folder: Path) -> None:
        trap = bring_code(folder, "unheard_of")
        for opened in (lambda: ModelFiles.open(folder), lambda: resolve_model(folder)):
            with pytest.raises(UnsupportedModelError, match="'unheard_of' is not part of transformers and brings code of its own"):
                opened()
        assert ModelFiles.open(folder, allow_remote_code=True).config["model_type"] == "unheard_of"
        assert resolve_model(folder, allow_remote_code=True) == folder
        assert not trap.exists()

    @pytest.mark.parametrize("model_type", ["mixtral", "deepseek"])
    def test_code_beside_a_model_that_is_native_does_no_harm(self, model_type: str, folder: Path) -> None:
        trap = bring_code(folder, model_type)
        assert ModelFiles.open(folder).config["model_type"] == model_type
        assert not trap.exists()


class Trap:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def bring_code(folder: Path, model_type: str) -> Path:
    """Give the folder code of its own; returns the file that appears when it is run."""
    trap = folder.parent / "sprung"
    (folder / "modeling_x.py").write_text(f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n")
    auto_map = {"AutoConfig": "modeling_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": auto_map}))
    return trap


class TestResolving:
    def test_a_folder_is_resolved(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder.parent)
        assert resolve_model("model") == resolve_model(folder) == resolve_model("./model/../model") == folder.resolve()

    @pytest.mark.parametrize(
        "name", ["../model", "{outside}", "sub/../../model", "door", "door/../model", "//{outside}", "sub/../door/."], ids=str
    )
    def test_nothing_outside_the_declared_roots_is_accepted(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = folder.parent / "root"
        (root / "sub").mkdir(parents=True)
        (root / "door").symlink_to(folder)
        monkeypatch.chdir(root)
        with pytest.raises(InputError, match="outside the folders that models may come from"):
            resolve_model(name.format(outside=folder), roots=[root])

    def test_a_folder_within_the_roots_is_accepted(self, folder: Path) -> None:
        assert resolve_model(folder, roots=[folder.parent / "other", folder.parent]) == folder

    @pytest.mark.parametrize(
        "name",
        ["", "..", "~/model", "..\\model", "%2e%2e/model", "file:///etc", "a/b/c", "x\0y", "https://hub/x", "-x/y", "a--b/c", "x" * 5000],
    )
    def test_what_is_neither_a_folder_nor_a_name_of_the_hub_is_refused(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError):
            resolve_model(name, roots=[tmp_path / "models"])

    def test_a_file_is_refused(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match="is not a folder"):
            resolve_model(folder / "config.json")

    def test_the_hub_is_asked_for_safetensors_only_and_for_the_configuration_first(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []

        def snapshot(name: str, *, dry_run: bool = False, **kinds: Any) -> Any:
            return [] if dry_run else asked.append(kinds) or folder

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *given: None)
        monkeypatch.setattr(hub_download, "hf_hub_download", lambda *given: asked.append(given) or folder / "config.json")
        monkeypatch.setattr(hub_download, "snapshot_download", snapshot)
        assert resolve_model("owner/name") == folder
        assert asked[0] == ("owner/name", "config.json")
        assert not {"*", "*.bin", "*.py", "*.pt"} & set(asked[1]["allow_patterns"])
        bring_code(folder, "unheard_of")
        with pytest.raises(UnsupportedModelError):
            resolve_model("owner/name")
        assert len(asked) == 3  # refused before the weights were asked for
        resolve_model("owner/name", allow_remote_code=True)
        assert "*.py" in asked[-1]["allow_patterns"]

    def test_a_hub_that_cannot_deliver_ends_in_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*given: Any) -> Path:
            raise OSError("no such repository\nsecond line")

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
        with pytest.raises(CheckpointError, match=r"'owner/name' is no local folder and cannot be fetched .*no such repository") as raised:
            resolve_model("owner/name")
        assert "\n" not in str(raised.value)


def test_a_saved_model_opens_and_agrees_with_the_library(tmp_path: Path) -> None:
    files = ModelFiles.open(save_tiny("mixtral", tmp_path))
    expected = load_file(tmp_path / "model.safetensors")
    assert set(files.weight_map) == set(expected)
    assert all(torch.equal(files.read(key, finite=True), value) for key, value in expected.items())
