"""The pages say nothing that is not there: their links, files,
configurations, commands, options and modules exist."""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import pytest

from kr_ray.cli import _parser
from kr_ray.config.file import parse_config
from kr_ray.config.renamed import RENAMED
from kr_ray.foreign.yaml_core import read_yaml

REPOSITORY = Path(__file__).parents[1]
LONGEST_README = 1100
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"`([\w./-]+\.(?:py|yaml|yml|sh|txt|json|toml|html|css|md))`")
NAMED_ELSEWHERE = re.compile(
    r"^(?:runs/.*|mine\.yaml|bench\.(?:json|md)|config\.yaml|status\.json|(?:started|done|report|released)\.json|report(?:_summary)?\.html)$"
)
"""Files that a person or a run makes."""


def _pages() -> list[Path]:
    """All that git knows or would take; a virtual environment's pages are others'."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        names = subprocess.run(
            command, cwd=REPOSITORY, check=True, capture_output=True, text=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):  # a copy without git
        return sorted(
            [
                *REPOSITORY.glob("*.md"),
                *(
                    p
                    for d in ("kr_ray", "configs", "docker", "tests")
                    for p in (REPOSITORY / d).rglob("*.md")
                ),
            ]
        )
    return sorted(REPOSITORY / name for name in names if (REPOSITORY / name).exists())


PAGES = _pages()
each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(REPOSITORY)) for page in PAGES])


def anchors(text: str) -> set[str]:
    """Of a page's headings, as a code browser makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (actions,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions.choices)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@each_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", read(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(REPOSITORY) and file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


@each_page
def test_every_file_that_is_named_exists(page: Path) -> None:
    """Below the root, the page's own folder, the package or the tests."""
    places = (REPOSITORY, page.parent, REPOSITORY / "kr_ray", REPOSITORY / "tests")
    named = {name for name in FILE.findall(read(page)) if not NAMED_ELSEWHERE.match(name)}
    packages = {file.name for file in (REPOSITORY / "kr_ray").rglob("*.py")}
    missing = [
        name
        for name in named
        if name not in packages and not any((place / name).exists() for place in places)
    ]
    assert not missing


@each_page
def test_every_configuration_and_job_that_is_named_exists(page: Path) -> None:
    named = re.findall(r"\b(?:configs|jobs|docker|kr_ray|tests)/[\w./-]+\.\w+", read(page))
    missing = {
        name
        for name in named
        if name != "docker/token" and not (REPOSITORY / name).exists() and not (page.parent / name).exists()
    }
    assert missing <= {"configs/NAME.yaml"}


@each_page
def test_every_command_and_option_that_is_named_exists(page: Path) -> None:
    commands = subcommands()
    for line in re.findall(r"(?:`|^|bin/)kr ([^`\n#]+)", read(page), re.MULTILINE):
        name, *words = line.split()
        assert name in commands, line
        known = set(commands[name]._option_string_actions)
        unknown = {word for word in words if word.startswith("--")} - known
        assert not unknown, line


@each_page
def test_every_piece_of_a_configuration_is_accepted(page: Path) -> None:
    rest = {
        "name": "page",
        "data": {"name": "digits", "image_size": 16},
        "generator": {"architecture": "tiny16"},
    }
    for piece in re.findall(r"^```yaml\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL):
        sections = read_yaml(piece)
        assert isinstance(sections, dict)
        parse_config(rest | sections)


def test_the_changelog_has_every_renamed_key() -> None:
    text = read(REPOSITORY / "CHANGELOG.md")
    assert not [old for old, new in RENAMED.items() if f"| `{old}` | `{new}` |" not in text]


@each_page
def test_no_page_names_this_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w.])/(?:work|root|home)/", read(page))


def test_the_first_page_is_short() -> None:
    assert len(read(REPOSITORY / "README.md").split()) <= LONGEST_README


def test_the_pages_are_linked_from_the_first() -> None:
    linked = {
        (REPOSITORY / target).resolve()
        for target in LINK.findall(read(REPOSITORY / "README.md"))
        if "#" not in target
    }
    assert set(PAGES) - {REPOSITORY / "README.md"} <= linked


def test_anchors_are_those_of_a_code_browser() -> None:
    assert anchors("# What was not run\n```sh\n# no heading\n```\n## `kr plan`\n### A.b, c\n") == {
        "what-was-not-run",
        "kr-plan",
        "ab-c",
    }
