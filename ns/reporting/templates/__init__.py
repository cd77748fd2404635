"""The templates of all pages: they escape everything and share one style."""

import base64
import hashlib
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined

from ns.core.log import format_duration

SCRIPTLESS = "'none'"
"""The `scripts` of a page without scripts."""


@cache
def make_environment() -> Environment:
    """Keys and class names come from outside, so everything is escaped except what our own code marks as markup."""
    templates = Environment(
        loader=PackageLoader("ns.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "percent": lambda value: f"{100 * value:.1f} %",
        "points": lambda value: f"{100 * value:+.1f}",
        "count": lambda value: f"{value:,}",
        "seconds": format_duration,
    }
    return templates


def load_script(name: str) -> tuple[str, str]:
    """A script's text, and the source expression by which a page's policy allows this script only (CSP 3, §6.7.3.3)."""
    text = (files("ns.reporting.templates") / name).read_text(encoding="utf-8")
    return text, f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
