"""What the pages say about the code, where their links go, and the site."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import CONVERTED, ROOT, environment

from benchmarks import pages as figures
from examples import reference

nbclient = pytest.importorskip("nbclient", reason="make test-tools installs it")
nbformat = pytest.importorskip("nbformat", reason="it comes with nbclient")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def test_the_reference_is_that_of_the_code() -> None:
    reference.main(["--check"])


def test_tables_are_those_of_the_results() -> None:
    figures.main(["--check"])


def test_the_readme_s_memory_is_that_of_the_reference() -> None:
    """Parameters after conversion, GB to generate, to train with QLoRA, with LoRA, whole in bfloat16."""
    rows = {row[0]: row[2:7] for row in map(_cells, reference.memory_rows()[2:])}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    told = {row[0]: row[1:] for row in map(_cells, re.findall(r"^\| (?:Qwen|Llama)[^\n]*", text, re.MULTILINE))}
    assert told == rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """To a file that is there, and to a heading that it has."""
    for link in _LINK.findall(_prose(page)):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} is not there"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leaves the repository"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), f"{page.name}: {link}: the page has no such heading"


def _prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)", _prose(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    subprocess.run(["make", "build/types"], cwd=ROOT, check=True, capture_output=True)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(tmp_path) | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site" / "faq" / "index.html").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins for the model that it names; stored without what it prints."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "stored with its output"
    for each in desk.iterdir():
        if each.name not in CONVERTED:
            (tmp_path / each.name).symlink_to(each)
    for name, value in environment(desk).items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.outputs or cell.source.startswith("import") for cell in code)
