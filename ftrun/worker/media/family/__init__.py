"""How families of multimodal models differ: by model type, one file for each that needs more than the rest."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any


class Family:
    """What nearly all models do. A file of a family has a ``FAMILY`` of a class below this one."""

    border: str = ""
    """Plain text that the processor writes before and after a medium, and that is tokenised with its neighbours."""

    token_columns: tuple[str, ...] = ("mm_token_type_ids",)
    """What the model takes of each token beside its id, as the processor returns it."""

    def placeholder(self, processor: Any, kind: str) -> str | None:
        """Return the token that stands for a medium in a text, or None if the processor knows none."""
        token = getattr(processor, f"{kind}_token", None)
        return None if token is None else str(token)

    def num_image_tokens(self, processor: Any, size: tuple[int, int]) -> int:
        """Return how many tokens an image of a height and width becomes; 1 if the processor cannot say."""
        ask = getattr(processor, "_get_num_multimodal_tokens", None)
        found = ask(image_sizes=[size]).num_image_tokens if ask else None
        return int(found[0]) if found else 1

    def process(self, processor: Any, kind: str, token: str, opened: Sequence[Any]) -> dict[str, Any]:
        """Return what the processor makes of texts that are one placeholder each, with a medium for each."""
        texts = [token] * len(opened)
        if kind == "image":
            return dict(processor(text=texts, images=[[image] for image in opened], add_special_tokens=False))
        if kind == "audio":
            rate, samples = opened[0].rate, [sound.samples for sound in opened]
            return dict(processor(text=texts, audio=samples, sampling_rate=rate, add_special_tokens=False))
        return joined([self.process_video(processor, token, video) for video in opened])

    def process_video(self, processor: Any, token: str, video: Any) -> dict[str, Any]:
        """Return what the processor makes of one video: of a file the frames that it chooses, of a list all."""
        more: dict[str, Any] = {"do_sample_frames": False}
        if video.fps is not None:
            count = len(video.frames)
            known = {"total_num_frames": count, "fps": video.fps, "duration": count / video.fps}
            more = {"video_metadata": [known | {"frames_indices": list(range(count))}]}
        return dict(processor(text=[token], videos=[video.frames], add_special_tokens=False, **more))


def joined(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put what a processor made of single media behind one another."""
    import torch

    def join(values: list[Any]) -> Any:
        if isinstance(values[0], list):
            return [part for value in values for part in value]
        return torch.cat([torch.as_tensor(value) for value in values])

    return {name: join([one[name] for one in found]) for name in found[0]}


def of(model_type: str) -> Family:
    """Return the family of a model type."""
    name = f"{__name__}.{model_type}"
    if not model_type.isidentifier() or importlib.util.find_spec(name) is None:
        return Family()
    family: Family = importlib.import_module(name).FAMILY
    return family
