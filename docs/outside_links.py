"""The site holds what its pages link to outside docs/: contributing, changelog, records, examples.

The pages are read in the repository too, where `../results/...` leads somewhere. On the site such a
link leads to the repository, if `repo_url` says where that is, else to a copy of the file.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Files of the root that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
GENERATED = {page: name for name, page in PAGES.items() if page != "index.md"}
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
PICTURES = {".png", ".svg"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie in the root of the repository."""
    for page, name in GENERATED.items():
        content = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point every link out of docs/ to what the site has in its place."""
    uri = page.file.src_uri
    folder = ROOT if uri in GENERATED else (DOCS / uri).parent

    def replace(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (folder / target).resolve()
        if not path.is_relative_to(ROOT):
            return match[0]
        found = _uri_on_the_site(path, config, files)
        if found is None:
            return text.strip("![]")
        if "://" not in found:
            found = os.path.relpath(found, Path(uri).parent).replace(os.sep, "/")
        return f"{text}({found}{match['anchor'] or ''})"

    return LINK.sub(replace, markdown)


def _uri_on_the_site(path: Path, config: MkDocsConfig, files: Files) -> str | None:
    """Return the uri of a file of the repository on the site; None for a folder without one."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    if name in PAGES:
        return PAGES[name]
    if config.repo_url and path.suffix not in PICTURES:
        return f"{config.repo_url.rstrip('/')}/{'tree' if path.is_dir() else 'blob'}/main/{name}"
    if not path.is_file():
        return None
    # A Markdown file would become a page of its own, outside the navigation.
    copy = f"files/{name}" + (".txt" if path.suffix == ".md" else "")
    if files.get_file_from_path(copy) is None:
        files.append(File.generated(config, copy, abs_src_path=str(path)))
    return copy
