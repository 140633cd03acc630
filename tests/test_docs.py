"""Every Python snippet of the documentation runs as it stands, after the first one of its page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [
    DOCS / name for name in ("training.md", "seeing.md", "certificates.md", "operators.md", "penalties.md", "guide.md")
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> tuple[str, list[Any]]:
    """The page's first snippet, and the others by the line they stand on."""
    text = page.read_text()
    found = [(text[: match.start()].count("\n") + 2, match.group(1)) for match in BLOCK.finditer(text)]
    return found[0][1], [pytest.param(page, line, code, id=f"{page.name}:{line}") for line, code in found[1:]]


@pytest.mark.parametrize(("page", "line", "code"), [case for page in PAGES for case in snippets(page)[1]])
@pytest.mark.filterwarnings("ignore:the first step moves")
def test_snippet_runs(page: Path, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(snippets(page)[0], page.name, "exec"), names)
    exec(compile("\n" * (line - 1) + code, page.name, "exec"), names)


@pytest.mark.parametrize("page", [DOCS / "training.md", DOCS / "guide.md"], ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore")
def test_snippets_run_in_the_order_of_the_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "snippet"}
    first, others = snippets(page)
    for code in (first, *(other.values[2] for other in others)):
        exec(compile(code, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_fence_of_the_page_is_missed(page: Path) -> None:
    assert page.read_text().count("```python") == len(snippets(page)[1]) + 1 > (10 if page.stem == "training" else 1)


def test_the_guide_holds_the_table_and_every_figure_that_the_script_wrote() -> None:
    page, folder = (DOCS / "guide.md").read_text(), DOCS / "guide"
    assert (folder / "table.md").read_text() in page
    assert sorted(re.findall(r"\]\(guide/(.*?)\)", page)) == sorted(file.name for file in folder.glob("*.png"))


PAPERS = {"snr": "spectral norm regularization", "normscale": "Norm Scaling", "gradreg": "gradient regularization"}


@pytest.mark.parametrize("verdict", ["held", "not held"])
def test_readme_names_every_claim_of_the_papers_that_is_decided(verdict: str) -> None:
    rows = re.findall(r"^\| (\w+) \((\w)\) \|(.*)$", (DOCS / "results.md").read_text(), re.MULTILINE)
    decided = {(PAPERS[paper], claim) for paper, claim, rest in rows if f"**{verdict}**" in rest}
    text = " ".join((DOCS.parent / "README.md").read_text().split())
    sentence = re.search(rf"{verdict.capitalize()} (?:is|are) ([^.]*)\.", text)
    said = sentence.group(1) if sentence else ""
    named = re.findall(rf"({'|'.join(PAPERS.values())})'s (\(\w\)(?:(?:,| and) \(\w\))*)", said)
    assert {(paper, claim) for paper, claims in named for claim in re.findall(r"\((\w)\)", claims)} == decided
