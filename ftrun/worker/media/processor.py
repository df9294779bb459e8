"""A model's own processor: which kinds of media it takes, how a text has them, and which tokens they become."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ftrun.worker.media import family, images, sounds, videos
from ftrun.worker.media.place import Located

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

KINDS = ("image", "video", "audio")

_VIDEOS = ("video_preprocessor_config.json", "preprocessor_config.json")
"""Where a video processor's settings stand, the first that there is."""

_AUDIO = ("feature_extractor", "audio_processor")


class Expansion(NamedTuple):
    """The tokens of one medium."""

    ids: list[int]
    columns: dict[str, list[int]]
    """What else the model takes of each token, such as of which kind it is."""


class MediaProcessor:
    """A multimodal model's processor, asked for one medium at a time: text is tokenised elsewhere."""

    def __init__(self, processor: Any, config: Any) -> None:
        self.processor, self._config = processor, config
        self.family = family.of(config.model_type)
        self.max_length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        tokenizer = processor.tokenizer
        found = {kind: self.family.placeholder(processor, kind) for kind in KINDS if _takes(processor, kind)}
        self.tokens = {kind: token for kind, token in found.items() if token}
        """The placeholder of each kind of media that the model takes."""

        self.kinds = {int(tokenizer.convert_tokens_to_ids(token)): kind for kind, token in self.tokens.items()}
        """The kind of media that each placeholder's id stands for."""

        border = tokenizer(self.family.border, add_special_tokens=False)["input_ids"] if self.family.border else []
        self._border = len(border)
        self._known: dict[tuple[int, int], int] = {}

    @property
    def digest(self) -> str:
        """A hash of the processor's settings."""
        settings = {name: value for name, value in self.processor.to_dict().items() if name != "processor_class"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def refusal(self) -> str:
        """What is said of media that the model does not take."""
        taken = " and ".join(self.tokens) or "text"
        more = ", for want of the package torchvision" if _is_without_videos(self.processor) else ""
        return f"the model's processor does not take: it takes {taken}{more}"

    def written(self, kind: str) -> str:
        """Return how the model's own chat template writes a medium between two texts."""
        token = self.tokens[kind]
        parts = [{"type": "text", "text": "before7"}, {"type": kind}, {"type": "text", "text": "after7"}]
        own = chat_template(self.processor)
        if not own:
            return token
        message = {"role": "user", "content": parts}
        whole = self.processor.tokenizer.apply_chat_template([message], chat_template=own, tokenize=False)
        between = str(whole).partition("before7")[2].partition("after7")[0]
        return between if token in between else token

    def bordered(self, text: str) -> str:
        """Put around each placeholder what the processor would, where that is text like its neighbours."""
        if self.family.border:
            for token in self.tokens.values():
                text = text.replace(token, self.family.border + token + self.family.border)
        return text

    def num_tokens(self, medium: Located) -> int:
        """Return how many tokens a medium becomes, as far as its header tells; 1 if it does not."""
        if medium.kind != "image" or medium.size is None:
            return 1
        if medium.size not in self._known:
            self._known[medium.size] = self.family.num_image_tokens(self.processor, medium.size)
        return self._known[medium.size]

    def expand(self, kind: str, opened: Sequence[Any]) -> tuple[list[Expansion], dict[str, Any]]:
        """Return the tokens of each of several media of a kind, and what the model takes beside the tokens.

        Args:
            kind: The kind of all of them.
            opened: What `load` returned.
        """
        found = self.family.process(self.processor, kind, self.tokens[kind], opened)
        ids = [[int(token) for token in each] for each in found.pop("input_ids")]
        columns = {name: found.pop(name) for name in self.family.token_columns if name in found}
        for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
            found.pop(name, None)
        expansions = [
            Expansion(self._inner(each), {name: self._inner(list(values[at])) for name, values in columns.items()})
            for at, each in enumerate(ids)
        ]
        return expansions, _tensors(found)

    def load(self, medium: Located) -> Any:
        """Return a medium, decoded.

        Raises:
            ValueError: It cannot be, or not as the model takes it.
        """
        if medium.kind == "image":
            return images.load(medium.sources[0])
        if medium.kind == "video":
            return videos.load(medium.sources, frames=medium.frames)
        sound = sounds.load(medium.sources[0])
        part = next(part for name in _AUDIO if (part := getattr(self.processor, name, None)) is not None)
        rate = getattr(part, "sampling_rate", sound.rate)
        if sound.rate != rate:
            raise ValueError(f"the sound has {sound.rate} samples a second, and the model takes {rate}")
        return sound

    def save(self, folder: Path) -> None:
        """Write the processor's settings, and the model's that they belong to, for those who use the model."""
        self.processor.save_pretrained(folder)
        if not (folder / "config.json").exists():  # beside an adapter
            self._config.save_pretrained(folder)

    def _inner(self, values: list[int]) -> list[int]:
        return values[self._border : len(values) - self._border] if self._border else values


def of(tokenizer: PreTrainedTokenizerBase) -> MediaProcessor | None:
    """Return the processor that a tokenizer belongs to, or None if its model takes text alone.

    It goes where the tokenizer goes: whoever makes tokens or batches needs both.
    """
    return getattr(tokenizer, "media_processor", None)


def load_tokenizer(files: str, arguments: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a multimodal model, its processor with it, or None if the model is of another kind.

    Raises:
        ValueError: It has no processor that can be loaded.
    """
    config = multimodal_config(files, arguments)
    if config is None:
        return None
    processor = _load(files, arguments, config)
    tokenizer = processor.tokenizer
    tokenizer.chat_template = chat_template(processor) or tokenizer.chat_template
    tokenizer.media_processor = MediaProcessor(processor, config)
    return tokenizer


def chat_template(processor: Any) -> str | None:
    """Return a processor's own chat template, if it has one: of several, that for all that is not special."""
    own = processor.chat_template
    return own.get("default") if isinstance(own, dict) else own


def multimodal_config(files: str, arguments: Mapping[str, Any]) -> Any:
    """Return a model's configuration if it takes more than text and writes it, or else None."""
    from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(files, **arguments)
    except (OSError, ValueError, KeyError):  # said when the model itself is loaded
        return None
    composite = config.get_text_config() is not config
    known = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    return config if composite and known and not config.is_encoder_decoder else None


def _load(files: str, arguments: Mapping[str, Any], config: Any) -> Any:
    """Load a processor; without the package torchvision, one that does not take videos."""
    from transformers.utils import is_torchvision_available

    try:
        from transformers import AutoProcessor  # which fails if torchvision is there and does not fit torch

        try:
            return _complete(AutoProcessor.from_pretrained(files, **arguments))
        except (ImportError, ValueError):
            if is_torchvision_available():
                raise
            return _without_videos(files, arguments, config)
    except (ImportError, OSError, TypeError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"its processor cannot be loaded: {' '.join(str(error).split())}") from error


def _complete(processor: Any) -> Any:
    """Return a processor; transformers gives a tokenizer in its place where it finds nothing else."""
    if not hasattr(processor, "tokenizer"):
        raise OSError("the files of its image processor are missing (preprocessor_config.json)")
    return processor


class _NoVideos(dict[str, Any]):
    """Stands where a processor has its video processor, and keeps that one's settings."""

    _auto_class = None


def _without_videos(files: str, arguments: Mapping[str, Any], config: Any) -> Any:
    """Put a processor together from its parts but the one for videos, which is not to be had without torchvision."""
    from transformers import PROCESSOR_MAPPING, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer
    from transformers.utils import cached_file

    whole = PROCESSOR_MAPPING[type(config)]
    settings, _ = whole.get_processor_dict(files)
    no_videos = _NoVideos(settings.get("video_processor") or {})
    for name in () if no_videos else _VIDEOS:
        if kept := cached_file(files, name, _raise_exceptions_for_missing_entries=False):
            no_videos = _NoVideos(json.loads(Path(kept).read_text()))
            break

    class WithoutVideos(whole):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if argument is no_videos else super().check_argument_for_proper_class(name, argument)

    WithoutVideos.__name__ = whole.__name__
    loaders = {
        "tokenizer": AutoTokenizer,
        "image_processor": AutoImageProcessor,
        "feature_extractor": AutoFeatureExtractor,
    }
    parts = [
        no_videos if name == "video_processor" else loaders[name].from_pretrained(files, **arguments)
        for name in whole.get_attributes()
    ]
    return WithoutVideos.from_args_and_dict(parts, settings)


def _is_without_videos(processor: Any) -> bool:
    return isinstance(getattr(processor, "video_processor", None), _NoVideos)


def _takes(processor: Any, kind: str) -> bool:
    """Tell whether a processor has what makes tokens of a kind of media."""
    names = {"image": ("image_processor",), "video": ("video_processor",), "audio": _AUDIO}[kind]
    parts = [getattr(processor, name, None) for name in names]
    return any(part is not None and not isinstance(part, _NoVideos) for part in parts)


def _tensors(found: dict[str, Any]) -> dict[str, Any]:
    import torch

    def tensor(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, list) and isinstance(value[0], torch.Tensor):
            return torch.stack(value)
        return torch.from_numpy(np.asarray(value))

    return {name: tensor(value) for name, value in found.items()}
