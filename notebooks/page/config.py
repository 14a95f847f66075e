"""How nbconvert makes pages of notebooks: the template beside this file, the reports' style, formulas as MathML."""

from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

HERE = Path(__file__).parent


class Prose(IPythonRenderer):
    """Markdown whose formulas need no script."""

    def block_math(self, body: str) -> str:
        return _spaced(convert(body.strip(), display="block"))

    def inline_math(self, body: str) -> str:
        return _spaced(convert(body))


def _spaced(formula: str) -> str:
    """A thin space after the names of functions."""
    return formula.replace("<mi>log</mi>", '<mi>log</mi><mspace width="0.17em"/>')


def prose(source: str) -> str:
    """A cell of text as HTML; notebooks that it names are pages too."""
    return MarkdownWithMath(renderer=Prose(escape=False)).render(source.replace(".ipynb)", ".html)"))


c: Any = get_config()  # type: ignore[name-defined]  # noqa: F821
c.NbConvertApp.log_level = "ERROR"
c.HTMLExporter.template_name = "page"
c.TemplateExporter.extra_template_basedirs = [str(HERE.parent)]
c.TemplateExporter.extra_template_paths = [str(HERE.parent.parent / "sdegen" / "templates")]
c.TemplateExporter.filters = {"prose": prose}
