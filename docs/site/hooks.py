"""Adds to the documentation site what is not in `docs/`: README, BUILD, CHANGELOG, source files.

MkDocs calls the functions `on_...`. A link may lead to any file of the checkout, and a path in
backticks is such a link: pages of the site are linked as pages, other files become one. With
`--strict`, what leads nowhere fails the build, and so does a page that would fetch something.
"""

import html
import logging
import os.path
import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "BUILD.md": "build.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".gin": "python", ".py": "python", ".yaml": "yaml"}
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
PATH = re.compile(
    r"(?<![`\[])`((?:configs|docs|launch|pjit_train|sparsity|tests|topology)/[\w/]*\w\.\w+)`(?!`)"
)
FENCED = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
FETCHED = re.compile(
    r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)"
)

HREF = re.compile(r"""<[^>]*\s(?:href|src)=["']?(?!\w+:|//)([^"'\s>]+)""")
ANCHOR = re.compile(r"""<[^>]*\sid=["']?([^"'\s>]+)""")

log = logging.getLogger("mkdocs.site")


def on_files(files, config):
    """Adds the pages that are made of files outside `docs/`, and leads all links to pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for file in list(files.documentation_pages()):
        file.content_string, sources = linked(file.content_string, origin(file.src_uri))
        for source in sources:
            if files.get_file_from_path(page_of(source)) is None:
                page = File.generated(
                    config,
                    page_of(source),
                    content=shown(source),
                    inclusion=InclusionLevel.NOT_IN_NAV,
                )
                files.append(page)
    return files


def on_post_build(config):
    """Warns of what a page would fetch from elsewhere, and of links to what the site lacks."""
    site = Path(config.site_dir)
    pages = {path: path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}
    anchors = {path: set(ANCHOR.findall(text)) for path, text in pages.items()}
    for path, text in pages.items():
        page = path.relative_to(site)
        for url in FETCHED.findall(text):
            log.warning(f"{page}: fetches {url}; the site has to work without a network")
        for link in set(HREF.findall(text)):
            url, _, anchor = unquote(html.unescape(link)).partition("#")
            target = Path(os.path.normpath(path.parent / url)) if url else path
            if not target.is_file() or (anchor and anchor not in anchors.get(target, {anchor})):
                log.warning(f"{page}: links to {link}, which is not there")


def origin(page: str) -> PurePosixPath:
    """The file of the checkout that a page was made of."""
    sources = {page: source for source, page in PAGES.items()}
    return PurePosixPath(sources.get(page, f"docs/{page}"))


def page_of(source: str) -> str:
    """The page, or the picture, of the site that shows a file of the checkout."""
    if source in PAGES:
        return PAGES[source]
    return source.removeprefix("docs/") if source.startswith("docs/") else f"source/{source}.md"


def shown(source: str) -> str:
    """The page of a source file."""
    language = LANGUAGES.get(PurePosixPath(source).suffix, "text")
    head = f"---\ntitle: {source}\nsearch:\n  exclude: true\n---\n\n# `{source}`\n"
    return f"{head}\n~~~~~~{language}\n{(ROOT / source).read_text()}~~~~~~\n"


def linked(markdown: str, origin: PurePosixPath) -> tuple[str, set[str]]:
    """A text with its links as those of the site, and the source files that they lead to."""
    sources = set()

    def target(source: str) -> str:
        if not source.startswith("docs/") and source not in PAGES:
            sources.add(source)
        here = PurePosixPath(page_of(str(origin))).parent
        return os.path.relpath(page_of(source), here)

    def link(match):
        source = os.path.normpath(origin.parent / match[1])
        if not (ROOT / source).is_file():
            return match[0]  # MkDocs warns of it
        return f"]({target(source)}{match[2] or ''})"

    def path(match):
        if not (ROOT / match[1]).is_file():
            log.warning(f"{origin}: there is no file {match[1]}")
            return match[0]
        return f"[{match[0]}]({target(match[1])})"

    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(link, PATH.sub(path, part)) for part in parts[::2]]
    return "".join(parts), sources
