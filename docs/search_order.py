"""Search shows the guide before the log, and pages in English before their translations."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

# In times of the weight of a page. What begins with the longest of these names counts.
WEIGHTS = {
    "": 1.0,
    "alpha.md": 2.0,
    "cost.md": 2.0,
    "loop.md": 2.0,
    "troubleshooting.md": 4.0,
    "api/": 0.5,
    "changelog.md": 0.3,
    "experiments": 0.5,
    "ko/": 0.5,
    "performance": 0.5,
    "theory.md": 0.5,
}


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Give a page its weight."""
    name = max(filter(page.file.src_uri.startswith, WEIGHTS), key=len)
    page.meta["search"] = {"boost": WEIGHTS[name]}
    return markdown
