"""HTML pages from the package's templates: one file that can be sent to a colleague, nothing fetched."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

import biomamba_jax
from biomamba_jax import files
from biomamba_jax.tables import shown

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("biomamba_jax"),
    autoescape=lambda name: not str(name).endswith(".md.jinja"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
"""The package's templates: HTML with autoescape, and the Markdown of model cards."""
TEMPLATES.filters["shown"] = shown
_INK = "#123456"  # in plots.mplstyle, where the colour of the page's text is to be


class Plot(NamedTuple):
    """A drawing and its title."""

    title: str
    """Text, shown above the drawing."""
    svg: Markup
    """The drawing as SVG; its text and axes take the colour of the page's text."""


def write(path: Path, template: str, **content: Any) -> Path:
    """Write a page, whole or not at all.

    Args:
      path: the file to write.
      template: name of one of the package's templates, for instance "training".
      content: variables of the template; every template requires `title`.

    Returns:
      `path`.
    """
    page = TEMPLATES.get_template(f"{template}.html.jinja")
    written = time.strftime("%Y-%m-%d %H:%M:%S %z")
    files.write_text(path, page.render(content, written=written, version=biomamba_jax.__version__))
    return path


def legend_label(name: str) -> str:
    """Return a name that Matplotlib shows in a legend; it leaves out those that begin with an underscore."""
    return ("\u200b" if name.startswith("_") else "") + name


def plot(title: str, draw: Callable[[Any], None]) -> Plot:
    """Draw one plot in the style of the pages.

    Args:
      title: the plot's title, unique on its page.
      draw: draws on the given Matplotlib axes.
    """
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    # The hash salt: ids of two plots on one page differ, and writing a plot twice gives the same ids.
    with style.context([Path(__file__).parent / "templates" / "plots.mplstyle", {"svg.hashsalt": title}]):
        picture = Figure()
        axes = picture.add_subplot()
        draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":  # plain numbers instead of powers
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:,g}")
                axis.set_minor_formatter(NullFormatter())
        buffer = io.StringIO()
        picture.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    return Plot(title, Markup(svg[svg.index("<svg") :].replace(_INK, "currentColor")))
