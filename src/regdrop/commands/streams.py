"""Standard input and output in the encodings that texts and tables need."""

import codecs
import io
import sys
from typing import TextIO

# What is read may begin with a mark of its encoding, as files of Windows do.
READ_ENCODING = "utf-8-sig"
WRITE_ENCODING = "utf-8"
_PLAIN = "regdrop.plain"


def allow_any_encoding() -> None:
    """Let what is printed have letters that the output lacks, as a redirected one on Windows does.

    A minus is a hyphen there, and else a question mark stands for what is lacking.
    """
    codecs.register_error(_PLAIN, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_PLAIN)


def with_encoding(stream: TextIO, encoding: str) -> TextIO:
    """Return a standard stream once it has an encoding, as a file has, whatever the system's.

    A terminal keeps its own.
    """
    if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
        stream.reconfigure(encoding=encoding, errors="strict")
    return stream


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join("-" if letter == "\N{MINUS SIGN}" else "?" for letter in lacking), error.end
