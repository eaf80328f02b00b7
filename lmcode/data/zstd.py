"""Reading zstd-compressed files; the only importer of zstandard, which the extra 'data' installs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

from lmcode.config import ConfigError

BLOCK = 1 << 17


def open_zstd(raw: BinaryIO, path: Path) -> BinaryIO:
    """What `raw` holds, decompressed; reading raises OSError for damage, and for an end before the end of a frame.

    Raises:
        ConfigError: without the package.
    """
    try:
        import zstandard
    except ImportError:
        raise ConfigError(f"'{path}' needs the package zstandard: pip install 'lmcode[data]'") from None
    return io.BufferedReader(_Frames(raw, zstandard), BLOCK)


class _Frames(io.RawIOBase):
    """The content of one frame after the other. zstandard's own reader takes a cut file for a whole one."""

    def __init__(self, raw: BinaryIO, zstandard: Any) -> None:
        self._raw, self._zstandard = raw, zstandard
        self._frame: Any = None  # the frame that is being read, None between two
        self._left, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._left or self._raw.read(BLOCK)
            if not block:
                if self._frame is not None:
                    raise OSError("the file ends within a zstd frame")
                return 0
            self._ready = memoryview(self._decompress(block))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, block: bytes) -> bytes:
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        try:
            content: bytes = self._frame.decompress(block)
        except self._zstandard.ZstdError as error:
            raise OSError(str(error)) from None
        self._left = b""
        if self._frame.eof:
            self._left, self._frame = self._frame.unused_data, None
        return content
