r"""Turns the TeX of a page into MathML while mkdocs builds it, so that formulas need no script and no
network.

`pymdownx.arithmatex` leaves `\(...\)` and `\[...\]` in elements of class `arithmatex`; browsers draw MathML
themselves.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', flags=re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    def to_mathml(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match[3]).strip(), display=display)

    return _FORMULA.sub(to_mathml, content)
