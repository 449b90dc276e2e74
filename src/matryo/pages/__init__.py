"""Pages of one HTML file: no scripts, nothing fetched, every text escaped. Their style and their charts."""

from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup


def rendered(package: str, template: str, **content: Any) -> str:
    """A page from a room's template, which has the common style under the name `style`."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = resources.files(package).joinpath(template).read_text(encoding="utf-8")
    style = resources.files("matryo.pages").joinpath("style.css").read_text(encoding="utf-8")
    return environment.from_string(text).render(style=Markup(style), **content)  # our own file, no text of a user
