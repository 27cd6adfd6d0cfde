"""`make docs`: links and anchors of every Markdown file resolve, every page is in the site, and everything public has a
docstring.

The code in the documentation is run by tests/test_docs.py.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gdpd_kernels", "gdpd")

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def documents(root: Path = ROOT) -> list[Path]:
    """The Markdown files at the root and in docs/ and examples/."""
    return sorted([*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("examples/**/*.md")])


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings make: lower case, spaces to dashes, punctuation dropped."""
    headings = re.findall(r"^#+\s+(.*?)\s*$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    """Links of `page` that lead to no file or no heading. Addresses with a scheme are not followed."""
    text = page.read_text(encoding="utf-8")
    for match in _LINK.finditer(_FENCE.sub("", text)):
        target = match.group(1) or match.group(2)
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        if not linked.exists():
            yield f"{page.name}: {target} leads nowhere"
        elif anchor and linked.suffix == ".md" and anchor not in anchors(linked.read_text(encoding="utf-8")):
            yield f"{page.name}: {target} names no heading"


def unlisted(root: Path = ROOT) -> Iterator[str]:
    """Pages of docs/ that the site's navigation, in mkdocs.yml, leaves out."""
    listed = set(re.findall(r"([\w/-]+\.md)$", (root / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    for page in sorted(root.glob("docs/**/*.md")):
        name = page.relative_to(root / "docs").as_posix()
        if name not in listed:
            yield f"{name}: not in the nav of mkdocs.yml"


def undocumented(path: Path) -> Iterator[str]:
    """The module, and its public classes and functions, as far as they have no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if ast.get_docstring(tree) is None:
        yield f"{path.name}: the module"
    for node in tree.body:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if public and ast.get_docstring(node) is None:
            yield f"{path.name}: {node.name}"


def main() -> int:
    """Print what is wrong, one line each; exit code 1 if anything is."""
    wrong = [problem for page in documents() for problem in broken_links(page)] + list(unlisted())
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            wrong += [f"no docstring: {path.parent.name}/{name}" for name in undocumented(path)]
    for problem in wrong:
        print(problem, file=sys.stderr)
    print(f"{len(documents())} pages, {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
