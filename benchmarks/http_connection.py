"""A small HTTP/1.1 client over kept connections, for load: quicker than a library, so that the server is what is timed.

In: a path and a body. Out: status, header fields, body. Imported by the benchmarks beside it.
"""

import asyncio
from collections.abc import AsyncIterator


class Connection:
    """One kept connection, opened again when it was closed; one request at a time."""

    def __init__(self, host: str, port: int):
        self.host, self.port = host, port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def send(self, path: str, body: bytes) -> None:
        """Sends a request; opens the connection where there is none."""
        if self.writer is None or self.writer.is_closing():
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        fields = f"Host: {self.host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        head = f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n"
        self.writer.write(head.encode() + body)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and header fields."""
        assert self.reader is not None
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:] if line)
        return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def body(self, fields: dict[str, str]) -> bytes:
        """All of an answer's body."""
        assert self.reader is not None
        if "content-length" in fields:
            data = await self.reader.readexactly(int(fields["content-length"]))
        else:
            data = b"".join([part async for part in self.chunks()])
        if fields.get("connection") == "close":
            self.close()
        return data

    async def chunks(self) -> AsyncIterator[bytes]:
        """The parts of a body whose length is not known before."""
        assert self.reader is not None
        while size := int(await self.reader.readline(), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readline()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None
