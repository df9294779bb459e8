"""Sounds: WAV files of whole numbers, and whatever else the package soundfile reads where it is there."""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from typing import Any

import numpy as np

_WIDTHS: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4")}
"""Sample types of WAV files, by their bytes."""


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound, decoded, its channels averaged."""

    samples: np.ndarray[Any, Any]
    """Of shape (samples,), as float32 from -1 to 1."""

    rate: int
    """Samples a second."""


def look(source: str | bytes) -> None:
    """Look at the header of a sound.

    Raises:
        ValueError: It is no sound that can be read here.
    """
    try:
        with _wave(source):
            return
    except (wave.Error, EOFError, KeyError):
        _soundfile(source, decode=False)
    except OSError as error:
        raise ValueError(str(error)) from None


def load(source: str | bytes) -> Sound:
    """Decode a sound.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with _wave(source) as file:
            kind = _WIDTHS[file.getsampwidth()]
            flat = np.frombuffer(file.readframes(file.getnframes()), kind).reshape(-1, file.getnchannels())
            rate = file.getframerate()
    except (wave.Error, EOFError, KeyError):
        return _soundfile(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error} ({_name(source)})") from None
    middle, most = (128, 128) if kind.kind == "u" else (0, 2 ** (8 * kind.itemsize - 1))
    return Sound(((flat.astype(np.float64) - middle) / most).mean(1).astype(np.float32), rate)


def _wave(source: str | bytes) -> wave.Wave_read:
    """Open a WAV file whose samples are whole numbers.

    Raises:
        wave.Error: It is none.
        KeyError: Its samples are of 3 bytes.
    """
    file = wave.open(source if isinstance(source, str) else io.BytesIO(source), "rb")  # noqa: SIM115
    if file.getsampwidth() not in _WIDTHS:
        file.close()
        raise KeyError(file.getsampwidth())
    return file


def _soundfile(source: str | bytes, *, decode: bool = True) -> Sound:
    try:
        import soundfile  # type: ignore[import-not-found]
    except ImportError:
        message = f"no WAV file of 8, 16 or 32 bits ({_name(source)}); others need the package soundfile"
        raise ValueError(message) from None
    try:
        with soundfile.SoundFile(source if isinstance(source, str) else io.BytesIO(source)) as file:
            samples = file.read(dtype="float32", always_2d=True) if decode else np.zeros((0, 1), np.float32)
            return Sound(samples.mean(1) if decode else samples[:, 0], int(file.samplerate))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{error} ({_name(source)})") from None


def _name(source: str | bytes) -> str:
    return source if isinstance(source, str) else f"{len(source)} bytes"
