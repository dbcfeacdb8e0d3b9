"""Pages that live outside ``docs/`` in the site: mkdocs has one folder, a repository has its customs.

On GitHub a link goes to a file. Here the same link goes to the page that the file became, and where it became
none (a test, a folder) its text alone stays.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

CHECKOUT = Path(__file__).parents[1]
ELSEWHERE = {
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "overview.md",
    "benchmarks/README.md": "speed.md",
}
_LINK = re.compile(r"\[(?P<text>[^\]\n]+)\]\((?P<target>[^)\s:]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for source, name in ELSEWHERE.items():
        if (CHECKOUT / source).exists():
            files.append(File.generated(config, name, abs_src_path=str(CHECKOUT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where the pages are."""
    places = {name: source for source, name in ELSEWHERE.items()}
    here = places.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def pointed(link: re.Match[str]) -> str:
        path, _, anchor = link["target"].partition("#")
        if not path:
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        name = ELSEWHERE.get(file) or file.removeprefix("docs/")
        if files.get_file_from_path(name) is None and (file in ELSEWHERE or (CHECKOUT / file).exists()):
            return link["text"]
        return f"[{link['text']}]({name}{'#' if anchor else ''}{anchor})"

    return _LINK.sub(pointed, markdown)
