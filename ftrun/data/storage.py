"""Where the bytes of rows are: files of this machine and addresses that fsspec opens, packed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from typing import IO, TYPE_CHECKING, Any, cast

from ftrun.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PACKINGS = (".gz", ".zst", ".bz2", ".xz")
"""Endings of packed files, behind the ending that says what is in them."""

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a packed file raises where it is cut off or broken."""

_BUFFER = 1 << 18

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
"""What to install for an address, where the package is not named like the protocol."""


def is_url(place: str) -> bool:
    """Tell an address from a path of this machine."""
    return "://" in place


def ending(file: str) -> tuple[str, str]:
    """Return the ending that says how a file is read and that of its packing, ``.jsonl`` and ``.gz``, in lower case."""
    name = file.partition("::")[0].partition("?")[0] if is_url(file) else file
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKINGS else ""
    return (suffixes[-1] if suffixes else ""), packing


def filesystem(key: str, url: str) -> tuple[AbstractFileSystem, str]:
    """Return what opens an address, and the address as it takes it.

    Raises:
        ConfigError: Nothing opens such addresses, or a package is missing.
    """
    import fsspec

    protocol = url.partition("://")[0].rpartition("::")[2]
    try:
        return cast("tuple[AbstractFileSystem, str]", fsspec.core.url_to_fs(url))
    except ImportError as error:
        package = _PACKAGES.get(protocol, error.name or protocol)
        problem = Problem(
            key, f"{protocol}:// needs the package {package}, which is not installed", f"pip install {package}"
        )
    except Exception as error:
        known = fsspec.available_protocols()
        if protocol not in known:
            message = f"nothing opens addresses that begin with {protocol}://{did_you_mean(protocol, known)}"
            problem = Problem(key, message, "a path of this machine, or s3://, gs://, hf://, https://")
        else:
            problem = unreachable(key, url, error)
    raise ConfigError([problem])


def unreachable(key: str, url: str, error: Exception) -> Problem:
    """Describe an address that does not answer."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    fix = "an address that can be reached from here, and credentials for it where it needs any"
    if url.startswith(("s3:", "s3a:")):
        fix += " (FSSPEC_S3_ANON=true for a public bucket)"
    return Problem(key, f"{url} cannot be read: {lines[0]}", fix)


def open_packed(file: str) -> IO[bytes]:
    """Open a file or an address as it lies there.

    Raises:
        ConfigError: It cannot be opened.
    """
    if is_url(file):
        system, path = filesystem(file, file)
        try:
            return cast("IO[bytes]", system.open(path, "rb"))
        except Exception as error:
            raise ConfigError([unreachable(file, file, error)]) from None
    try:
        return Path(file).open("rb")
    except OSError as error:
        raise ConfigError([cannot_read(file, error)]) from None


def cannot_read(file: str, error: OSError) -> Problem:
    """Describe a file or folder that the system does not let us read."""
    fix = (
        f"a file that may be read (chmod u+r {file})" if isinstance(error, PermissionError) else "a file that is there"
    )
    return Problem(file, f"cannot be read: {error.strerror or error}", fix)


@contextmanager
def open_bytes(file: str) -> Iterator[io.BufferedReader]:
    """Open a file or an address, unpacked while it is read.

    Raises:
        ConfigError: It cannot be opened.
    """
    with open_packed(file) as packed, io.BufferedReader(_unpacked(packed, ending(file)[1]), _BUFFER) as stream:
        yield stream


def _unpacked(packed: IO[bytes], packing: str) -> Any:
    if packing == ".gz":
        return gzip.GzipFile(fileobj=packed)
    if packing == ".bz2":
        return bz2.BZ2File(packed)
    if packing == ".xz":
        return lzma.LZMAFile(packed)
    if packing == ".zst":
        import pyarrow as pa  # has the one zstd that is here on every Python

        return pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), "zstd")
    return packed


@contextmanager
def open_seekable(file: str) -> Iterator[IO[bytes]]:
    """Open a file whose reader jumps about in it; a packed one is unpacked to the disk for that.

    Raises:
        ConfigError: It cannot be opened.
    """
    if not ending(file)[1]:
        with open_packed(file) as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as unpacked:
        with open_bytes(file) as stream:
            copyfileobj(stream, unpacked, 1 << 20)
        unpacked.seek(0)
        yield unpacked


class Enough(Exception):
    """As many bytes have been read as were to be read."""


class _Head(io.RawIOBase):
    """What `head` reads from."""

    def __init__(self, stream: io.BufferedReader, size: int) -> None:
        self._stream, self._left = stream, size

    def readable(self) -> bool:
        """Say that this can be read, as `io.BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the stream does at once."""
        if self._left <= 0:
            raise Enough
        count = self._stream.readinto1(buffer)
        self._left -= count
        return count


def head(stream: io.BufferedReader, size: int) -> io.BufferedReader:
    """Return a stream of about the first ``size`` bytes of another; going on behind them raises `Enough`."""
    return io.BufferedReader(cast("io.RawIOBase", _Head(stream, size)), 1 << 16)
