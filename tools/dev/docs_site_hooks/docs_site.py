"""What mkdocs.yml hooks in: links out of docs/ become plain code, and every page of a method has its place.

The pages are read in a checkout too, where a link to a file of the repository leads there. A site has only what is in
docs/, and there is no public address to link to instead.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

_FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(?:#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Puts the pages of docs/methods behind those of the section that has its README."""
    docs = Path(config["docs_dir"])
    for section in (entry for entry in config["nav"] if isinstance(entry, dict)):
        for title, pages in section.items():
            if isinstance(pages, list) and "methods/README.md" in pages:
                found = sorted(f"methods/{path.name}" for path in (docs / "methods").glob("*.md"))
                section[title] = [*pages, *(page for page in found if page not in pages)]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Writes links that the site cannot follow as code, outside of fenced blocks."""
    here = posixpath.dirname(page.file.src_uri)

    def shown(match: re.Match[str]) -> str:
        text, target = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        inside = posixpath.normpath(posixpath.join(here, target))
        if inside.startswith("../"):
            path = inside.removeprefix("../")
        elif (Path(config["docs_dir"]) / inside).is_dir():
            path = f"docs/{inside}"
        else:
            return match[0]
        return f"`{path}`" if path.endswith(text.strip("`").rstrip("/")) else f"{text} (`{path}`)"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(shown, part) for part in parts)
