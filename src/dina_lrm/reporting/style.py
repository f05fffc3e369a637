"""What all our drawings share: colours that become a page's own, lines and text, and SVG for a page.

A figure is drawn in placeholder colours, which nobody would choose to see; in a page they become CSS
variables, so that one drawing serves light and dark.
"""

import io
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from matplotlib.figure import Figure

__all__ = ["INK", "MUTED", "RULE", "SERIES", "STYLE", "page_svg"]

INK, MUTED, RULE = "#0a0001", "#0a0002", "#0a0003"
SERIES = ("#0a0011", "#0a0012", "#0a0013", "#0a0014")

STYLE: dict[str, Any] = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "svg.fonttype": "none",  # text stays text: it can be read aloud, selected and searched
}
"""matplotlib's settings."""


def page_svg(
    figure: Figure, label: str, *, variables: Mapping[str, str], font: str, attributes: str = ""
) -> str:
    """Markup of a figure for a page, to be called within its style.

    Args:
        label: read to those who cannot see it.
        variables: CSS variable of each placeholder colour.
        font: CSS variable of the page's font.
        attributes: of the svg element, such as `class="plot"`.
    """
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]+", rf"\1 var({font})", svg)
    for colour, variable in variables.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg", f'<svg {attributes}role="img" aria-label="{escape(label)}"', 1)
