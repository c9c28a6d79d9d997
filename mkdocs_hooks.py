"""What the site does with text and files that lie outside docs/, and with docstrings.

In: the Markdown of docs/, as it reads on a code host. Out: the same for the site:

    [text](../examples/own_model.py)                 the file is copied into the site, and the link leads there
    [text](../CONTRIBUTING.md#a-new-method)          the page of the site that stands for it
    <!-- include: CONTRIBUTING.md#a-new-method -->   that section's text, without its heading

Docstrings name several things in one line where one text says it of all ("cloud, edge: where the models are."); Griffe,
which reads them for the API reference, wants a line for each (`OneNameALine`).
"""

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "extending.md"}
COPIES = "repository"

_FENCE = re.compile(r"(^```.*?^```\s*?$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?(?=\))")
# At the indentation of an item: "name, name: text", with the more deeply indented lines that follow.
_SHARED = re.compile(r"^    (\w+(?:, \w+)+):( .*(?:\n     .*)*)", re.MULTILINE)
# An item of Raises that names no error: it refers to what another function raises.
_REFERRED = re.compile(r"(?<=Raises:\n)    (?=as `[^\n:]*$)", re.MULTILINE)
_INCLUDE = re.compile(r"^<!-- include: (\S+?)#(\S+) -->$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Adds the repository's files that pages link to."""
    for page in list(files.documentation_pages()):
        folder = posixpath.join("docs", posixpath.dirname(page.src_uri))
        for path in _linked(_with_includes(page.content_string), folder):
            copy = f"{COPIES}/{path}"
            if path not in PAGES and _outside(path) and (ROOT / path).is_file() and copy not in files.src_uris:
                files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with its includes, and with links that lead somewhere in the site."""
    return _with_links(_with_includes(markdown), posixpath.dirname(page.file.src_uri))


def section(text: str, anchor: str) -> str | None:
    """The text below the heading with that anchor, up to the next heading of its level or a higher one."""
    lines, level, found = text.splitlines(), 0, []
    fenced = False
    for line in lines:
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"(#+) (.+)", line)
        if heading and level and len(heading[1]) <= level:
            break
        if level:
            found.append(line)
        elif heading and anchor_of(heading[2]) == anchor:
            level = len(heading[1])
    return "\n".join(found).strip() if level else None


def anchor_of(heading: str) -> str:
    """The anchor of a heading, alike on a code host and in the site."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).strip().replace(" ", "-")


def _with_includes(markdown: str) -> str:
    """Raises PluginError for a section that is not there."""

    def text(match: re.Match) -> str:
        found = section((ROOT / match[1]).read_text(encoding="utf-8"), match[2])
        if found is None:
            raise PluginError(f"{match[1]} has no section #{match[2]}")
        # Its links start where the included file lies; from docs/ that is one folder up.
        return _rewritten(found, lambda path, anchor: f"../{path}{anchor}")

    return _INCLUDE.sub(text, markdown)


def _with_links(markdown: str, folder: str) -> str:
    def link(target: str, anchor: str) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path in PAGES:
            inside = PAGES[path]
        elif not _outside(path):
            inside = posixpath.relpath(path, "docs")
        elif (ROOT / path).is_file():
            inside = f"{COPIES}/{path}"
        else:
            return target + anchor  # the strict build names it
        return posixpath.relpath(inside, folder or ".") + anchor

    return _rewritten(markdown, link)


def _rewritten(markdown: str, change: Callable[[str, str], str]) -> str:
    """With every relative link outside of code blocks changed."""
    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(lambda match: change(match[1], match[2] or ""), part) for part in parts[::2]]
    return "".join(parts)


def _linked(markdown: str, folder: str) -> Iterator[str]:
    for part in _FENCE.split(markdown)[::2]:
        for match in _LINK.finditer(part):
            yield posixpath.normpath(posixpath.join(folder, match[1]))


def _outside(path: str) -> bool:
    return not path.startswith("docs/")


class OneNameALine(griffe.Extension):
    """Gives every name of an Args, Attributes or Raises section a line of its own, before Griffe reads it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None and not obj.is_alias:
            text = _SHARED.sub(lambda found: "\n".join(_items(found)), obj.docstring.value)
            obj.docstring.value = _REFERRED.sub("    LoraGenError: ", text)


def _items(found: re.Match) -> Iterator[str]:
    for name in found[1].split(", "):
        yield f"    {name}:{found[2]}"
