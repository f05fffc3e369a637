"""One HTML file that holds a whole result: pictures, plots, tables and what they mean.

Everything is inside the file (no script, no font, no request), it follows the reader's light or dark scheme,
reads on a phone and prints. A report is sections of blocks; this module knows how to set them and nothing
about what they say.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from PIL import Image

from dina_lrm.files import atomic_write

__all__ = [
    "Fact",
    "Facts",
    "Gallery",
    "Paragraph",
    "Picture",
    "Plot",
    "Plots",
    "Report",
    "Section",
    "Table",
    "render_html",
    "write_html",
]


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    text: str


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One figure in large type."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    facts: Sequence[Fact]


@dataclass(frozen=True, kw_only=True)
class Picture:
    image: Image.Image
    alternative: str
    """What a reader who does not see the picture is told."""
    lines: Sequence[str] = ()
    """Under the picture, one to a line; the first is the strongest."""
    mark: str = ""
    """In the picture's corner, such as a rank."""
    highlighted: bool = False


@dataclass(frozen=True, kw_only=True)
class Gallery:
    pictures: Sequence[Picture]
    caption: str = ""
    ordered: bool = False
    """The order carries meaning, as in a ranking."""
    columns: int = 8
    """On a wide page; half of it on a phone."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    svg: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Plots:
    plots: Sequence[Plot]


@dataclass(frozen=True, kw_only=True)
class Table:
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    text_columns: int = 1
    """Columns set flush left; the figures after them are set flush right."""


Block = Paragraph | Facts | Gallery | Plots | Table


@dataclass(frozen=True, kw_only=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, kw_only=True)
class Report:
    title: str
    summary: str
    sections: Sequence[Section]
    facts: Sequence[Fact] = field(default_factory=tuple)
    footer: str = ""
    language: str = "en"


def write_html(report: Report, path: Path) -> None:
    """Render the report into a file, which appears there whole or not at all."""
    atomic_write(path, render_html(report).encode())


def render_html(report: Report) -> str:
    """The document. All text is escaped; only the plots' SVG is taken as markup."""
    sections = "".join(
        f'<section aria-labelledby="section-{number}">\n'
        f'<h2 id="section-{number}">{html.escape(section.title)}</h2>\n'
        + "".join(render_block(block) for block in section.blocks)
        + "</section>\n"
        for number, section in enumerate(report.sections, start=1)
    )
    stylesheet = (files("dina_lrm.reporting") / "report.css").read_text(encoding="utf-8")
    facts = render_block(Facts(facts=report.facts)) if report.facts else ""
    footer = f"<footer><p>{html.escape(report.footer)}</p></footer>\n" if report.footer else ""
    return (
        f'<!doctype html>\n<html lang="{report.language}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(report.title)}</title>\n<style>{stylesheet}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{html.escape(report.title)}</h1>\n<p>{html.escape(report.summary)}</p>\n</header>\n"
        f"<main>\n{facts}{sections}</main>\n{footer}</body>\n</html>\n"
    )


def render_block(block: Block) -> str:
    match block:
        case Paragraph(text=text):
            return f"<p>{html.escape(text)}</p>\n"
        case Facts(facts=facts):
            items = "".join(
                f"<div><dt>{html.escape(fact.label)}</dt><dd>{html.escape(fact.value)}</dd>"
                + (f"<dd class=note>{html.escape(fact.note)}</dd>" if fact.note else "")
                + "</div>\n"
                for fact in facts
            )
            return f"<dl class=facts>\n{items}</dl>\n"
        case Plots(plots=plots):
            items = "".join(
                f"<figure>{plot.svg}<figcaption>{html.escape(plot.caption)}</figcaption></figure>\n"
                for plot in plots
            )
            return f"<div class=plots>\n{items}</div>\n"
        case Gallery():
            return render_gallery(block)
        case Table():
            return render_table(block)


def render_gallery(gallery: Gallery) -> str:
    tag = "ol" if gallery.ordered else "ul"
    items: list[str] = []
    for picture in gallery.pictures:
        lines = "".join(f"<span>{html.escape(line)}</span>" for line in picture.lines)
        mark = (
            f'<span class=mark aria-hidden="true">{html.escape(picture.mark)}</span>' if picture.mark else ""
        )
        width, height = picture.image.size
        items.append(
            f"<li{' class=highlighted' if picture.highlighted else ''}><figure>{mark}"
            f'<img src="{data_uri(picture.image)}" width="{width}" height="{height}" '
            f'alt="{html.escape(picture.alternative, quote=True)}">'
            + (f"<figcaption>{lines}</figcaption>" if lines else "")
            + "</figure></li>\n"
        )
    caption = f"<h3>{html.escape(gallery.caption)}</h3>\n" if gallery.caption else ""
    style = f"--columns:{gallery.columns};--columns-phone:{max(gallery.columns // 2, 2)}"
    return f'<div class=gallery>\n{caption}<{tag} style="{style}">\n{"".join(items)}</{tag}>\n</div>\n'


def render_table(table: Table) -> str:
    def cells(row: Sequence[str]) -> str:
        first, *rest = row
        return f'<th scope="row">{html.escape(first)}</th>' + "".join(
            f"<td{' class=text' if index < table.text_columns else ''}>{html.escape(cell)}</td>"
            for index, cell in enumerate(rest, start=1)
        )

    head = "".join(
        f'<th scope="col"{" class=text" if index < table.text_columns else ""}>{html.escape(header)}</th>'
        for index, header in enumerate(table.headers)
    )
    body = "".join(f"<tr>{cells(row)}</tr>\n" for row in table.rows)
    caption = f"<figcaption>{html.escape(table.caption)}</figcaption>\n" if table.caption else ""
    label = html.escape(table.caption or ", ".join(table.headers), quote=True)
    return (
        f'<figure class=table>\n{caption}<div role="region" tabindex="0" aria-label="{label}">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n</figure>\n"
    )


def data_uri(image: Image.Image) -> str:
    """The picture inside the page, losslessly.

    >>> data_uri(Image.new("RGB", (1, 1))).startswith("data:image/png;base64,")
    True
    """
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
