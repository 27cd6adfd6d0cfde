"""A hook of MkDocs: what lies beside docs/ (examples, contributing, changelog) becomes pages of the site.

On disk, pages link to those files by their relative paths, which also work wherever Markdown is shown; in the site the
same links lead to the pages made here.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PAGES |= {f"examples/{path.name}": f"examples/{path.stem}.md" for path in sorted(ROOT.glob("examples/*.py"))}
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of files outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source.endswith(".py"):
            # One heading needs no list of headings, and code needs its room.
            text = f"---\nhide: [toc]\n---\n\n# {source}\n\n```python\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links between files, as they lie in the repository, at the pages of the site."""
    uri = page.file.src_uri
    sources = {made: source for source, made in PAGES.items()}
    here = sources.get(uri, f"docs/{uri}")

    def lead(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match.group(2)))
        made = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if made is None:
            return match.group(0)
        return match.group(1) + posixpath.relpath(made, posixpath.dirname(uri) or ".") + match.group(3)

    return _LINK.sub(lead, markdown)
