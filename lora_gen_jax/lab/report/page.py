"""A page that needs nothing but itself. In: sections of figures and tables. Out: HTML as text.

Images are data URIs, the style is inside, there is no script. Figures stand on white, which they were drawn for, in
both colour schemes.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1c1c1c; --soft: #5c5c5c; --paper: #fdfdfc; --line: #d8d8d4; --zebra: #f3f3f0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e3; --soft: #a5a5a0; --paper: #181818; --line: #3c3c3a; --zebra: #222221; }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .3rem; } h2 { margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { margin: 1.4rem 0 .3rem; font-size: 1rem; }
a { color: inherit; } nav a { margin-right: 1rem; white-space: nowrap; } code { font-size: .9em; }
figure { margin: 1rem 0; } figure > img { max-width: 100%; background: #fff; border-radius: 6px; padding: 6px;
  box-sizing: border-box; border: 1px solid var(--line); }
figcaption, .note { color: var(--soft); font-size: .9rem; max-width: 60rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } tbody tr:nth-child(even) { background: var(--zebra); }
.published { border-left: 4px solid #b8a41f; padding-left: 1rem; } .published th, .published td { text-align: left; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; } .tiles figure { margin: 0; width: 9rem; }
.tiles img, img.scale { image-rendering: pixelated; background: #fff; border: 1px solid var(--line); border-radius: 0;
  padding: 0; }
.tiles img { width: 100%; } .tiles figcaption { font-size: .7rem; line-height: 1.25; overflow-wrap: anywhere; }
img.scale { width: 12rem; height: .8rem; vertical-align: middle; margin: 0 .4rem; }
pre { overflow-x: auto; font-size: .8rem; background: var(--zebra); padding: .8rem; }
"""


@dataclass
class Section:
    """A part of the page.

    Attributes:
        anchor: its name in the page's address.
        title: its heading.
        parts: HTML, in order.
    """

    anchor: str
    title: str
    parts: list[str] = field(default_factory=list)


def page(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page."""
    body = [f"<h1>{escape(title)}</h1>", *lead]
    links = (f'<a href="#{escape(section.anchor)}">{escape(section.title)}</a>' for section in sections)
    body.append(f"<nav>{' '.join(links)}</nav>")
    for section in sections:
        heading = f"<h2>{escape(section.title)}</h2>"
        body.append(f'<section id="{escape(section.anchor)}">{heading}{"".join(section.parts)}</section>')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def data_uri(png: bytes) -> str:
    """A PNG as an address."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def picture(path: Path, what: str, source: str) -> str:
    """A figure: what is shown, and from which file and command it comes."""
    caption = f"{escape(what)} <br>From {escape(source)}. File: <code>{escape(path.name)}</code>"
    address = data_uri(path.read_bytes())
    return f'<figure><img alt="{escape(what)}" src="{address}"><figcaption>{caption}</figcaption></figure>'


def small_picture(png: bytes, caption: str, height: int) -> str:
    """A heat map among many; `height` in pixels."""
    alt = f'alt="gates of {escape(caption)}" title="{escape(caption)}"'
    image = f'<img {alt} style="height:{height}px" src="{data_uri(png)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def folded(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def note(text: str) -> str:
    """A remark."""
    return f'<p class="note">{escape(text)}</p>'
