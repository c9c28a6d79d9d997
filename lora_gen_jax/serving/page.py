"""The playground: one page, at /, that makes, asks and corrects specializations through the HTTP interface.

In: `page.html`, with its style and its script inside. Out: a response whose policy lets the browser run these two alone
and reach this server alone.
"""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from fastapi.responses import Response


@cache
def page_text() -> str:
    """The page."""
    return (files("lora_gen_jax.serving") / "page.html").read_text(encoding="utf-8")


@cache
def page_policy() -> str:
    """The page's Content-Security-Policy: its own style and script, known by their hashes; requests to this server."""
    style, script = (_hashes(tag) for tag in ("style", "script"))
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {script}",
            f"style-src {style}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hashes(tag: str) -> str:
    inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page_text(), re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in inside)


async def page_response() -> Response:
    """The page, with headers that keep it to itself."""
    headers = {
        "Content-Security-Policy": page_policy(),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
    return Response(page_text(), media_type="text/html", headers=headers)
