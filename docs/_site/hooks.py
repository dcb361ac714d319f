"""What mkdocs does beyond docs/: pages of the root, pictures of examples/, links into the source.

A link in a page is written as the tree has it (``../examples/theory.py`` in docs/theory.md, ``docs/layers.md`` in
README.md). Here it becomes: the page, if it is one; the copied picture; else the file in the repository. A link to
nothing is left as it is, and mkdocs refuses it.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}  # page: its source
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
PICTURES = {".png", ".svg", ".jpg"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root and the pictures of examples/."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in sorted((ROOT / "examples").rglob("*")):
        if path.suffix in PICTURES:
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with the links of the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(PAGES.get(here, f"docs/{here}"))  # of the page, in the tree

    def moved(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if not os.path.exists(ROOT / path):
            return match[0]
        in_site = next((name for name, source in PAGES.items() if source == path), path.removeprefix("docs/"))
        if files.get_file_from_path(in_site) is not None:
            return f"]({posixpath.relpath(in_site, posixpath.dirname(here) or '.')}{anchor})"
        return f"]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"

    return LINK.sub(moved, markdown)
