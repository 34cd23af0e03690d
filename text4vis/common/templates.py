"""HTML from Jinja templates: every value is escaped, and an unknown name is an error."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def html_templates(package: str, show: Callable[[str], str]) -> Environment:
    """The templates that lie beside a package's modules. show: makes a value's text fit to be seen, before escaping."""
    return Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else show(str(value)),
    )
