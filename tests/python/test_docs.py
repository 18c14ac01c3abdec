"""Documents that a reader can follow: links lead somewhere, nothing is cited that only its author can open."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^ *```.*?^ *```", re.S | re.M)
LINK = re.compile(r"(?<!\\)!?\[[^\]]*\]\(([^()\s]+)\)|^\[[^\]]+\]: (\S+)", re.M)
# Sections and issues of what is not in the repository. ("#123" is fine where a link goes with it.)
PRIVATE = r"DESIGN(\.md)? ?§|§ ?[0-9]|\b[Ii]ssue [0-9]"
WIDTH = 99


def git(*arguments: str) -> list[str]:
    """Lines of its output."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip(f"not a git repository: {done.stderr.strip()}")
    return done.stdout.splitlines()


def pages() -> list[Path]:
    """What is or would be committed."""
    found = git("ls-files", "--cached", "--others", "--exclude-standard", "*.md")
    return [path for name in found if (path := ROOT / name).is_file()]


def anchors(page: Path) -> Iterator[str]:
    """As GitHub makes them of headings."""
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_lead_somewhere() -> None:
    broken, n_links = [], 0
    for page in pages():
        for link in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
            target = link[1] or link[2]
            if re.match(r"[a-z]+:", target):
                continue
            n_links += 1
            name, _, anchor = target.partition("#")
            where = (page.parent / name).resolve() if name else page
            if not where.exists() or (anchor and anchor not in anchors(where)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert n_links > 50
    assert not broken


def test_nothing_is_cited_that_a_reader_cannot_open() -> None:
    itself = f":!{Path(__file__).resolve().relative_to(ROOT)}"
    assert git("grep", "-nI", "--untracked", "-E", "One meaning for each word", "--", "docs")  # it does find things
    assert not git("grep", "-nI", "--untracked", "-E", PRIVATE, "--", ".", itself)


def test_files_that_pages_name_are_there() -> None:
    """But in CONTRIBUTING.md, which also names files of before, and in what tells of the past."""
    past = {ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"}
    named = re.compile(r"`((?:csrc|python|convert|reference|bench|tests|examples|docs|notebooks)/[\w./-]+)`")
    missing = [
        f"{page.relative_to(ROOT)}: {name}"
        for page in pages()
        if page not in past and page.parent.name != "log"
        for name in named.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    ]
    assert not missing


def test_pages_fit_a_screen() -> None:
    """But for the tables of figures, which scripts write."""
    own = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "log").glob("*.md")]
    too_long = [
        f"{page.relative_to(ROOT)}:{number}"
        for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *own]
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDTH
    ]
    assert not too_long
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_every_page_is_reached_from_the_readme() -> None:
    reached, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
            target = (page.parent / (link[1] or link[2]).partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_file():
                queue.append(target)
    assert {page for page in pages() if page.is_relative_to(ROOT / "docs")} <= reached
