"""What the documentation points to is there: files, headings, pictures; and the commands that it shows are commands that there are."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser.screenshots import HEAVIEST, PICTURES
from PIL import Image

from moesvd_core.cli import main

HOUSE = Path(__file__).parents[1]
IMAGES = HOUSE / "docs" / "images"
PAGES = [HOUSE / "README.md", HOUSE / "CHANGELOG.md", *sorted((HOUSE / "docs").glob("*.md"))]
_LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")


def links(page: Path) -> Iterator[str]:
    """Addresses in a page that lead to this repository."""
    for match in _LINK.finditer(page.read_text("utf-8")):
        address = match[1] or match[2]
        if not re.match(r"[a-z]+:", address):
            yield address


def anchors(page: Path) -> set[str]:
    """Names under which the headings of a page can be reached."""
    found = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for address in links(page):
        name, _, anchor = address.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), address
        assert not anchor or anchor in anchors(target), address


def test_pictures_are_those_that_the_script_takes_and_all_are_shown() -> None:
    shown = {Path(address).name for page in PAGES for address in links(page) if address.endswith(".png")}
    assert {file.name for file in IMAGES.iterdir()} == {f"{picture.name}.png" for picture in PICTURES} == shown


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_pictures_have_their_size_and_are_light(picture: object) -> None:
    name, width, height = picture.name, picture.width, picture.height  # type: ignore[attr-defined]
    file = IMAGES / f"{name}.png"
    assert file.stat().st_size <= HEAVIEST
    with Image.open(file) as image:
        assert image.width / width == pytest.approx(image.height / height, rel=0.01)


def test_commands_of_the_readme_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    text = (HOUSE / "README.md").read_text("utf-8").partition("## Command line")[2]
    named = {word for line in re.findall(r"^moesvd (.+?)  ", text, re.MULTILINE) for word in re.findall(r"(?:^|\| )([a-z]+)", line)}
    assert main(["--help"]) == 0
    offered = capsys.readouterr().out
    assert len(named) > 10
    assert [name for name in sorted(named) if not re.search(rf"\b{name}\b", offered)] == []
