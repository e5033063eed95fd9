"""Every block of every page runs, in the order of the page, on tiny models that go by the names of real ones."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import CONVERTED, ROOT, blocks, environment, given

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_BLOCKS = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page(page: Path, desk: Path, tmp_path: Path) -> None:
    """bash blocks one by one; the Python blocks of a page are one programme."""
    for path in desk.iterdir():
        if path.name in given(page):
            shutil.copytree(path, tmp_path / path.name)  # which a page may change
        elif path.name not in CONVERTED:
            (tmp_path / path.name).symlink_to(path)
    for block in blocks(page):
        if block.language == "bash" and block.skipped is None:
            _run(["bash", "-euo", "pipefail", "-c", block.code], page, block.line, tmp_path)
    code = [block for block in blocks(page) if block.language == "python" and block.skipped is None]
    if code:
        start = (Path(__file__).parents[1] / "page_setup.py").read_text(encoding="utf-8")
        whole = "\n".join([f'PAGE = "{page.stem}"', start, *(block.code for block in code)])
        _run([sys.executable, "-c", whole], page, code[0].line, tmp_path)


def _run(command: list[str], page: Path, line: int, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{page.name}, block at line {line}:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def test_a_block_is_skipped_only_with_a_reason() -> None:
    skipped = [(page.name, block.skipped) for page in PAGES for block in blocks(page) if block.skipped is not None]
    assert all(reason != "no reason given" for _, reason in skipped), skipped
