"""Reads xz and bzip2 to their last byte.

Python's own readers take whatever stands behind the first stream and is no stream for the end of the file: the rows of
a second, damaged part would be lost without a word.
"""

from __future__ import annotations

import bz2
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

_READ_BYTES = 1 << 16


class Streams(io.RawIOBase):
    """The bytes of all streams of a file, one after the other.

    Raises while it reads:
        EOFError: the file ends before a stream does.
        OSError, lzma.LZMAError: a stream is damaged, or what stands behind one is none.
    """

    def __init__(self, path: Path, decompressor: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._file, self._decompressor = path.open("rb"), decompressor
        self._stream = decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one step goes; 0 at the end of the file."""
        while True:
            given = b""
            if self._stream.eof:
                # xz pads streams with NUL bytes (its file format, section 2.2).
                given = self._stream.unused_data.lstrip(b"\0")
                while not given:
                    if not (read := self._file.read(_READ_BYTES)):
                        return 0
                    given = read.lstrip(b"\0")
                self._stream = self._decompressor()
            elif self._stream.needs_input and not (given := self._file.read(_READ_BYTES)):
                raise EOFError("it ends before its end-of-stream marker")
            if data := self._stream.decompress(given, len(buffer)):
                buffer[: len(data)] = data
                return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
