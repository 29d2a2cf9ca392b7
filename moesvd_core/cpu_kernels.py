"""What a CPU runs (C, compiled where it runs): the counterpart of `kernels.py`, for processors with AVX-512.

torch's products of few rows spend their time on being called, and bring each matrix into an order of their own first. These read matrices
as they stand, those of all experts in one call, whatever their shapes. Nothing is built ahead: like Triton's, the functions are compiled
for this very processor when they are first wanted, in a folder that is gone afterwards, by the C compiler of the system. Where there is
none, or the processor is another one, torch computes instead, as it does where the environment says `MOESVD_CPU_KERNELS=0`.

An export carries no copy of this file: what is downloaded should not call a compiler.
"""

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from threading import Lock

import torch

SWITCH = "MOESVD_CPU_KERNELS"
"""The environment's word that turns the functions off."""

_COMPILING = Lock()
_ADDRESS, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "arrange": [_ADDRESS, _LONG, _LONG, _LONG, *[_ADDRESS] * 4],
    "combine": [_ADDRESS, _LONG, _ADDRESS, _ADDRESS, _ADDRESS, _LONG, _LONG, _LONG, _INT],
    "in_order": [_ADDRESS, _LONG, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _LONG, _LONG, _INT, _INT],
    "times": [_ADDRESS, _LONG, _LONG, _ADDRESS, _LONG, _LONG, _LONG, _ADDRESS, _INT],
    "multiply": [_ADDRESS, _LONG, _ADDRESS, _ADDRESS, _INT, _INT, _INT, _ADDRESS, _LONG, _ADDRESS, _LONG, _INT],
}


def cpu_library() -> ctypes.CDLL | None:
    """The functions, compiled at the first call (a second or two) by one thread; None where torch computes instead."""
    with _COMPILING:
        return _made_once()


def compiled_library() -> ctypes.CDLL | None:
    """Compile the functions; None where that cannot be done, or where they would not be used.

    Processors with matrix units of their own (AMX) do better with torch's products, which use them.
    """
    if os.environ.get(SWITCH) == "0" or platform.system() != "Linux" or platform.machine() != "x86_64":
        return None
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or torch.cpu._is_amx_tile_supported():
        return None
    reasons = []
    for name in dict.fromkeys([os.environ.get("CC") or "cc", "gcc"]):
        try:
            compiler = shlex.split(name)
            if shutil.which(compiler[0]) is None:
                continue
            library = _compiled(compiler)
        except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
            said = str(getattr(error, "stderr", None) or error).strip().splitlines()
            reasons.append(f"{name}: {said[0] if said else type(error).__name__}")
            continue
        for function, arguments in _ARGUMENTS.items():
            getattr(library, function).argtypes = arguments
        return library
    if reasons:
        slow = f"experts are slower on this CPU, since what multiplies there could not be compiled ({SWITCH}=0 does without)"
        warnings.warn(f"{slow}: {reasons[0]}", stacklevel=2)
    return None


_made_once = cache(compiled_library)


def _compiled(compiler: list[str]) -> ctypes.CDLL:
    """Threads are those that torch has: the names of its OpenMP are left open, to be found in this process.

    Raises:
        OSError: there is no such compiler, or what it made cannot be loaded.
        subprocess.SubprocessError: it refuses, or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix="moesvd-") as folder:
        made = Path(folder, "experts.so")
        source, thing = Path(__file__).with_suffix(".c"), made.with_suffix(".o")
        for command in (["-O3", "-march=native", "-fopenmp", "-fPIC", "-c", source, "-o", thing], ["-shared", thing, "-o", made]):
            subprocess.run([*compiler, *map(str, command)], check=True, capture_output=True, text=True, errors="replace", timeout=120)  # noqa: S603 - the user's
        return ctypes.CDLL(str(made), os.RTLD_NOW)
