"""The templates of all pages: they escape everything and share one style."""

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ns.core.log import format_duration


def render_page(template: str, *, title: str, scripts: str = "'none'", **fields: Any) -> str:
    """One HTML page that loads nothing. `scripts`: the source expression of the scripts that the page may run."""
    return _make_page_environment().get_template(template).render(title=title, scripts=scripts, **fields)


@cache
def _make_page_environment() -> Environment:
    return make_environment()


def make_environment(**options: Any) -> Environment:
    """The templates with their filters; `options` are further ones of Jinja."""
    # Keys and class names come from outside, so everything is escaped except what our own code marks as markup.
    templates = Environment(
        loader=PackageLoader("ns.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    templates.filters |= {
        "percent": lambda value: f"{100 * value:.1f} %",
        "points": lambda value: Markup(f"{100 * value:+.1f}"),
        "count": lambda value: f"{value:,}",
        "seconds": format_duration,
    }
    return templates


def load_script(name: str) -> tuple[str, str]:
    """A script's text, and the source expression by which a page's policy allows this script only (CSP 3, §6.7.3.3)."""
    text = (files("ns.reporting.templates") / name).read_text(encoding="utf-8")
    return text, f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
