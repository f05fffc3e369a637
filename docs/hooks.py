r"""What mkdocs does beyond its own while it builds: formulas, and links to code and tests.

`pymdownx.arithmatex` leaves `\(...\)` and `\[...\]` in elements of class `arithmatex`. They become MathML,
which browsers draw themselves, so that formulas need no script and no network.

A page links to a file of the repository by its relative path, `../src/...`, which works where the repository
is browsed. The site has no such files, so each one that is linked becomes a page of it. A link to a file that
does not exist is left as it is, and mkdocs reports it.

Comments in which a page sets up what its blocks need in a test (tests/docs) are for readers of the source.
"""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', flags=re.DOTALL)
_LINK = re.compile(r"\]\((?P<path>[^)#\s:]+)(?=[)#])")
_COMMENT = re.compile(r"^<!-- (?:invisible-code-block|skip): .*?-->\n+", flags=re.DOTALL | re.MULTILINE)
_LANGUAGES = {".py": "python", ".md": "markdown", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml"}


def on_page_content(content: str, **_: Any) -> str:
    def to_mathml(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match[3]).strip(), display=display)

    return _FORMULA.sub(to_mathml, content)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """A page for every file of the repository that some page links to."""
    linked = {
        name
        for file in files.documentation_pages()
        for match in _LINK.finditer(file.content_string)
        if (name := _repository_file(file.src_uri, match["path"])) is not None
    }
    for name in sorted(linked):
        source = (ROOT / name).read_text(encoding="utf-8")
        language = _LANGUAGES.get(Path(name).suffix, "text")
        code = f"``````{language}\n{source.rstrip()}\n``````"
        page = f"---\nsearch: {{exclude: true}}\n---\n# `{name}`\n\n{code}\n"
        files.append(File.generated(config, _page_of(name), content=page))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri

    def to_page(match: re.Match[str]) -> str:
        name = _repository_file(here, match["path"])
        if name is None:
            return match[0]
        return f"]({posixpath.relpath(_page_of(name), posixpath.dirname(here) or '.')}"

    return _LINK.sub(to_page, _COMMENT.sub("", markdown))


def _repository_file(page: str, link: str) -> str | None:
    """What the link of a page names, relative to the repository, if that is a file outside docs/."""
    name = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    outside = not name.startswith(("docs/", "../", "/"))
    return name if outside and (ROOT / name).is_file() else None


def _page_of(name: str) -> str:
    return f"source/{name}.md"
