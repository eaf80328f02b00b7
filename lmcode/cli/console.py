"""Printing for commands, to any encoding: no character and no file name turns a result into a traceback.

A character that the encoding lacks (PYTHONIOENCODING=ascii) is written as in JSON, `\\u00e9`, so that JSON stays JSON. A
byte of a file name that is not UTF-8, which Python keeps as a lone surrogate, is printed as that byte.
"""

from __future__ import annotations

import codecs
import io
import json
import sys

NAME = "lmcode"  # of the error handler, as `codecs` knows it


class Spelling:
    """Spells what an encoding lacks; `escaped` says whether a character had to be."""

    def __init__(self) -> None:
        self.escaped = False

    def __call__(self, error: UnicodeError) -> tuple[str | bytes, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        character = error.object[error.start]
        if 0xDC80 <= ord(character) <= 0xDCFF:
            return bytes([ord(character) - 0xDC00]), error.start + 1
        self.escaped = True
        return json.dumps(character)[1:-1], error.start + 1


def forgive() -> Spelling:
    """Lets standard output and standard error take every character from now on."""
    spelling = Spelling()
    codecs.register_error(NAME, spelling)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test or a notebook may have put something else there
            stream.reconfigure(errors=NAME)
    return spelling
