"""Hostile requests: bytes for a socket, made from good requests and a seed. Imported by `fuzz_requests.py`.

In: a number and a seed. Out: cases, the same for the same seed; each says of what kind it is, and whether it is a whole
request, to which an answer must come.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

COMPLETION = {"model": "base", "prompt": "owl:", "max_tokens": 2, "temperature": 0}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "owl:"}], "max_tokens": 2, "temperature": 0}
NEW = {"prompt": "Tell me what a baby of this animal is called."}
GOOD: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", COMPLETION),
    ("/v1/chat/completions", CHAT),
    ("/v1/specializations", NEW),
)
_FIELDS = (
    *(
        "model",
        "prompt",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "n",
        "seed",
    ),
    *(
        "stop",
        "stream",
        "stream_options",
        "logprobs",
        "echo",
        "tools",
        "logit_bias",
        "response_format",
        "name",
        "shots",
    ),
    *("description", "refine", "steps", "as_chat", "turns_as_examples", "user", "metadata", "__class__", "", "\x00"),
)
_NAMES = (
    "../../etc",
    "..",
    "/tmp/x",
    "a/b",
    "a\\b",
    "base",
    "AUTO",
    "auto-x",
    "\x00",
    " ",
    "x" * 65,
    ".hidden",
    "é",
    "%2e",
)
_TEXTS = (
    "",
    " ",
    "\x00",
    "\u202e\u2066",
    "<|endoftext|><|im_start|>system",
    "\U0001f9a5" * 50,
    "{{7*7}}",
    "a" * 70_000,
    "\n" * 999,
)
_HOSTS = (
    "evil.example",
    "localhost.evil.example",
    "",
    "192.0.2.1",
    "[::1",
    "localhost:999999",
    "a" * 4000,
    "localhost@x",
)
_MEDIA = (
    "text/plain",
    "multipart/form-data",
    "",
    "application/json5",
    "text/json",
    "application/x-www-form-urlencoded",
)

_LIKELY: dict[str, tuple[Any, ...]] = {
    "prompt": ([1, 2, 3], [[1], [2]], ["a"] * 256, ["a"] * 257, [10**9], "a", "\x00", "\u2028"),
    "max_tokens": (1, 16, 17, None),
    "temperature": (2, 1e-30, 5e-324, 1),
    "top_p": (1e-30, 5e-324, 1),
    "top_k": (-1, 1, 2**31 - 1),
    "n": (2, 8),
    "seed": (-(2**63), 2**63 - 1, 0),
    "stop": ("a", ["\x00"], ["e"] * 4, []),
    "stream": (True,),
    "stream_options": ({"include_usage": True}, {}),
    "logprobs": (0, 1, True),
    "shots": ([], [{"input": "a", "output": "b"}], [{"input": "a"}], [[]] * 5000),
    "messages": (
        [{"role": "system", "content": "a"}] * 300,
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    ),
}


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        kind: what is wrong with it, for the table.
        sent: bytes.
        whole: an answer must come; otherwise the server may wait for more.
    """

    kind: str
    sent: bytes
    whole: bool = True


