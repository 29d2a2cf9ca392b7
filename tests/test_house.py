"""The rules of the house: which room may know of which, and how big a file may grow.

Rules are functions of a folder, so that each is also shown to fail on a folder that breaks it.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
DRAWING = {"gradio", "plotly"}
FOUNDATION = {"moesvd_core.errors", "moesvd_core.progress", "moesvd_core.atomic"}
"""What any room may import: errors, progress, safe writing."""

STATIONS = {
    # One gate, and one rule of groups, for reading and for running; exports copy the modules of running whole.
    "moesvd_core.architectures": (
        "moesvd_core.experts.gate_of", "moesvd_core.kept_router.router_groups", "moesvd_core.kept_router.router_of",
    ),
    "moesvd_core.devices": (),
    "moesvd_core.linalg": ("moesvd_core.devices",),
    "moesvd_core.calibration": (
        "moesvd_core.architectures", "moesvd_core.devices", "moesvd_core.linalg", "moesvd_core.tensor_files",
        "moesvd_core.experts.swiglu", "moesvd_core.kernels",  # what a GPU does in the time of one pass over memory
    ),
    "moesvd_core.sensitivity": ("moesvd_core.calibration",),
    "moesvd_core.similarity": (),
    "moesvd_core.planning": (),
    "moesvd_core.tensor_files": (),
    "moesvd_core.decomposition": (
        "moesvd_core.architectures.layout", "moesvd_core.calibration.statistics", "moesvd_core.devices", "moesvd_core.linalg",
        "moesvd_core.planning", "moesvd_core.tensor_files",
        "moesvd_core.kept_router.enough_left",  # one rule for planning and running
    ),
    "moesvd_core.kernels": (),
    "moesvd_core.cpu_kernels": (),
    "moesvd_core.cpu_tiles": ("moesvd_core.cpu_kernels",),
    "moesvd_core.tiles": ("moesvd_core.cpu_tiles", "moesvd_core.kernels"),
    "moesvd_core.grouped": ("moesvd_core.cpu_tiles", "moesvd_core.kernels", "moesvd_core.tiles"),
    "moesvd_core.batched": ("moesvd_core.grouped",),
    "moesvd_core.sides": ("moesvd_core.batched", "moesvd_core.cpu_tiles", "moesvd_core.grouped", "moesvd_core.tiles"),
    "moesvd_core.factor_sides": ("moesvd_core.batched", "moesvd_core.grouped", "moesvd_core.sides", "moesvd_core.tiles"),
    "moesvd_core.experts": (
        "moesvd_core.batched", "moesvd_core.cpu_tiles", "moesvd_core.factor_sides", "moesvd_core.grouped", "moesvd_core.tiles",
    ),
    "moesvd_core.rival_sides": (
        "moesvd_core.batched", "moesvd_core.factor_sides", "moesvd_core.grouped", "moesvd_core.sides", "moesvd_core.tiles",
    ),
    "moesvd_core.pivoted_side": (
        "moesvd_core.batched", "moesvd_core.factor_sides", "moesvd_core.grouped", "moesvd_core.sides", "moesvd_core.tiles",
    ),
    "moesvd_core.kept_router": (),
    "moesvd_core.checkpoint": (
        "moesvd_core.architectures", "moesvd_core.decomposition.factors", "moesvd_core.decomposition.pivots",
        "moesvd_core.experts", "moesvd_core.factor_sides", "moesvd_core.batched", "moesvd_core.grouped", "moesvd_core.sides",
        "moesvd_core.pivoted_side", "moesvd_core.rival_sides", "moesvd_core.kept_router", "moesvd_core.kernels", "moesvd_core.tiles",
        "moesvd_core.cpu_tiles",
    ),
    "moesvd_core.evaluation": (
        "moesvd_core.architectures", "moesvd_core.calibration.text", "moesvd_core.devices", "moesvd_core.tensor_files",
        "moesvd_core.kernels.has_grouped_product",  # what a GPU's clock has to know of the experts that it times
    ),
}
"""The stations that a model passes, and what each may import beside the foundation and itself: a model flows in one direction. Whatever
is not a station (runs, the command line, the public surface) may use them all, and no station uses it."""

FREE = ("moesvd_core.evaluation.benchmarks",)
"""Measures the whole way, so it may use all of it."""

PLANNING_LIBRARIES = {"numpy", "yaml"}
LINES = {"moesvd_core": 400, "pages": 250, "app.py": 80}
"""Every file stays under so many lines."""


def modules(root: Path, *tops: str) -> Iterator[tuple[Path, str]]:
    """Python files under the given top-level names, with their module names."""
    for top in tops:
        for path in sorted((root / top).rglob("*.py") if (root / top).is_dir() else (root / top).parent.glob(top)):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            yield path, name.removesuffix(".__init__")


def imports(path: Path, name: str) -> set[str]:
    """Modules that a file imports, anywhere in it; `from a import b` counts as a.b, which is a module or something in one."""
    found: set[str] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def importing(root: Path, top: str) -> Iterator[tuple[str, str]]:
    """Every module under a top-level name with each module that it imports."""
    for path, name in modules(root, top):
        for used in sorted(imports(path, name)):
            yield name, used


def drawing_in_the_engine(root: Path) -> list[str]:
    """moesvd_core never imports gradio or plotly."""
    return [f"{name} imports {used}" for name, used in importing(root, "moesvd_core") if used.split(".")[0] in DRAWING]


def torch_in_planning(root: Path) -> list[str]:
    """planning stands on the standard library, numpy and yaml alone, and on modules here that do too."""
    allowed = PLANNING_LIBRARIES | sys.stdlib_module_names | {"moesvd_core"}
    return [
        f"{name} imports {used}"
        for name, used in importing(root, "moesvd_core")
        if (within(name, "moesvd_core.planning") or name in FOUNDATION) and used.split(".")[0] not in allowed
    ]


def pages_known_to_others(root: Path) -> list[str]:
    """Nothing but app.py imports pages."""
    return [f"{name} imports {used}" for name, used in importing(root, "moesvd_core") if within(used, "pages")]


def pages_that_know_each_other(root: Path) -> list[str]:
    """A page imports no other page, a component no page; both may import components."""
    found = [(name, used) for name, used in importing(root, "pages") if name != "pages" and within(used, "pages")]
    return [f"{name} imports {used}" for name, used in found if not within(used, "pages.components") and not within(used, name)]


def upstream_imports(root: Path) -> list[str]:
    """A station imports only what the table allows it."""
    broken = []
    for name, used in importing(root, "moesvd_core"):
        station = next((each for each in STATIONS if within(name, each)), None)
        if station is None or not within(used, "moesvd_core") or any(within(name, each) for each in FREE):
            continue
        if not any(within(used, room) for room in (station, *STATIONS[station], *FOUNDATION)):
            broken.append(f"{name} imports {used}")
    return broken


def long_files(root: Path) -> list[str]:
    """Every file stays under its limit of lines."""
    sizes = [(path, limit, len(path.read_text("utf-8").splitlines())) for top, limit in LINES.items() for path, _ in modules(root, top)]
    return [f"{path.relative_to(root)} has {size} lines, must be under {limit}" for path, limit, size in sizes if size >= limit]


Rule = Callable[[Path], list[str]]
BREAKS: list[tuple[Rule, str, str, str]] = [
    (drawing_in_the_engine, "moesvd_core/runs/view.py", "def draw():\n    import plotly.graph_objects\n", "moesvd_core.runs.view"),
    (drawing_in_the_engine, "moesvd_core/cli.py", "from gradio import Blocks\n", "gradio.Blocks"),
    (torch_in_planning, "moesvd_core/planning/greedy.py", "import torch\n", "moesvd_core.planning.greedy imports torch"),
    (torch_in_planning, "moesvd_core/errors.py", "import pandas\n", "moesvd_core.errors imports pandas"),
    (pages_known_to_others, "moesvd_core/api.py", "from pages.ratio import layout\n", "pages.ratio"),
    (pages_that_know_each_other, "pages/ratio.py", "from pages import compare\n", "pages.ratio imports pages.compare"),
    (pages_that_know_each_other, "pages/ratio.py", "from .compare import layout\n", "pages.ratio imports pages.compare"),
    (pages_that_know_each_other, "pages/components/plot.py", "from pages.ratio import layout\n", "pages.components.plot"),
    (upstream_imports, "moesvd_core/architectures/find.py", "import moesvd_core.calibration.text\n", "moesvd_core.calibration.text"),
    (upstream_imports, "moesvd_core/planning/__init__.py", "from ..decomposition import registry\n", "moesvd_core.decomposition.registry"),
    (upstream_imports, "moesvd_core/evaluation/speed.py", "from moesvd_core import runs\n", "speed imports moesvd_core.runs"),
    (upstream_imports, "moesvd_core/decomposition/latent.py", "import moesvd_core.architectures.files\n", "architectures.files"),
    (long_files, "moesvd_core/big.py", "\n" * 400, "400 lines, must be under 400"),
    (long_files, "app.py", "\n" * 80, "app.py has 80 lines, must be under 80"),
]


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, *_ in BREAKS), ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Rule) -> None:
    assert rule(HOUSE) == []


@pytest.mark.parametrize(("rule", "name", "text", "found"), BREAKS)
def test_the_rule_finds_who_breaks_it(rule: Rule, name: str, text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text, encoding="utf-8")
    broken = rule(tmp_path)
    assert len(broken) == 1
    assert found in broken[0]


def test_every_station_of_the_table_is_there() -> None:
    """A station that was renamed would otherwise go unchecked."""
    names = {name for _, name in modules(HOUSE, "moesvd_core")}
    assert [station for station in STATIONS if station not in names] == []


def test_the_documents_name_only_files_that_are_there() -> None:
    text = "".join(path.read_text("utf-8") for path in HOUSE.glob("docs/*.md"))
    named = set(re.findall(r"`((?:tests|pages|moesvd_core)/[\w/]+\.\w+)`", text))
    assert named
    assert [name for name in sorted(named) if not (HOUSE / name).exists()] == []
