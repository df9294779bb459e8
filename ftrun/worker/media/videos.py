"""Videos: files, through the package av where it is there, and lists or folders of frames."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ftrun.worker.media import images

if TYPE_CHECKING:
    from collections.abc import Sequence

_MISSING = "video files need the package av (pip install av); a list of frames as images does not"


@dataclass(frozen=True, slots=True)
class Video:
    """A video, decoded."""

    frames: np.ndarray[Any, Any]
    """Of shape (frames, height, width, 3), as uint8."""

    fps: float | None
    """Frames a second; of a list of frames nobody knows."""


def look(source: str | bytes) -> None:
    """Look at the header of a video file.

    Raises:
        ValueError: It is no video, or the package av is not there.
    """
    with _opened(source) as container:
        if not container.streams.video:
            raise ValueError(f"no video in it ({_name(source)})")


def load(sources: Sequence[str | bytes], *, frames: bool) -> Video:
    """Decode a video file, or put frames that are images behind one another.

    Raises:
        ValueError: One cannot be read, or the frames are not of one size.
    """
    if not frames:
        return _file(sources[0])
    found = [np.asarray(images.load(source)) for source in sources]
    if len({frame.shape for frame in found}) > 1:
        raise ValueError("the frames of a video are of several sizes")
    return Video(np.stack(found), None)


def _file(source: str | bytes) -> Video:
    with _opened(source) as container:
        try:
            stream = container.streams.video[0]
            found = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            fps = float(stream.average_rate) if stream.average_rate else None
        except OSError as error:
            raise ValueError(f"{error} ({_name(source)})") from None
    if not found:
        raise ValueError(f"no frame in it ({_name(source)})")
    return Video(np.stack(found), fps)


def _opened(source: str | bytes) -> Any:
    try:
        import av  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(_MISSING) from None
    try:
        return av.open(source if isinstance(source, str) else io.BytesIO(source))
    except OSError as error:
        raise ValueError(f"{error} ({_name(source)})") from None


def _name(source: str | bytes) -> str:
    return source if isinstance(source, str) else f"{len(source)} bytes"