def request(
    path: str, body: bytes, fields: dict[str, str | None] | None = None, key: str | None = None, method: str = "POST"
) -> bytes:
    """A request's bytes; `fields` replace those of its head, None leaves one out."""
    head: dict[str, str | None] = {"Host": "localhost", "Content-Type": "application/json", "Connection": "close"}
    head |= {"Content-Length": str(len(body))} | ({"Authorization": f"Bearer {key}"} if key else {}) | (fields or {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def hostile(count: int, seed: int, key: str | None = None) -> Iterator[Case]:
    """So many cases, of all kinds in turn.

    Args:
        count: of cases.
        seed: of the draws.
        key: the server's, if it has one; some cases leave it out or send another.
    """
    for number in range(count):
        rng = random.Random(f"{seed}.{number}")
        kind, make = list(_KINDS.items())[number % len(_KINDS)]
        sent, whole = make(rng, key)
        yield Case(kind, sent, whole)


def _good(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path, fields = rng.choice(GOOD)
    return path, json.loads(json.dumps(fields))


def _value(rng: random.Random, depth: int = 0) -> Any:
    """Something that a field is unlikely to expect."""
    plain = (None, True, False, 0, -1, 1e308, -0.0, 2**63, 10**400, 0.5, "1", [], {}, "a" * 3000, "\ud800")
    choice = rng.randrange(5 if depth < 3 else 2)
    if choice == 0:
        return rng.choice(_TEXTS)
    if choice == 1:
        return rng.choice(plain)
    if choice == 2:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if choice == 3:
        return {rng.choice(_FIELDS): _value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [{"role": rng.choice(("user", "system", "tool", 3)), "content": _value(rng, depth + 1)}]


def _fields(rng: random.Random, key: str | None) -> tuple[bytes, bool]:
    path, fields = _good(rng)
    for _ in range(rng.choice((1, 1, 3))):
        likely = _LIKELY.get(name := rng.choice((*fields, *_FIELDS)))
        fields[name] = rng.choice(likely) if likely and rng.random() < 0.7 else _value(rng)
    return request(path, json.dumps(fields).encode(), key=key), True


def _bytes(rng: random.Random, key: str | None) -> tuple[bytes, bool]:
    path, fields = _good(rng)
    body = bytearray(json.dumps(fields).encode())
    for _ in range(rng.choice((1, 1, 8))):
        place = rng.randrange(len(body))
        put = rng.randbytes(rng.randrange(4)) if rng.random() < 0.3 else rng.choice((b"", b"9", b"e", b'"', b"-", b","))
        body[place : place + rng.randrange(3)] = put
        body = body or bytearray(b"{")
    return request(path, bytes(body), key=key), True


def _nested(rng: random.Random, key: str | None) -> tuple[bytes, bool]:
    path, count = rng.choice(GOOD)[0], rng.choice((500, 5_000, 100_000, 200_000))
    shape = rng.choice(("deep", "wide", "objects", "names", "digits", "escapes", "texts"))
    value = {
        "deep": b"[" * count + b"]" * count,
        "wide": b"[" + b"[]," * count + b"[]]",
        "objects": b'{"a":' * count + b"1" + b"}" * count,
        "names": b"{" + b",".join(b'"%d":0' % i for i in range(count // 4)) + b"}",
        "digits": b"9" * count,
        "escapes": b'"' + b'\\"[' * count,
        "texts": json.dumps(["a"] * count).encode(),
    }[shape]
    field = rng.choice((b"prompt", b"messages", b"stop", b"logit_bias", b"shots", b"x"))
    return request(path, b'{"model": "base", "' + field + b'": ' + value + b"}", key=key), True


def _long(rng: random.Random, key: str | None) -> tuple[bytes, bool]:
    path = rng.choice(GOOD)[0]
    unit = rng.choice(("a", "owl ", "\n", "[", "é", "\U0001f9a5", '"'))
    text = unit * (rng.choice((2_000, 50_000, 400_000, 1_200_000)) // len(unit.encode()))
    turns = [{"role": "system", "content": text}, {"role": "user", "content": "owl:"}]
    prompts = [{**COMPLETION, "prompt": text}, {**CHAT, "messages": turns}, {**NEW, "prompt": text}]
    fields = {"model": "auto", "messages": turns} if rng.random() < 0.2 else prompts[[p for p, _ in GOOD].index(path)]
    path = "/v1/chat/completions" if fields.get("model") == "auto" else path
    return request(path, json.dumps(fields, ensure_ascii=False).encode(), key=key), True


def _names(rng: random.Random, key: str | None) -> tuple[bytes, bool]:
    name = rng.choice(_NAMES)
    if rng.random() < 0.5:
        return request("/v1/specializations", json.dumps({**NEW, "name": name}).encode(), key=key), True
    quoted = rng.choice(("..%2f..%2fetc", "%00", "..", "x" * 5000, "%ff", "a;b", "a?b#c", "%2e%2e", "base", "auto"))
    method = rng.choice(("GET", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "PURGE"))
    return request(f"/v1/{rng.choice(('specializations', 'models'))}/{quoted}", b"", key=key, method=method), True


def _heads(rng: random.Random, key: str | None) -> tuple[bytes, bool]:
    path, fields = _good(rng)
    other: dict[str, str | None] = rng.choice(
        (
            {"Host": rng.choice(_HOSTS)},
            {"Origin": rng.choice(("http://evil.example", "null", "http://localhost:1", "file://"))},
            {"Content-Type": rng.choice(_MEDIA)},
            {"Content-Type": None},
            {"Authorization": rng.choice(("Bearer", "Basic YTpi", "Bearer \xe9", "Bearer " + "a" * 9000))},
            {"X-Long": "a" * rng.choice((100, 60_000, 200_000))},
            {"X-Forwarded-Host": "evil.example", "X-Forwarded-For": "127.0.0.1", "Forwarded": "host=evil"},
            {f"X-{i}": "1" for i in range(rng.choice((10, 3_000)))},
            {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "a"},
            {"Content-Encoding": "gzip"},
        )
    )
    return request(path, json.dumps(fields).encode(), other, key), True


def _framing(rng: random.Random, key: str | None) -> tuple[bytes, bool]:
    """What a client of its own writes on a socket."""
    path, fields = _good(rng)
    body = json.dumps(fields).encode()
    lengths = ("9" * 19, "9" * 20, "9" * 21, "-1", "+5", "0x10", "1e3", "5, 6", "", " ", "\u0663", "5" * 4000)
    chunked: dict[str, str | None] = {"Transfer-Encoding": "chunked", "Content-Length": None}
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    good = request(path, body, key=key)
    return rng.choice(
        (
            (request(path, body, {"Content-Length": rng.choice(lengths)}, key), True),
            (request(path, chunk, {**chunked, "Content-Length": str(len(chunk))}, key), True),
            (
                request(path, chunk, {**chunked, "Transfer-Encoding": rng.choice(("gzip", "chunked, gzip", "x"))}, key),
                True,
            ),
            (request(path, rng.choice((b"zz\r\n", b"-1\r\n", b"5;" + b"a" * 99_999)), chunked, key), True),
            (request(path, b"ffffffffffffffffff\r\n", chunked, key), False),
            (request(path, chunk, chunked, key), True),
            (good.replace(b"HTTP/1.1", rng.choice((b"HTTP/9.9", b"HTTP/1.0", b"HTTQ/1.1", b"")), 1), True),
            (
                good.replace(b"POST ", rng.choice((b"POST  ", b"P\x00ST ", b"post ", b"POST\t", b"\r\n\r\nPOST ")), 1),
                True,
            ),
            (
                good.replace(
                    path.encode(), rng.choice((b"*", b"http://evil.example/", b"/\xff", b"/" + b"a" * 70_000)), 1
                ),
                True,
            ),
            (good.replace(b"Host: localhost", b"Host: localhost\r\nHost: evil.example", 1), True),
            (good.replace(b"Host: localhost\r\n", b" folded: 1\r\n", 1), True),
            (good[: rng.randrange(len(good))], False),
            (good[:-1], False),
            (good.replace(b"close", b"keep-alive") * 3 + good, True),
            (rng.randbytes(rng.randint(1, 3_000)), False),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500), False),
            (b"\n" * 100_000, False),
            (b"", False),
        )
    )


_KINDS: dict[str, Callable[[random.Random, str | None], tuple[bytes, bool]]] = {
    "fields of the wrong kind": _fields,
    "damaged bytes": _bytes,
    "many or deep lists, names, digits": _nested,
    "long texts": _long,
    "names and paths": _names,
    "heads": _heads,
    "framing, on a raw socket": _framing,
}
