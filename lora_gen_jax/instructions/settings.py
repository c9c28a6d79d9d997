"""Where requests go and with which key. In: flags and an environment variable. Out: `Settings`, or an error."""

import os
import urllib.parse
from dataclasses import dataclass, field

from lora_gen_jax.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """What requests are made of.

    Attributes:
        url: of the chat completions.
        model: its name there.
        key: sent as a bearer token; None sends none.
        key_name: the environment variable that the key is from, for errors.
        timeout: seconds that the endpoint may be silent.
        retries: of a request that fails in a way that passes.
    """

    url: str
    model: str
    key: str | None = field(repr=False)
    key_name: str
    timeout: float = 120.0
    retries: int = 6


def chat_url(endpoint: str) -> str:
    """The address of chat completions: of a server (http://host:8000), a base (…/v1), or itself.

    Raises:
        ConfigError: for what is no such address, or has a password in it.
    """
    try:
        parts = urllib.parse.urlsplit(endpoint)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        known, parts = False, urllib.parse.urlsplit("")
    if "@" in endpoint.partition("?")[0]:
        raise ConfigError(
            "--endpoint holds a user or password",
            field="--endpoint",
            code="password",
            remedy="give keys by an environment variable, --api-key-env",
        )
    if not known or not endpoint.isascii() or not endpoint.isprintable() or " " in endpoint:
        raise ConfigError(
            f"--endpoint is {endpoint!r}",
            field="--endpoint",
            code="address",
            remedy="give the address of a server, as http://localhost:8000/v1",
        )
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = (path or "/v1") + "/chat/completions"
    return urllib.parse.urlunsplit(parts._replace(path=path, fragment=""))


def api_key(name: str, given: bool) -> str | None:
    """The key in the environment variable `name`; None where there is none, or no name.

    Raises:
        ConfigError: when a variable that was `given` on the command line is not set, or holds what is no key.
    """
    key = os.environ.get(name, "").strip() if name else ""
    if not key:
        if name and given:
            raise ConfigError(
                f"--api-key-env names {name}, which is not set",
                field="--api-key-env",
                code="unset",
                remedy="put the endpoint's key there",
            )
        return None
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"the environment variable {name} (--api-key-env) holds characters that no key has",
            field="--api-key-env",
            code="characters",
        )
    return key
