"""A page that can be sent to a colleague: one HTML file, no scripts, nothing fetched from elsewhere."""

import html
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import biomamba_jax
from biomamba_jax import files

# Seen on white and on near-black alike.
COLOURS = ("#2f7ed8", "#e0702d", "#2a9d6f", "#b05cc8", "#c9a227", "#d1495b")
_INK = "#123456"  # stands for the page's own text colour until the SVG is written


def text(value: object) -> str:
    """`value` as it is, with what HTML would read as markup escaped."""
    return html.escape(str(value))


def figure(value: float | None) -> str:
    """A number to four digits; a dash for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}".rstrip(".")


def section(title: str, content: str) -> str:
    """A part of the page under its title; nothing where it is empty."""
    return f"<section><h2>{text(title)}</h2>{content}</section>" if content else ""


def figures(svgs: Sequence[str]) -> str:
    """Plots side by side, as many as fit."""
    return f'<div class="curves">{"".join(f"<figure>{svg}</figure>" for svg in svgs)}</div>' if svgs else ""


def environment_table(about: Mapping[str, Any]) -> str:
    """A table of what `environment` tells."""
    rows = {name: value for name, value in about.items() if name not in ("versions", "starts", "headline")}
    if "versions" in about:
        rows["versions"] = " · ".join(f"{package} {version}" for package, version in about["versions"].items())
    lines = "".join(f"<tr><th>{text(name.replace('_', ' '))}</th><td>{text(v)}</td></tr>" for name, v in rows.items())
    return f'<table class="environment"><tbody>{lines}</tbody></table>' if lines else ""


def label(name: str) -> str:
    """A name as Matplotlib shows it as it is: it takes text between dollars for a formula, and leaves names that begin
    with an underscore out of a legend."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def svg(title: str, draw: Callable[[Any], None]) -> str:
    """One plot as SVG whose text and axes take the colour of the page around it.

    Args:
      draw: gets Matplotlib's axes; names that users gave go through `label`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    style: Any = dict.fromkeys(ink, _INK) | {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # the ids of two plots on one page must differ, and those of two writings agree
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.15,
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(style):
        picture = Figure(figsize=(6, 3.4), layout="constrained")
        axes = picture.add_subplot()
        axes.set_title(label(title), loc="left", fontweight="bold", fontsize=11)
        axes.grid(True)
        draw(axes)
        buffer = io.StringIO()
        picture.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    content = buffer.getvalue()
    content = content[content.index("<svg") :].replace(_INK, "currentColor")
    opening, rest = content.split(">", 1)
    # Without a size of its own the picture fills the width of its column.
    kept = " ".join(part for part in opening.split() if not part.startswith(('width="', 'height="')))
    return f'{kept} role="img" aria-label="{text(title)}">{rest}'


def write(path: Path, title: str, body: Sequence[str]) -> None:
    """Writes the page `path`, whole or not at all.

    Args:
      body: parts in HTML, one behind the other.
    """
    when = time.strftime("%Y-%m-%d %H:%M:%S %z")
    footer = f"<footer>Written {when} by biomamba-jax {biomamba_jax.__version__}.</footer>"
    files.write_text(path, _PAGE.format(title=text(title), style=_STYLE, body="\n".join([*body, footer])))


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6878; --line: #dfe3ea; --page: #ffffff; --card: #f5f7fa;
  --accent: #2f7ed8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #98a3b3; --line: #2d3542; --page: #12161d;
  --card: #1b212b; --accent: #6cabf5; } }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.75rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
header p, footer { color: var(--soft); margin: .25rem 0 0; }
footer { margin-top: 3rem; font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem;
  margin-top: 1.5rem; }
.figures div { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; }
.figures strong { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures span { color: var(--soft); font-size: .85rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
ul + .curves { margin-top: 1rem; }
figure { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: .5rem; }
figure svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem .75rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th, .environment th { color: var(--soft); font-weight: 500; }
.number, .results :is(th, td):nth-child(n+3), .columns :is(th, td):nth-child(n+2) { text-align: right;
  font-variant-numeric: tabular-nums; }
.results .final td { font-weight: 600; } .results .final td:nth-child(n+3) { color: var(--accent); }
.columns { display: block; overflow-x: auto; margin-bottom: 1rem; font-size: .92rem; }
.columns .heading th { padding-top: 1.25rem; text-align: left; } small { color: var(--soft); white-space: nowrap; }
.environment { font-size: .9rem; } .environment td { overflow-wrap: anywhere; } .environment th { white-space: nowrap; }
ul { padding-left: 1.25rem; margin: 0; }
pre { background: var(--card); border-radius: .5rem; padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .85rem; margin: 0; }
pre + pre { margin-top: .5rem; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
