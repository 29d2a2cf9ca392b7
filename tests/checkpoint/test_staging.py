"""A folder is whole or not there, also when its maker is killed at any moment."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_factors import model_factors
from tiny_models import TINY, save_tiny

from moesvd_core.architectures.files import ModelFiles
from moesvd_core.checkpoint.export import export_streamed
from moesvd_core.checkpoint.staging import FACTS, discard, staged
from moesvd_core.errors import InputError, ResourceError

_EXPORTS = """
import os, shutil, signal, sys
import torch
from tiny_factors import model_factors
from tiny_models import TINY
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.checkpoint.export import export_streamed
from moesvd_core.checkpoint.verify import verify
torch.set_num_threads(1)
factors = {layer.index: found for layer, found in model_factors(TINY["mixtral"]())}
files, out, times = ModelFiles.open(sys.argv[1]), sys.argv[2], int(sys.argv[3])
total = 0

def export(moment):
    "Counts the calls of Python functions and ends like a killed process at the given one."
    global total
    total = 0
    def count(frame, event, argument):
        global total
        total += event == "call"
        if total == moment:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(count)
    export_streamed(files, lambda layer: factors[layer.index], out)
    sys.setprofile(None)

export(-1)
shutil.rmtree(out)
for step in range(times):
    if os.fork() == 0:
        export(total * (step + 1) // times - step % 7)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    names = [name for name in os.listdir(os.path.dirname(out)) if not name.startswith(".")]
    if names:
        verify(out)
        shutil.rmtree(out)
    print(code, *names, flush=True)
"""


def test_killed_at_any_moment_an_export_is_not_there_or_whole(tmp_path: Path) -> None:
    source = save_tiny("mixtral", tmp_path / "source")
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _EXPORTS, source, outputs / "out", "24"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 24
    assert lines.count(str(-signal.SIGKILL.value)) >= 20
    factors = {layer.index: found for layer, found in model_factors(TINY["mixtral"]())}
    export_streamed(ModelFiles.open(source), lambda layer: factors[layer.index], outputs / "out")
    assert [path.name for path in outputs.iterdir()] == ["out"]


def test_an_earlier_export_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out) as folder:
        (folder / FACTS).write_text("first")
    with pytest.raises(RuntimeError), staged(out, overwrite=True) as folder:
        (folder / FACTS).write_text("half")
        raise RuntimeError
    assert (out / FACTS).read_text() == "first"
    with staged(out, overwrite=True) as folder:
        (folder / FACTS).write_text("second")
        assert (out / FACTS).read_text() == "first"
    assert (out / FACTS).read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_makes_the_folders_above_and_takes_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "out").mkdir(parents=True)
    for destination in (tmp_path / "a" / "b" / "out", tmp_path / "c" / "d" / "out"):
        with staged(destination) as folder:
            (folder / FACTS).write_text("x")
        assert (destination / FACTS).read_text() == "x"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((ResourceError, InputError), match="file"), staged(tmp_path / "file" / "out"):
        pass


def test_two_at_once_leave_each_other_s_work_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="holds an earlier export"), staged(out) as first:
        (first / FACTS).write_text("first")
        with staged(out) as second:
            (second / FACTS).write_text("second")
            assert (first / FACTS).read_text() == "first"
        assert (out / FACTS).read_text() == "second"
    assert (out / FACTS).read_text() == "second"
    with staged(out, overwrite=True) as first:
        (first / FACTS).write_text("third")
        discard(out)
    assert (out / FACTS).read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    killed = f"""
import os, signal, sys
from pathlib import Path
from moesvd_core.checkpoint.staging import staged
with staged(Path({str(tmp_path / "out")!r})) as folder:
    (folder / "half").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "half").exists()
    for name in (".out.partial", ".out.12.34.replaced.partial", ".outer.12.34.partial", ".out.final.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.1.2.partial").symlink_to(tmp_path / ".outer.12.34.partial")
    with staged(tmp_path / "out") as folder:
        (folder / FACTS).write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".outer.12.34.partial", ".out.final.partial", ".out.1.2.partial"}


def test_only_what_concerns_the_destination_is_told_of_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="elsewhere"), staged(out):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(OSError, match="Input/output error"), staged(out):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(ResourceError, match="out cannot be written: Permission denied"), staged(out) as folder:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / "model.safetensors"))
    with pytest.raises(ResourceError, match="out cannot be written: the disk is full"), staged(out):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "elsewhere"))
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_is_back_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out) as folder:
        (folder / FACTS).write_text("first")
    with pytest.raises(ResourceError, match="out cannot be written"), staged(out, overwrite=True) as folder:
        shutil.rmtree(folder)
    assert (out / FACTS).read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
