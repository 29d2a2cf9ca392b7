"""Who can reach the server, and what may be named in it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from runs.run_helpers import new_run
from starlette.applications import Starlette
from starlette.testclient import TestClient

from moesvd_core.errors import InputError
from pages import model
from pages.components import assets
from pages.components.context import Context
from pages.components.places import find_model, find_text, model_name, model_names
from pages.components.session import ViewState
from pages.components.settings import LOGINS_VARIABLE, PASSWORD_VARIABLE, Settings, is_loopback

DEMO = Path(__file__).parents[2] / "assets"


def test_it_listens_on_this_machine_only() -> None:
    settings = Settings.read([], {})
    assert (settings.host, settings.logins, settings.remote_code) == ("127.0.0.1", (), False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])  # noqa: S104 - refused here
def test_a_public_address_needs_a_password(host: str) -> None:
    with pytest.raises(InputError, match=PASSWORD_VARIABLE):
        Settings.read(["--host", host], {})
    with pytest.raises(InputError, match=PASSWORD_VARIABLE):
        Settings.read([], {"MOESVD_HOST": host, PASSWORD_VARIABLE: ""})
    assert Settings.read(["--host", host], {PASSWORD_VARIABLE: "geheim"}).logins == (("moesvd", "geheim"),)


def test_every_person_has_a_login_of_their_own() -> None:
    environment = {PASSWORD_VARIABLE: "geheim", "MOESVD_USER": "chief", LOGINS_VARIABLE: "ann:a:b\n bob:c"}
    assert Settings.read(["--host", "::"], environment).logins == (("chief", "geheim"), ("ann", "a:b"), ("bob", "c"))


@pytest.mark.parametrize(("logins", "words"), [
    ("ann:secret bob", "login 2 of MOESVD_LOGINS must be name:password"),
    ("ann:", "login 1"), (":secret", "login 1"), ("<b>:secret", "login 1"), ("ann:secret ann:other", "ann is given 2 times"),
])
def test_a_login_that_is_none_is_refused_without_telling_passwords(logins: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        Settings.read([], {LOGINS_VARIABLE: logins})
    assert "secret" not in str(refused.value)


def test_loopback_by_name_and_number() -> None:
    assert [host for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1", "0.0.0.0") if is_loopback(host)] == [  # noqa: S104
        "localhost", "127.0.0.1", "127.8.8.8", "::1",
    ]


def test_the_environment_names_folders_and_flags_win(tmp_path: Path) -> None:
    environment = {"MOESVD_RUNS": "elsewhere", "MOESVD_MODELS": "a:b", "MOESVD_PORT": "8000"}
    settings = Settings.read(["--runs", str(tmp_path)], environment)
    assert (settings.runs, settings.models, settings.port) == (tmp_path, (Path("a"), Path("b")), 8000)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_the_demo_model_is_found_wherever_the_server_is_started(elsewhere: bool, tmp_path: Path) -> None:
    code = "from pages.components.settings import Settings; print(Settings().models[0])"
    where = tmp_path if elsewhere else DEMO.parent
    environment = {**os.environ, "PYTHONPATH": str(DEMO.parent)}
    told = subprocess.run([sys.executable, "-c", code], cwd=where, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(told.strip()) == (DEMO if elsewhere else Path("assets"))


def test_a_port_out_of_bounds_is_refused() -> None:
    with pytest.raises(InputError, match="got 70000"):
        Settings.read(["--port", "70000"], {})


def test_a_folder_of_models_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "nope", tmp_path / "file"):
        with pytest.raises(InputError, match=f"got {wrong}: make it, or name another with --models"):
            Settings.read(["--models", str(tmp_path), str(wrong)], {})
    assert Settings.read(["--models", str(tmp_path)], {"MOESVD_MODELS": "elsewhere"}).models == (tmp_path,)


def test_a_public_demo_needs_no_password_and_starts_nothing(tmp_path: Path) -> None:
    settings = Settings.read(["--host", "0.0.0.0", "--public-demo", "--runs", str(tmp_path)], {})  # noqa: S104 - a demo
    assert settings.logins == ()
    context, run = Context(settings), new_run(tmp_path)
    for ask in (lambda: context.client.submit(run, "analyze"), lambda: context.client.cancel(run), lambda: context.client.resume(run)):
        with pytest.raises(InputError, match="public demo"):
            ask()
    assert context.client.status(run).jobs == ()
    assert context.find_model("demo-moe").endswith("demo-moe")
    with pytest.raises(InputError, match="public demo"):
        context.find_model("owner/name")  # nobody's visitors make this machine fetch
    with pytest.raises(InputError, match="public demo"):
        model._analyse(context)(ViewState(), "demo-moe", ["auto"], False)
    assert [each.name for each in tmp_path.iterdir() if each.is_dir() and not each.name.startswith(".")] == [run.path.name]
    Context(replace(settings, public_demo=False, host="127.0.0.1")).require_rights()


def test_a_space_is_shown_in_frames_of_the_hub_and_nothing_else_is(tmp_path: Path) -> None:
    for environment, frames in (({}, "frame-ancestors 'self'"), ({"SPACE_ID": "a/b"}, "frame-ancestors 'self' https://huggingface.co")):
        kwargs = assets.app_kwargs(tmp_path, Settings.read([], environment).frames)
        client = TestClient(Starlette(routes=kwargs["routes"], middleware=kwargs["middleware"]))
        assert client.get("/healthz").headers["content-security-policy"].endswith(f"; {frames}")


# -- models and texts -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    """Declared folders: the shipped assets, and one with links and texts; beside them a secret."""
    declared = tmp_path / "declared"
    declared.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (declared / "own.txt").write_text("text")
    (declared / "link.txt").symlink_to(tmp_path / "secret.txt")
    (declared / "out").symlink_to(tmp_path)
    return [DEMO, declared]


def test_the_demo_model_is_listed_first_and_found_by_its_name(roots: list[Path]) -> None:
    assert model_names(roots)[0] == "demo-moe"
    found = find_model(" demo-moe ", roots)
    assert Path(found) == (DEMO / "demo-moe").resolve()
    assert model_name(found, roots) == "demo-moe"


@pytest.mark.parametrize("name", ["", "/etc", "../..", "demo-moe/../..", "out", "a\0b", "x" * 5000, "https://example.org/x", "a/b/c", "~"])
def test_nothing_outside_the_declared_folders_is_a_model(name: str, roots: list[Path]) -> None:
    with pytest.raises(InputError):
        find_model(name, roots)


def test_what_is_there_and_what_is_not_are_answered_alike(roots: list[Path], tmp_path: Path) -> None:
    messages = set()
    for name in (str(tmp_path / "secret.txt"), str(tmp_path / "nothing.txt")):
        for find in (find_model, find_text):
            with pytest.raises(InputError) as caught:
                find(name, roots)
            messages.add(str(caught.value).replace(name, "NAME").replace(repr(name), "NAME"))
    assert len(messages) == 2  # one of models, one of texts
    assert not any(str(tmp_path) in message for message in messages)


def test_hub_ids_are_passed_on(roots: list[Path]) -> None:
    assert find_model("mistralai/Mixtral-8x7B-v0.1", roots) == "mistralai/Mixtral-8x7B-v0.1"


def test_texts_are_shipped_declared_or_on_the_hub(roots: list[Path]) -> None:
    assert find_text("", roots) == "sotu"
    assert find_text("Salesforce/wikitext:wikitext-2-raw-v1@test", roots) == "Salesforce/wikitext:wikitext-2-raw-v1@test"
    assert Path(find_text("own.txt", roots)).read_text() == "text"


@pytest.mark.parametrize("name", ["/etc/passwd", "link.txt", "out/secret.txt", "../secret.txt", "assets", "tests", "a..b", "x y"])
def test_no_other_text_of_this_machine_is_read(name: str, roots: list[Path]) -> None:
    with pytest.raises(InputError):
        find_text(name, roots)
