"""What holds for every test: no network, and threads that do not spin beside those of another test process; and how a CPU computes."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that has no kernels of ours."""
    from moesvd_core import cpu_tiles

    monkeypatch.setattr(cpu_tiles, "cpu_library", lambda: None)


@pytest.fixture(params=["kernels", "torch"])
def computed_by(request: pytest.FixtureRequest) -> str:
    """For what must hold either way; skipped for kernels where there are none."""
    from moesvd_core.cpu_kernels import cpu_library

    way: str = request.param
    if way == "torch":
        request.getfixturevalue("by_torch")
    elif cpu_library() is None:
        pytest.skip("this processor has no kernels of ours, or there is no C compiler")
    return way
