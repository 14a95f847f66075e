"""What all pages share: one file each, that fetches nothing, with numbers written the way people write them.

Words and layout live in ``templates/``; a page fills the blocks of ``page.html.j2``. Here are the template engine, that
escapes every value, and the filters that turn numbers into text.

    pages.render("demo.html.j2", {"title": "...", ...})
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from importlib import resources
from pathlib import PurePath
from typing import Any

import jinja2
from markupsafe import Markup

from sdegen.style import SUPERSCRIPT

__all__ = ["command", "fixed", "moment", "render", "sig", "signed", "whole"]


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page as text.

    Args:
        template: its name in ``templates/``.
        context: everything that the template names; a name that is missing is an error.
    """
    return _environment().get_template(template).render(context)


def fixed(value: float, digits: int = 3) -> str:
    """A number with so many decimals; a dash where there is none.

    >>> fixed(1.75449), fixed(float("nan"))
    ('1.754', '–')
    """
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def sig(value: float, digits: int = 2) -> str:
    """A number with so many significant digits, and powers of ten only where it is tiny or huge.

    >>> sig(0.08534), sig(-1.7551), sig(0.0000034), sig(123456.0)
    ('0.085', '−1.8', '3.4·10⁻⁶', '1.2·10⁵')
    """
    if not math.isfinite(value) or value == 0:
        return "–"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    if decimals < 6 and abs(value) < 1e5:
        return f"{value:.{decimals}f}".replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.replace('-', '−')}·10{str(int(exponent)).translate(SUPERSCRIPT)}"


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, a real minus among them; see :func:`fixed`.

    >>> signed(-0.01234), signed(0.5)
    ('−0.012', '+0.500')
    """
    return f"{value:+.{digits}f}".replace("-", "−")


def whole(value: float) -> str:
    """A count; a dash for none.

    >>> whole(1234.0), whole(0)
    ('1,234', '–')
    """
    return f"{value:,.0f}" if value else "–"


def moment(created: str) -> str:
    """A time in ISO 8601 for people.

    >>> moment("2026-03-01T09:05:00+00:00")
    '1 March 2026, 09:05 UTC'
    """
    return f"{datetime.fromisoformat(created):%-d %B %Y, %H:%M} UTC"


def command(words: str) -> str:
    """A command line without the folder that the program lies in.

    >>> command("/home/me/.venv/bin/sdegen demo --fast"), command("/x/sdegen/__main__.py demo")
    ('sdegen demo --fast', 'sdegen demo')
    """
    program, _, rest = words.partition(" ")
    name = PurePath(program).name
    return f"{'sdegen' if name == '__main__.py' else name} {rest}".strip()


@cache
def _environment() -> jinja2.Environment:
    """Templates with every value escaped; a name that does not exist is an error and not an empty string."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sdegen"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(fixed=fixed, sig=sig, whole=whole, signed=signed)
    for name, file in (("css", "page.css"), ("script", "page.js")):
        text = resources.files("sdegen").joinpath("templates", file).read_text(encoding="utf-8")
        environment.globals[name] = Markup(text)
    return environment
