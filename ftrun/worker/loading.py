"""Tokenizers and models, from wherever `ftrun.model.locate` found them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ftrun import events, record, template
from ftrun.config import Config
from ftrun.errors import ConfigError, Problem
from ftrun.hardware import Device
from ftrun.model import WHEELS, Attention, Dtype, Model, Source, wheel_file
from ftrun.worker import builtin, wheel
from ftrun.worker.media import processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def tokenizer(cfg: Config) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with the chat template that the config asks for.

    Raises:
        ConfigError: There is no chat template, and the stage needs one.
    """
    events.send("phase", text="loading the tokenizer")
    loaded = _load_tokenizer(cfg.model)
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


def _load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
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
    """Load the model that the run starts from, in evaluation mode and on the CPU.

    Raises:
        ConfigError: The files are no causal language model, or too small for the tokenizer.
    """
    events.send("phase", text="loading the model")
    arguments: dict[str, Any] = {"dtype": _dtype(cfg), **cfg.quant.load_arguments()}
    if cfg.model.attention is not Attention.auto:
        arguments["attn_implementation"] = cfg.model.attention.value
    try:
        loaded = _load_model(cfg.model, arguments)
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


def _load_model(model: Model, arguments: dict[str, Any]) -> PreTrainedModel:
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
    """Load a model of text, or one of text and media whole."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    multimodal = processor.multimodal_config(files, source_arguments) is not None
    loader = AutoModelForMultimodalLM if multimodal else AutoModelForCausalLM
    return loader.from_pretrained(files, **arguments, **source_arguments)


def _load_run(folder: Path, arguments: dict[str, Any]) -> PreTrainedModel:
    """Load what an earlier run ended with: its weights, or its own start with its adapter merged in."""
    ended = folder / record.MODEL
    if not (ended / "adapter_config.json").is_file():
        return _pretrained(str(ended), arguments, {})
    start = Config.load(folder / record.RUN)
    return _merge(_load_model(start.model, arguments), ended)


def _load_adapter_folder(folder: Path, arguments: dict[str, Any]) -> PreTrainedModel:
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        message = f"{folder} holds an adapter that does not say for which model it is"
        raise ConfigError([Problem("model.path", message, "the folder of a merged model")])
    return _merge(_pretrained(base, arguments, {}), folder)


def _merge(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    from peft import PeftModel

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
