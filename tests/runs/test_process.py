"""A process is known by its birth, not by its number alone."""

import os
import subprocess
import sys
import time
from dataclasses import replace

from moesvd_core.runs.process import SILENCE_SECONDS, birth_of, is_alive, this_process


def test_this_process_is_alive() -> None:
    assert is_alive(this_process(), heartbeat=0.0)


def test_another_process_with_the_same_number_is_not_the_same() -> None:
    me = this_process()
    assert not is_alive(replace(me, birth=me.birth - 1), heartbeat=time.time())


def test_a_zombie_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has fetched it yet
    assert birth_of(process.pid) is None
    process.wait()
    assert birth_of(process.pid) is None


def test_on_another_machine_the_heartbeat_decides() -> None:
    elsewhere = replace(this_process(), machine="another")
    assert is_alive(elsewhere, heartbeat=time.time())
    assert not is_alive(elsewhere, heartbeat=time.time() - SILENCE_SECONDS - 1)
