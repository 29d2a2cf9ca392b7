"""How the server was started: from flags, else from the environment, checked before a port is opened."""

import argparse
import errno
import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesvd_core.commands import COMMAND_VARIABLE
from moesvd_core.errors import InputError

PASSWORD_VARIABLE = "MOESVD_PASSWORD"  # noqa: S105 - the name of a variable
"""Passwords come from the environment only: flags can be read by every user of a machine."""
USER = "moesvd"
"""Whose password that is, unless MOESVD_USER says otherwise."""
LOGINS_VARIABLE = "MOESVD_LOGINS"
"""Further logins, `name:password` with white space between them. Each changes its own runs only."""
_HOUSE = Path(__file__).parents[2]
_ASSETS = (_HOUSE.relative_to(Path.cwd()) if _HOUSE.is_relative_to(Path.cwd()) else _HOUSE) / "assets"
"""Where the demo model is, wherever the server is started; named shortly where it can be."""
_LOGIN = re.compile(r"([A-Za-z0-9][\w.@-]{0,63}):(.+)")

SPACES = "https://huggingface.co"
"""Shows its Spaces in frames, and tells them their name in SPACE_ID."""


@dataclass(frozen=True)
class Settings:
    """What the person who started the server decided.

    Attributes:
        host: address to listen on; anything but loopback needs a password.
        port: 0 to 65535, 0 for any free one.
        runs: folder of runs; files are downloaded from the exports in it, and from nowhere else.
        models: folders in which local models must lie.
        logins: names and passwords of which a visitor must give one pair; none: everybody who reaches the server may do everything.
        remote_code: whether models may bring code of their own.
        demo: whether the finished analysis of the demo model is put among the runs.
        public_demo: whether anyone may look without a password; jobs, exports, votes and models of the hub are off then.
        frames: other sites that may show the explorer inside a page of theirs.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    runs: Path = Path("runs")
    models: tuple[Path, ...] = (_ASSETS, Path("models"))
    logins: tuple[tuple[str, str], ...] = ()
    remote_code: bool = False
    demo: bool = True
    public_demo: bool = False
    frames: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must be in [0, 65535], got {self.port}")
        if not self.logins and not self.public_demo and not is_loopback(self.host):
            raise InputError(
                f"host {self.host} can be reached from other machines: set {PASSWORD_VARIABLE} to a password, or use 127.0.0.1; "
                "--public-demo lets anyone look, and nobody start a job"
            )

    @classmethod
    def read(cls, arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Settings of a command line.

        Raises:
            InputError: a value out of bounds, a folder of models that is none, a login that is none, or a public address without a
                password. Only flags must name folders that are there: a container's may be mounted, and filled, later.
        """
        found = _parser(environment).parse_args(arguments)
        for folder in found.models or ():
            if not folder.is_dir():
                raise InputError(f"models must be folders that are there, got {folder}: make it, or name another with --models")
        return cls(
            host=found.host, port=found.port, runs=found.runs, models=tuple(found.models or _models(environment)),
            logins=_logins(environment), remote_code=found.allow_remote_code, demo=not found.no_demo, public_demo=found.public_demo,
            frames=(SPACES,) if environment.get("SPACE_ID") else (),
        )

    def require_port(self) -> None:
        """Nothing where the port can be listened on; asked before anything is made or started.

        Raises:
            InputError: another program has it, or this one may not or cannot have it there.
        """
        for host in dict.fromkeys((Settings.host, self.host.strip("[]"))):  # Gradio wants it on this machine too
            try:
                family, kind, *_, address = socket.getaddrinfo(host, self.port, type=socket.SOCK_STREAM)[0]
                with socket.socket(family, kind) as tried:
                    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just been closed is free
                    tried.bind(address)
            except OSError as error:
                reason = f"port {self.port} of {host} cannot be opened ({error.strerror or error}): choose others with --port and --host"
                if error.errno == errno.EADDRINUSE:
                    reason = f"port {self.port} is taken by another program: choose another with --port, 0 for any free one"
                raise InputError(reason) from None


def _logins(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """All logins of the environment.

    Raises:
        InputError: one that cannot be read, or two of one name.
    """
    password = environment.get(PASSWORD_VARIABLE)
    found = [(environment.get("MOESVD_USER") or USER, password)] if password else []
    for number, word in enumerate(environment.get(LOGINS_VARIABLE, "").split(), 1):
        match = _LOGIN.fullmatch(word)
        if match is None:  # the word itself may hold a password, and is not told
            form = "name:password, the name of letters, digits, dots, dashes, underscores and @"
            raise InputError(f"login {number} of {LOGINS_VARIABLE} must be {form}")
        found.append((match[1], match[2]))
    names = [name for name, _ in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"login {name} is given {names.count(name)} times: give every person a name of their own")
    return tuple(found)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _models(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Folders of models where no flag names any."""
    return tuple(Path(folder) for folder in environment.get("MOESVD_MODELS", "").split(os.pathsep) if folder) or Settings.models


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """Flags, with defaults from the environment."""
    about = f"MoE-SVD Explorer. Logins come from the environment: {PASSWORD_VARIABLE} for {USER}, {LOGINS_VARIABLE} for others."
    parser = argparse.ArgumentParser(prog=environment.get(COMMAND_VARIABLE) or "app.py", description=about)
    default = " (default: %(default)s)"
    parser.add_argument("--host", default=environment.get("MOESVD_HOST") or Settings.host, help=f"address to listen on{default}")
    port, runs = environment.get("MOESVD_PORT") or Settings.port, environment.get("MOESVD_RUNS") or Settings.runs
    parser.add_argument("--port", type=int, default=port, help=f"port, 0 for any free one{default}")
    parser.add_argument("--runs", type=Path, default=runs, help=f"folder of runs{default}")
    parser.add_argument(
        "--models", type=Path, nargs="+",
        help=f"folders that local models must lie in (default: {' '.join(map(str, _models(environment)))})",
    )
    parser.add_argument("--allow-remote-code", action="store_true", help="run code that comes with a model")
    parser.add_argument(
        "--public-demo", action="store_true", default=environment.get("MOESVD_PUBLIC_DEMO") == "1",
        help="let anyone look without a password, and nobody start a job",
    )
    parser.add_argument("--no-demo", action="store_true", help="leave out the finished analysis of the demo model")
    return parser
