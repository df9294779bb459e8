"""Tokenizers and models, from wherever `ftrun.model.locate` found them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ftrun import events, record, template
from ftrun.config import Config
from ftrun.errors import ConfigError, Problem
from ftrun.hardware import Device
from ftrun.model import WHEELS, Attention, Dtype, Model, Source, wheel_file
from ftrun.plugin import ModelHead
from ftrun.worker import builtin, score_head, wheel
from ftrun.worker.media import processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def tokenizer(cfg: Config) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with the chat template that the config asks for.

    Raises:
        ConfigError: There is no chat template, and the stage needs one.
    """
    events.send("phase", text="loading the tokenizer")
    loaded = tokenizer_of(cfg.model)
    _apply_template(loaded, cfg)
    if loaded.pad_token is None:
        # Only ever used where attention is masked and labels are ignored, by position and not by value.
        loaded.pad_token = loaded.eos_token or loaded.bos_token or loaded.unk_token
    if loaded.chat_template is None and not cfg.template.has_slots and cfg.stage.rows != "texts":
        message = f"the tokenizer of {cfg.model.path} has no chat template, and stage={cfg.stage.name} needs one"
        raise ConfigError([Problem("template", message, "template=chatml, or another (`ftrun list template`)")])
    return loaded


def _apply_template(loaded: PreTrainedTokenizerBase, cfg: Config) -> None:
    """Give a tokenizer what a template needs: its Jinja text, and its end-of-turn tokens where they are unknown."""
    chosen, data = cfg.template, cfg.data
    if chosen.has_slots:
        loaded.chat_template = template.to_jinja(chosen, data.reasoning, strip_history=not data.history_reasoning)
    elif chosen.chat_template:
        loaded.chat_template = chosen.chat_template
    stop = list(chosen.stop)
    if chosen.replace_eos:
        loaded.add_special_tokens({"eos_token": stop.pop(0)})
    if chosen.has_slots and stop:
        loaded.add_special_tokens({"extra_special_tokens": stop}, replace_extra_special_tokens=False)


