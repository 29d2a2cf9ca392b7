"""The Dockerfile, what is sent to its builder, and the README's front matter say the same as the program. No image is built here."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from moesvd_core.errors import InputError
from pages.components import assets
from pages.components.settings import Settings

HOUSE = Path(__file__).parents[1]
Step = tuple[str, str]


def steps(text: str) -> list[Step]:
    """Instructions of a Dockerfile with their arguments; comments are dropped and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in joined)]


@pytest.fixture(scope="module")
def image() -> list[Step]:
    return steps((HOUSE / "Dockerfile").read_text())


@pytest.fixture(scope="module")
def environment(image: list[Step]) -> dict[str, str]:
    """What the image's processes find in their environment."""
    pairs = [pair for word, rest in image if word == "ENV" for pair in shlex.split(rest)]
    return dict(pair.split("=", 1) for pair in pairs)


@pytest.fixture(scope="module")
def front() -> dict[str, object]:
    """The README's front matter, which makes the repository a Space."""
    _, matter, _ = (HOUSE / "README.md").read_text().split("---\n", 2)
    return dict(yaml.safe_load(matter))


def only(image: list[Step], word: str) -> str:
    """The arguments of an instruction that must be there once."""
    (found,) = [rest for each, rest in image if each == word]
    return found


def copied(image: list[Step]) -> list[str]:
    """What is copied from the repository."""
    return [source for word, rest in image if word == "COPY" for source in rest.split()[:-1]]


def test_torch_is_the_version_of_the_requirements_and_a_build_for_cuda(image: list[Step]) -> None:
    pin = next(line for line in (HOUSE / "requirements.txt").read_text().splitlines() if line.startswith("torch"))
    (step,) = [rest for word, rest in image if word == "RUN" and "torch" in rest]
    assert pin in step.split()
    assert "assert torch.version.cuda" in step  # an index that serves another build fails the image, not its user


def test_nothing_runs_as_root(image: list[Step]) -> None:
    users = [(number, rest) for number, (word, rest) in enumerate(image) if word == "USER"]
    assert [rest for _, rest in users] == ["1000"]
    assert users[0][0] > max(number for number, (word, _) in enumerate(image) if word in ("RUN", "COPY"))
    assert any("--uid 1000" in rest for word, rest in image if word == "RUN")
    assert json.loads(only(image, "CMD")) == ["python", "app.py"]


def test_one_port_everywhere(image: list[Step], environment: dict[str, str], front: dict[str, object]) -> None:
    assert {only(image, "EXPOSE"), environment["MOESVD_PORT"], str(front["app_port"])} == {str(Settings.port)}


def test_a_container_is_reached_from_outside_with_a_password_or_as_a_demo_only(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match="MOESVD_PASSWORD"):
        Settings.read([], environment)
    assert Settings.read([], {**environment, "MOESVD_PASSWORD": "geheim"}).logins == (("moesvd", "geheim"),)
    assert Settings.read([], {**environment, "MOESVD_PUBLIC_DEMO": "1"}).public_demo


def test_runs_and_the_cache_of_the_hub_outlive_the_container(image: list[Step], environment: dict[str, str]) -> None:
    settings = Settings.read([], {**environment, "MOESVD_PASSWORD": "geheim"})
    assert json.loads(only(image, "VOLUME")) == [str(settings.runs), environment["HF_HOME"]]
    owned = next(rest for word, rest in image if word == "RUN" and "useradd" in rest).split()
    assert {str(settings.runs), environment["HF_HOME"], "/data/models"} <= set(owned)
    assert settings.models == (Path(only(image, "WORKDIR")) / "assets", Path("/data/models"))


@pytest.fixture
def health() -> Iterator[HTTPServer]:
    """A server whose `/healthz` answers with the number in `status`."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status if self.path == "/healthz" else 404)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_asks_the_explorer(image: list[Step], health: HTTPServer, status: int, code: int, tmp_path: Path) -> None:
    assert any(getattr(route, "path", "") == "/healthz" for route in assets.routes(tmp_path))
    health.status = status  # type: ignore[attr-defined]
    python, *rest = json.loads(only(image, "HEALTHCHECK").partition("CMD ")[2])
    assert python == "python"
    done = subprocess.run([sys.executable, *rest], env={**os.environ, "MOESVD_PORT": str(health.server_port)}, capture_output=True)
    assert done.returncode == code


def test_the_builder_is_sent_what_is_copied_and_nothing_else(image: list[Step]) -> None:
    everything, *exceptions = [line for line in (HOUSE / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert everything == "*"
    assert sorted(line.removeprefix("!") for line in exceptions if line.startswith("!")) == sorted(copied(image))
    assert [line for line in exceptions if not line.startswith("!")] == ["**/__pycache__"]


@pytest.mark.slow
def test_what_is_copied_is_all_that_the_explorer_needs(image: list[Step], tmp_path: Path) -> None:
    for name in copied(image):
        if (HOUSE / name).is_dir():
            shutil.copytree(HOUSE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "demo-run"))
        else:
            shutil.copy(HOUSE / name, tmp_path / name)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = subprocess.run([sys.executable, "app.py", "--help"], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    assert "--public-demo" in told.stdout
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    named = [project["project"]["readme"], *project["project"]["license-files"]]
    named += project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"]
    assert all((tmp_path / name).is_file() for name in named)


def test_the_repository_is_a_space(front: dict[str, object]) -> None:
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
    assert front["sdk"] == "docker"
    assert str(front["license"]) == str(project["license"]).lower()
    assert len(str(front["short_description"])) <= 60  # more is refused by the hub
