"""What mkdocs asks of us: links from a page to files of the repository that are no pages."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A link out of docs/ becomes one to the repository, where the site knows its address, or names the file."""
    place = Path(page.file.abs_src_path).parent

    def found(match: re.Match[str]) -> str:
        target = (place / match[2]).resolve()
        if target.is_relative_to(ROOT / "docs") or not target.is_relative_to(ROOT) or not target.exists():
            return match[0]  # mkdocs warns about what is not there
        name = target.relative_to(ROOT).as_posix()
        if config.repo_url:
            return f"[{match[1]}]({config.repo_url.rstrip('/')}/blob/main/{name}{match[3] or ''})"
        if match[1].strip("`") in (name, target.name):
            return f"`{name}`"
        within = match.string[: match.start()].endswith("(")
        return f"{match[1]}: `{name}`" if within else f"{match[1]} (`{name}`)"

    return _LINK.sub(found, markdown)
