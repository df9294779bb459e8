"""The score head: one number for a whole sequence, read at its last token.

A model with one is transformers' own class for sequence classification with one label, so that transformers, TRL and
vLLM load what a run leaves. Here it is asked by position and never by what a token's id says: a tokenizer may pad with
the very token that ends a reply.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ftrun import events
from ftrun.errors import ConfigError, Problem
from ftrun.worker.batches import Batch, model_inputs
from ftrun.worker.head import intercepted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

NAME = "score"
"""The head's name in the models of transformers that have one."""

VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
"""Where LLaMA-Factory keeps the head of a reward model, beside the weights of a causal one or of its adapter."""

_VALUE_WEIGHT, _VALUE_BIAS = "v_head.summary.weight", "v_head.summary.bias"
_LOADED_AS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "_weight_conversions")
"""What transformers notes on a model of how it was loaded, for whoever saves it or puts an adapter beside it."""


class ScoreHead:
    """The score head of a model, computed at the last token of each sequence and in float32."""

    def __init__(self, plain: nn.Module) -> None:
        """Be the head of a model, which may have an adapter but is not wrapped for several processes."""
        self.plain = plain

    def scores(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Run the model, and return the score of each sequence, in the order of the batch.

        Args:
            model: What is called; may be wrapped, for several processes.
            batch: ``input_ids`` and a mask or positions, of shape (B, T).
        """
        where, found = last_tokens(batch), []
        with self._asked(lambda hidden: found.append(self._score(hidden[where]))):
            model(**model_inputs(batch), use_cache=False)
        (scores,) = found
        return scores

    def _score(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self._module(hidden.float()).squeeze(-1)

    @property
    def _module(self) -> nn.Module:
        return getattr(self.plain, NAME)

    @contextlib.contextmanager
    def _asked(self, ask: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """While inside, have ``ask`` see what the model gives its head, of shape (B, T, H); it may call the head."""

        def change(hidden: torch.Tensor) -> torch.Tensor:
            ask(hidden)
            return hidden.detach().float()  # for what the model itself makes of it, which nobody reads

        config: Any = self.plain.config
        config = config.get_text_config()
        pad_id = config.pad_token_id
        config.pad_token_id = pad_id or 0  # without one, the model would take no batches
        try:
            with intercepted(self._module, change):
                yield
        finally:
            config.pad_token_id = pad_id


def last_tokens(batch: Batch) -> torch.Tensor:
    """Return where each sequence of a batch ends, of shape (B, T); of a padded one, at its last token that is none."""
    ids = batch["input_ids"]
    if "position_ids" in batch and "attention_mask" not in batch:
        follows = batch["position_ids"].roll(-1, dims=1)
        follows[:, -1] = 0
        return follows == 0
    mask = batch.get("attention_mask", torch.ones_like(ids))
    places = torch.arange(ids.shape[1], device=ids.device)
    return places == (mask * places).argmax(dim=1, keepdim=True)


def is_on(model: nn.Module) -> bool:
    """Tell whether a model scores or classifies sequences, and so has no head that predicts tokens."""
    return scores_sequences(model.config)


def scores_sequences(config: PreTrainedConfig) -> bool:
    """Tell whether the files that a config belongs to hold a model that scores or classifies sequences."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def class_for(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return transformers' class for a model with a score head, which is kept in float32 however it is loaded."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    found: type[PreTrainedModel] = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    found._keep_in_fp32_modules_strict = {*(found._keep_in_fp32_modules_strict or ()), NAME}
    return found


def with_score(model: PreTrainedModel, beside: Path | None, seed: int) -> PreTrainedModel:
    """Return a model with a score head: the one it has, LLaMA-Factory's beside its weights, or a new one.

    Args:
        model: A causal one, whose layers become those of the new model, or one that has a score head.
        beside: LLaMA-Factory's value head that came with the model, if one did.
        seed: Of a new head's weights.

    Raises:
        ConfigError: It has a head of another kind, or is of an architecture that has no score head.
    """
    if is_on(model):
        _check_kept(model)
        return model
    if beside:
        return put_on(model, value_head(beside))
    events.send("note", text=f"the model has no score head: it gets a new one, drawn with seed={seed}")
    return put_on(model, new_head(model.config, seed))


def name_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write into a model's config which token is padding, by which transformers finds where a sequence ends.

    Where that is also the token that ends a reply, there is no such token: transformers then takes no batches of padded
    sequences, and would otherwise read the score of each a token too early.
    """
    pad_id = tokenizer.pad_token_id
    config: Any = model.config
    config.get_text_config().pad_token_id = None if pad_id == tokenizer.eos_token_id else pad_id


def put_on(model: PreTrainedModel, weight: torch.Tensor) -> PreTrainedModel:
    """Return the layers of a causal model under a score head of the given weight, of shape (1, H).

    Raises:
        ConfigError: transformers has no score head for this architecture, or the weight is for another hidden size.
    """
    cls = class_for(model.config)
    if cls is None:
        raise _no_such_head(model)
    labels, model.config.num_labels = model.config.num_labels, 1
    with torch.device("meta"):
        scorer = cls(model.config)
    if not isinstance(head := getattr(scorer, NAME, None), nn.Linear) or type(scorer.base_model) is not type(
        model.base_model
    ):
        model.config.num_labels = labels
        raise _no_such_head(model)
    if weight.shape != head.weight.shape:
        message = f"its score head is of shape {tuple(weight.shape)}, and here {tuple(head.weight.shape)} is wanted"
        raise ConfigError([Problem("model.path", message, "a reward model whose head and layers belong together")])
    setattr(scorer, scorer.base_model_prefix, model.base_model)
    setattr(scorer, NAME, _linear(weight))
    for name in _LOADED_AS:
        if name in vars(model):
            setattr(scorer, name, getattr(model, name))
    scorer.name_or_path = model.name_or_path
    model.config.architectures = [cls.__name__]
    return scorer.eval()


def new_head(config: PreTrainedConfig, seed: int) -> torch.Tensor:
    """Return the weight of a score head as transformers would draw it, of shape (1, H)."""
    text: Any = config.get_text_config()
    spread = getattr(text, "initializer_range", 0.02)
    size = getattr(text, "word_embed_proj_dim", None) or text.hidden_size  # OPT's last layer is of the former
    return torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * spread


def value_head(file: Path) -> torch.Tensor:
    """Return the weight of LLaMA-Factory's head, of shape (1, H).

    Its bias is left out: a score head has none, and no comparison of two scores depends on it.

    Raises:
        ConfigError: The file holds no value head.
    """
    tensors = _tensors(file)
    if _VALUE_WEIGHT not in tensors:
        message = f"holds no {_VALUE_WEIGHT}, which a value head of LLaMA-Factory has"
        raise ConfigError([Problem(str(file), message, "the file that came with the weights, or without it")])
    text = f"the score head starts from {file.name}"
    if _VALUE_BIAS in tensors:
        text += f"; its bias of {tensors[_VALUE_BIAS].item():.4g} is left out: it moves every score alike"
    events.send("note", text=text)
    return tensors[_VALUE_WEIGHT].float()


def of_adapter(folder: Path) -> torch.Tensor:
    """Return the weight of the score head that was saved with an adapter, of shape (1, H).

    Raises:
        ConfigError: None was.
    """
    from peft import load_peft_weights

    for name, tensor in load_peft_weights(str(folder), device="cpu").items():
        if f".{name}".endswith(f".{NAME}.weight"):
            return tensor.float()
    message = f"{folder} holds an adapter for a score head, and no weights of one"
    raise ConfigError([Problem("model.path", message, "the whole folder, copied or downloaded again")])


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    loaded: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return loaded


def _linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made


def _check_kept(model: PreTrainedModel) -> None:
    """Raise unless a model's head is one that gives one number."""
    head = getattr(model, NAME, None)
    if isinstance(head, nn.Linear) and head.out_features == 1:
        return
    if head is None:
        raise _no_such_head(model)
    message = f"{model.name_or_path} tells {head.out_features} classes apart, and a reward model gives one number"
    raise ConfigError([Problem("model.path", message, "a reward model, or a causal language model")])


def _no_such_head(model: PreTrainedModel) -> ConfigError:
    kind = type(model).__name__
    message = f"{model.name_or_path} is a {kind}, for which transformers has no score head at the last token"
    fix = "a causal language model of an architecture that has one, such as llama, qwen2, qwen3, gemma or mistral"
    return ConfigError([Problem("model.path", message, fix)])