def tokenizer_of(model: Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer that came with a model, as it is."""
    from transformers import AutoTokenizer

    assert model.path
    if model.source is Source.builtin:
        return builtin.tokenizer()
    if model.source is Source.gguf:
        path = Path(model.path)
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    files, arguments = _files(model), _source_arguments(model)
    try:
        multimodal = processor.load_tokenizer(files, arguments)
    except ValueError as error:
        raise ConfigError(
            [Problem("model.path", f"{model.path} is multimodal, and {error}", "all of its files")]
        ) from None
    return multimodal or AutoTokenizer.from_pretrained(files, **arguments)


def model(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the model that the run starts from, with the head that its stage trains, in evaluation mode and on the CPU.

    Raises:
        ConfigError: The files are no causal language model, or too small for the tokenizer; or the head is another.
    """
    events.send("phase", text="loading the model")
    arguments: dict[str, Any] = {"dtype": _dtype(cfg), **cfg.quant.load_arguments()}
    if cfg.model.attention is not Attention.auto:
        arguments["attn_implementation"] = cfg.model.attention.value
    try:
        loaded = as_saved(cfg.model, arguments)
    except (ValueError, ImportError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        key = "model.attention" if "attn" in first.lower() or "attention" in first.lower() else "model.path"
        fix = (
            "model.attention=sdpa"
            if key == "model.attention"
            else "a causal language model that this transformers knows"
        )
        raise ConfigError([Problem(key, f"{cfg.model.path} cannot be loaded: {first}", fix)]) from error
    if cfg.model.source in (Source.hub, Source.wheel):
        loaded.name_or_path = cfg.model.path  # what an adapter says it is for, wherever the files came from
    loaded = _HEADED[cfg.stage.head](loaded, cfg)
    rows = loaded.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        message = f"the tokenizer has {len(tokenizer)} tokens, and the model {rows} embeddings"
        if cfg.template.stop:
            message += f"; the template ends replies with {', '.join(cfg.template.stop)}, of which some are new to it"
            raise ConfigError(
                [Problem("template", message, "template=auto, or the template that the model was made with")]
            )
        raise ConfigError([Problem("model.path", message, "a folder whose tokenizer and model belong together")])
    return loaded


def _predicting(loaded: PreTrainedModel, cfg: Config) -> PreTrainedModel:
    """Return a model that predicts tokens.

    Raises:
        ConfigError: It scores: transformers would draw a new head for it, and say so in a log that nobody reads.
    """
    if score_head.is_on(loaded):
        kind = loaded.config.architectures[0]
        message = f"{cfg.model.path} is a {kind}: it scores replies and has no head that predicts tokens"
        fix = f"the model that it was trained from, or stage=rm instead of stage={cfg.stage.name}"
        raise ConfigError([Problem("model.path", message, fix)])
    return loaded


def _scoring(loaded: PreTrainedModel, cfg: Config) -> PreTrainedModel:
    return score_head.with_score(loaded, beside(cfg.model, score_head.VALUE_HEADS), cfg.seed)


_HEADED: dict[ModelHead, Callable[[PreTrainedModel, Config], PreTrainedModel]] = {
    ModelHead.causal: _predicting,
    ModelHead.score: _scoring,
}
"""What makes of a model as its files are one with the head that a stage trains."""


def beside(model: Model, names: Sequence[str]) -> Path | None:
    """Return the first of some files that came with a model's own, if there is one."""
    from transformers.utils.hub import cached_file

    if model.source not in (Source.folder, Source.run, Source.hub):
        return None
    revision = {"revision": model.revision} if model.source is Source.hub else {}
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    found = (cached_file(_files(model), name, **revision, **quiet) for name in names)
    return next((Path(file) for file in found if file), None)


def as_saved(model: Model, arguments: dict[str, Any]) -> PreTrainedModel:
    """Load a model with the head that its files have.

    Args:
        model: Located.
        arguments: What `from_pretrained` takes: ``dtype`` at least.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    assert model.path
    if model.source is Source.builtin:
        return builtin.model(arguments)
    if model.source is Source.run:
        return _load_run(Path(model.path), arguments)
    if model.source is Source.folder and (Path(model.path) / "adapter_config.json").is_file():
        return _load_adapter_folder(Path(model.path), arguments)
    if model.source is Source.gguf:
        path = Path(model.path)
        dequantize = GgufConfig(dequantize=True)  # or the model could not be saved again
        return AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, quantization_config=dequantize, **arguments
        )
    return _pretrained(_files(model), arguments, _source_arguments(model))


def _pretrained(files: str, arguments: dict[str, Any], source_arguments: dict[str, Any]) -> PreTrainedModel:
    """Load a model by the class that its files are of: of text, of text and media whole, or one that scores."""
    return _class_of(files, source_arguments).from_pretrained(files, **arguments, **source_arguments)


def _class_of(files: str, source_arguments: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

    config = AutoConfig.from_pretrained(files, **source_arguments)
    if score_head.scores_sequences(config) and (cls := score_head.class_for(config)):
        return cls
    multimodal = processor.multimodal_config(files, source_arguments) is not None
    return AutoModelForMultimodalLM if multimodal else AutoModelForCausalLM


def outline(cfg: Config) -> PreTrainedModel:
    """Return the model that the run starts from without its weights, on the meta device; no file of weights is read."""
    from transformers import AutoConfig

    dtype = _dtype(cfg)
    files, arguments = _architecture(cfg.model)
    with torch.device("meta"):
        if not files:
            return builtin.model({"dtype": dtype})
        cls, config = _class_of(files, arguments), AutoConfig.from_pretrained(files, **arguments)
        if cfg.stage.head is ModelHead.score:
            config.num_labels, cls = 1, score_head.class_for(config) or cls
        make = getattr(cls, "from_config", None) or cls._from_config
        return make(config, dtype=config.dtype if dtype == "auto" else dtype)


def _architecture(model: Model) -> tuple[str, dict[str, Any]]:
    """Return which files say of what shape a model is, and how they are read; nothing for one that is made here."""
    path = Path(model.path or "")
    if model.source is Source.builtin:
        return "", {}
    if model.source is Source.run and (path / record.MODEL / "adapter_config.json").is_file():
        return _architecture(Config.load(path / record.RUN).model)
    if model.source is Source.folder and (path / "adapter_config.json").is_file():
        return _base_of(path), {}
    if model.source is Source.gguf:
        return str(path.parent), {"gguf_file": path.name}
    return _files(model), _source_arguments(model)


def _load_run(folder: Path, arguments: dict[str, Any]) -> PreTrainedModel:
    """Load what an earlier run ended with: its weights, or its own start with its adapter merged in."""
    ended = folder / record.MODEL
    if not (ended / "adapter_config.json").is_file():
        return _pretrained(str(ended), arguments, {})
    start = Config.load(folder / record.RUN)
    return _merge(as_saved(start.model, arguments), ended)


def _load_adapter_folder(folder: Path, arguments: dict[str, Any]) -> PreTrainedModel:
    return _merge(_pretrained(_base_of(folder), arguments, {}), folder)


def _base_of(folder: Path) -> str:
    """Return the model that an adapter in a folder is for.

    Raises:
        ConfigError: It does not say.
    """
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        message = f"{folder} holds an adapter that does not say for which model it is"
        raise ConfigError([Problem("model.path", message, "the folder of a merged model")])
    return base


def _merge(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Return a model with an adapter merged in, and with the head that the adapter was trained with."""
    from peft import PeftConfig, PeftModel

    if PeftConfig.from_pretrained(str(adapter)).task_type == ModelHead.score.value and not score_head.is_on(base):
        base = score_head.put_on(base, score_head.of_adapter(adapter))
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()


def _files(model: Model) -> str:
    assert model.path
    if model.source is Source.wheel:
        known = WHEELS[model.path]
        return str(wheel.converted(known, wheel_file(known)))
    if model.source is Source.run:
        return str(Path(model.path) / record.MODEL)
    return model.path


def _source_arguments(model: Model) -> dict[str, Any]:
    own_code = {"trust_remote_code": model.trust_remote_code}
    return own_code | ({"revision": model.revision} if model.source is Source.hub else {})


def _dtype(cfg: Config) -> torch.dtype | str:
    """Return the stored type of the weights; float32 where they train, since small updates vanish in bfloat16."""
    if cfg.model.dtype is not Dtype.auto:
        return getattr(torch, cfg.model.dtype.value)
    if cfg.adapter.trains_base_weights or cfg.hardware.device in (Device.cpu, Device.mps):
        return torch.float32
    return "auto"


def count(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters a model has, and how many of them train."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
