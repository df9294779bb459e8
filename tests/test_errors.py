"""What users type wrong: each mistake is named, explained and mended in one line, and reported alone."""

from __future__ import annotations

import importlib.metadata
import json
import re
import string
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import Distribution, PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest

import ftrun
from ftrun import config, options, words
from ftrun.errors import ConfigError

SECRET = "b5c0ffee00d1e5e1b5c0ffee00d1e5e1b5c0ffee"


def chat(*turns: Any) -> dict[str, Any]:
    """Make a row; a turn given as text is the user's or the assistant's, by turns."""
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": t} if isinstance(t, str) else t for i, t in enumerate(turns)]
    }


def lines(*rows: Any) -> str:
    """Write rows as JSON lines; text stands for itself."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def plugin_file(body: str, name: str | None = "name: str = 'mine'") -> str:
    """Write a plugin file whose class has ``body``."""
    head = "from dataclasses import dataclass\nfrom ftrun.plugin import Optimizer, register\n\n@register\n"
    return f"{head}@dataclass(kw_only=True)\nclass Mine(Optimizer):\n    {name or 'pass'}\n    {body}\n"


GOOD = chat("Hello?", "Hello.")
GOOD_LINE = json.dumps(GOOD)
PARTS = [{"type": "text", "text": "What is this?"}]
PAIR = {"prompt": "Hello?", "chosen": "Hello.", "rejected": "Go."}
GLOBAL = "# @package _global_\n"
PLUGIN_GROUP = "defaults: [adamw, _self_]\n"


def model_folder(*left_out: str) -> dict[str, str | bytes]:
    """Return the files of a model's folder, as far as they are looked at without loading them."""
    files = {"config.json": '{"model_type": "llama"}', "tokenizer.json": "{}", "model.safetensors": ""}
    return {f"here/{name}": text for name, text in files.items() if name not in left_out}


SHARDS: dict[str, str | bytes] = {
    "here/model.safetensors.index.json": '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}',
    "here/a.safetensors": "",
}


@dataclass(frozen=True)
class Case:
    """Something typed wrong, and all that is to be said about it."""

    id: str
    words: str | list[str]
    """What is typed, split at spaces."""

    problems: list[list[str]]
    """For each problem: how it begins, and what else it says, in its reason or in its fix."""

    files: dict[str, str | bytes] = field(default_factory=dict)
    never: tuple[str, ...] = ()
    """What must not be said: names of internals, secrets, misleading advice."""

    packages: dict[str, bool] = field(default_factory=dict)
    """Distributions that are, or are not, installed."""


def case(name: str, words: str | list[str], *says: str, **more: Any) -> Case:
    """Make a case with one problem."""
    return Case(name, words, [list(says)], **more)


INTERNALS = ("ListConfig", "DictConfig", "subclass", "Optional", "schema", "NoneType", "omegaconf", "hydra._")
"""Words of the machinery, which say nothing to a user."""

KEYS = [
    case("misspelt key", "check optimizer.weightdecay=1", "optimizer.weightdecay: is not a key of optimizer=adamw",
         "did you mean optimizer.weight_decay", "optimizer.weight_decay="),
    case("misspelt key of a shared group", "check train.epoch=1", "train.epoch: is not a key",
         "did you mean train.epochs", "fix: train.epochs="),
    case("misspelt top key", "check sed=1", "sed: is not a key", "did you mean seed", "fix: seed="),
    case("key with +", "check +optimizer.wieght_decay=1", "optimizer.wieght_decay: is not a key", "+",
         "did you mean optimizer.weight_decay", never=("optimizer.name",)),
    case("key with ++", "check ++train.epoch=1", "train.epoch: is not a key", "did you mean train.epochs"),
    case("key with + that is like nothing", "check +optimizer.foo=1", "optimizer.foo: is not a key", "leave",
         never=("optimizer.name",)),
    case("key without its group", "check lr=1e-4", "lr: is not a key", "did you mean optimizer.lr",
         "fix: optimizer.lr="),
    case("key without its group, elsewhere", "check max_length=64", "max_length: is not a key", "data.max_length="),
    case("key in capitals", "check SEED=1", "SEED: is not a key", "did you mean seed"),
    case("tree for a group", "check optimizer={lr:1e-4}", "optimizer: takes an option", "fix: optimizer.lr="),
    case("tree for a group with ++", "check ++train={epochs:1}", "++train: ", "fix: train=OPTION", never=("{",)),
    case("empty word", ["check", ""], "'': is neither a command nor KEY=VALUE"),
    case("key in the wrong group", "check optimizer.rank=4", "optimizer.rank: is not a key of optimizer=adamw",
         "did you mean adapter.rank"),
    case("key of another option of the group", "check adapter=lora adapter.layers=2",
         "adapter.layers: is not a key of adapter=lora", "adapter=freeze"),
    case("key below a value", "check optimizer.lr.x=1", "optimizer.lr.x: is not a key", "optimizer.lr=", never=("{}",)),
    case("key below a group of recipes", "check method.x=1", "method.x: ", "no keys of its own", "fix: method=OPTION"),
    case("key with + below a group of recipes", "check +debug.x=1", "debug.x: ", "no keys of its own", "debug=OPTION"),
    case("key of a tracker that is not chosen", "check tracker.wandb.project=x", "tracker.wandb.project: ",
         "tracker=wandb is not chosen", "tracker=wandb tracker.wandb.project="),
    case("key of a tracker that does not exist", "check tracker.wadb.project=x", "tracker.wadb.project: ",
         "did you mean wandb"),
    case("key that the chosen tracker does not have", "check tracker.none.x=1", "tracker.none.x: is not a key",
         "tracker=none", never=("is not chosen",)),
    case("key of a list's entry", "check data.sources=[{path:a.jsonl,wight:2}]", "data.sources.0.wight: is not a key",
         "did you mean weight", files={"a.jsonl": lines(GOOD)}),
    case("key without a name", "check data.=x", "data.: is not a key", "data.path", never=("quote it",)),
    case("name is not typed", "check optimizer.name=adamw", "optimizer.name: ", "cannot be typed", "fix: optimizer="),
    case("name is not typed with ++", "check ++stage.name=dpo", "stage.name: ", "cannot be typed", "fix: stage="),
    case("name of a tracker is not typed", "check tracker.none.name=x", "tracker.none.name: ", "cannot be typed"),
    case("the schema's version is not typed", "check schema_version=2", "schema_version: ", "cannot be typed", "leave"),
    case("a family's sizes are not typed", "check model=qwen2 model.sizes.big=mine model.size=big", "model.sizes.big: ",
         "cannot be typed", "conf/model"),
    case("a family's sizes are not typed with +", "check model=tiny +model.sizes.x=y", "model.sizes.x: ",
         "cannot be typed"),
    case("a family's sizes are not typed as a whole", "check model=tiny model.sizes={x:y}", "model.sizes: ",
         "cannot be typed"),
    case("deleted key", "check ~optimizer.lr", "~optimizer.lr: ", "optimizer.lr="),
    case("deleted group", "check ~tracker", "~tracker: ", "tracker="),
    case("Hydra's own key", "check hydra.run.dir=x", "hydra.run.dir: ", "output_dir="),
    case("Hydra's own group", "check hydra/job_logging=none", "hydra/job_logging: ", "Hydra's own"),
    case("key that the stage does not read", "check stage=dpo data.packing=best_fit", "data.packing: ",
         "stage=dpo does not read it", "leave data.packing out"),
    case("key that another stage does not read", "check stage=pt data.train_on=last", "data.train_on: ",
         "stage=pt does not read it", "leave data.train_on out"),
    case("group that the stage does not read", "check stage=pt template=chatml", "template: ",
         "stage=pt does not read it", "leave template"),
]  # fmt: skip

OPTIONS = [
    case("misspelt option", "check optimizer=adamww", "optimizer: there is no optimizer adamww", "did you mean adamw",
         "fix: one of {optimizer}"),
    case("unknown option", "check model=zzz", "model: there is no model zzz", "fix: one of {model}"),
    case("misspelt option of a group of recipes", "check debug=smok", "debug: there is no debug smok",
         "did you mean smoke", "fix: one of {debug}"),
    case("misspelt tracker in a list", "check tracker=[none,wadb]", "tracker: there is no tracker wadb",
         "did you mean wandb", "{tracker}"),
    case("misspelt group", "check optimiser=adamw", "optimiser: is not a key", "did you mean optimizer"),
    case("option with +", "check +optimizer=adamw", "+optimizer: ", "fix: optimizer=adamw"),
    case("option with ++", "check ++optimizer=adamw", "++optimizer: ", "fix: optimizer=adamw", never=("force-add",)),
    case("option at a package", "check optimizer@foo=adamw", "optimizer@foo", "fix: optimizer=adamw"),
    case("option that is null", "check stage=null", "stage: cannot be null", "fix: stage="),
    case("option that is empty", "check stage=", "stage: ", "fix: one of {stage}"),
    case("several options", "check model=[tiny,qwen2]", "model: takes one option, not a list", "fix: model=tiny"),
    case("group without an option", "check stage", "stage: ", "fix: stage=", never=("did you mean stage?",)),
    case("misspelt command", "chek stage=sft", "chek: ", "did you mean check", "ftrun --help"),
    case("option as a path", "check optimizer/adamw", "optimizer/adamw: ", "fix: optimizer=adamw"),
    case("misspelt flag", ["--hlep"], "--hlep: ", "KEY=VALUE", "fix: ftrun --help", never=("hlep=",)),
    case("another tool's switch", ["check", "use_galore=true"], "use_galore: is called optimizer=galore here",
         "fix: optimizer=galore"),
    case("another tool's key", ["check", "badam_switch_mode=ascending"], "badam_switch_mode: is called",
         "fix: optimizer.order=..."),
    case("flag", ["check", "--stage=dpo"], "--stage=dpo: ", "KEY=VALUE", "fix: stage=dpo"),
    case("flag with dashes", ["check", "--max-length=64"], "--max-length=64: ", "KEY=VALUE", "max_length=64"),
    case("size that the family does not have", "check model=qwen2 model.size=9B", "model.size: ", "no size 9B", "0.5B",
         "72B"),
    case("size in the wrong case", "check model=qwen2 model.size=0.5b", "model.size: ", "did you mean 0.5B"),
    case("size of a model that comes in one", "check model=tiny model.size=7B", "model.size: ", "one size", "leave"),
]  # fmt: skip

VALUES = [
    case("text for a whole number", "check train.max_steps=many", "train.max_steps: 'many' is not a whole number"),
    case("fraction for a whole number", "check seed=1.5", "seed: '1.5' is not a whole number", "fix: seed=42"),
    case("truth for a whole number", "check seed=true", "seed: ", "is not a whole number"),
    case("text for a number", "check train.epochs=many", "train.epochs: 'many' is not a number", "fix: train.epochs="),
    case("nothing for a number", "check optimizer.lr=", "optimizer.lr: ", "is not a number"),
    case("text for true or false", "check train.shuffle=maybe", "train.shuffle: 'maybe' is not true or false",
         "fix: train.shuffle=true"),
    case("no value of an enum", "check train.scheduler=cosin", "train.scheduler: cosin is none of its values",
         "did you mean cosine", "linear, cosine, cosine_with_min_lr"),
    case("list for a number", "check train.max_steps=[1,2]", "train.max_steps: ", "is not a whole number"),
    case("list for a text", "check data.path=[a.jsonl,b.jsonl]", "data.path: ", "list", "data.sources="),
    case("text for a list", "check adapter.targets=q_proj", "adapter.targets: 'q_proj' is not a list",
         "fix: adapter.targets=[q_proj]"),
    case("text for a list of files", "check plugins=mine.py", "plugins: ", "is not a list", "plugins=[mine.py]"),
    case("text for a list of sources", "check data.sources=[a.jsonl]", "data.sources", "a.jsonl", "path"),
    case("null for a number", "check train.epochs=null", "train.epochs: cannot be null", "fix: train.epochs="),
    case("too small", "check adapter.rank=0", "adapter.rank: 0 is out of range", "adapter.rank=X with X >= 1"),
    case("too large", "check adapter.dropout=1", "adapter.dropout: 1.0 is out of range", ">= 0 and < 1"),
    case("negative", "check seed=-1", "seed: -1 is out of range", ">= 0"),
    case("not a number", "check optimizer.lr=nan", "optimizer.lr: nan is out of range", "> 0"),
    case("infinite", "check optimizer.lr=inf", "optimizer.lr: inf is out of range"),
    case("infinite epochs", "check train.epochs=inf", "train.epochs: inf is out of range"),
    case("too large to be finite", "check optimizer.weight_decay=1e400", "optimizer.weight_decay: inf is out of range"),
    case("out of range in a list", "check data.sources=[{path:a.jsonl,weight:0}]", "data.sources.0.weight: ",
         "out of range", "> 0", files={"a.jsonl": lines(GOOD)}),
    case("unset value", "check train.epochs=???", "train.epochs: has no value", "fix: train.epochs="),
    case("unset value in a list", "check data.sources=[{weight:2}]", "data.sources.0.path: has no value", "path"),
    case("reference to nothing", "check train.epochs=${nothing}", "train.epochs: ", "'nothing' not found", "reference"),
    case("reference to itself", "check train.epochs=${train.epochs}", "train.epochs: ", "ecursive"),
    case("reference to no variable", "check train.epochs=${oc.env:FTRUN_NOT_SET}", "train.epochs: ", "FTRUN_NOT_SET",
         never=("KeyError",)),
    case("reference of the wrong type", "check train.epochs=${data.format}", "train.epochs: ", "is not a number"),
    case("several values", "check seed=1,2", "seed: 1,2 is several values, and a run takes one", "ftrun -m",
         never=("seed=[",)),
    case("a range of values", "check seed=range(1,3)", "seed: range(1,3) is several values", "ftrun -m"),
    case("several options of a group", "check stage=sft,dpo", "stage: sft,dpo is several values", "ftrun -m",
         never=("stage=[",)),
    case("list without brackets", "check adapter.targets=q_proj,v_proj", "adapter.targets: ", "several values",
         "adapter.targets=[q_proj,v_proj]"),
    case("text with a comma", "check data.path=a,b.jsonl", "data.path: ", "several values",
         "\"data.path='a,b.jsonl'\""),
    case("text with an =", "check data.path=a=b.jsonl", "data.path: ", "'a=b.jsonl'", "\"data.path='a=b.jsonl'\""),
    case("open bracket", "check data.path=[a", "data.path: ", "'[a'", "\"data.path='[a'\""),
    case("text with a quote", "check data.path=it's.jsonl", "data.path: ", "it's.jsonl", "quote"),
    case("text with a bracket and a space", ["check", "data.path=a b(c"], "data.path: ", "\"data.path='a b(c'\""),
    case("word without a key", "check =x", "=x: has no key", "KEY=VALUE"),
    case("two keys that say where rows come from", "check data.path=a.jsonl data.sources=[{path:a.jsonl}]",
         "data.sources: ", "data.path", "one of them", files={"a.jsonl": lines(GOOD)}),
    case("two keys that say which model it is", "check model.path=a/b model.size=7B", "model.size: ", "model.path",
         "one of them"),
    case("two keys that say what to evaluate on", "check data.eval_path=demo:identity data.eval_size=4",
         "data.eval_size: ", "data.eval_path", "one of them"),
    case("key that needs another", "check data.train_on=roles", "data.train_roles: ", "data.train_on=roles needs it",
         "data.train_roles=[assistant]"),
    case("key that needs another to be read", "check data.train_roles=[user]", "data.train_roles: ", "does not read it",
         "data.train_on=roles"),
    case("role that nobody has", "check data.train_on=roles data.train_roles=[boss]", "data.train_roles", "boss",
         "assistant"),
    case("two trackers that contradict each other", "check tracker=[none,tensorboard]", "tracker: ", "contradict",
         "tracker=[tensorboard]"),
    case("two keys of an adapter that contradict each other", "check adapter.use_dora=true adapter.init=pissa",
         "adapter.init: ", "DoRA", "adapter.use_dora=false"),
    case("precision that the device does not have", "check hardware=cpu train.precision=fp16", "train.precision: ",
         "needs a GPU", "bf16"),
    case("neither a share nor a count", "check train.warmup=1.5", "train.warmup: 1.5 is neither", "share"),
    case("more steps of warm-up than steps", "check train.warmup=100 train.max_steps=10", "train.warmup: 100 steps",
         "train.max_steps=10", "up to 10"),
    case("Jinja text that is broken", ["check", "template.chat_template='{% if x %}\n{% endfor %}'"],
         "template.chat_template: line 2 is not Jinja: ", "endfor", "mend the line"),
    case("Jinja text with an unknown filter", ["check", "template.chat_template='{{ messages | nothing }}'"],
         "template.chat_template: line 1 is not Jinja: ", "nothing"),
    case("metric that the stage does not have", "check stage=dpo objective=eval_los", "objective: ", "stage=dpo",
         "did you mean eval_loss", "eval_rewards_accuracies"),
    case("format that the stage does not read", "check data.format=text data=text", "data.format: ", "stage=sft",
         "messages"),
    case("format of other rows", "check data.format=preference data=preferences", "data.format: ", "stage=sft",
         "messages"),
    case("missing package", "check tracker=wandb", "tracker: ", "wandb, which is not installed", "pip install wandb",
         packages={"wandb": False}),
    case("secret as a value", f"check tracker=wandb tracker.wandb.key_env={SECRET}", "tracker.wandb.key_env: ",
         "environment variable", "export", never=(SECRET,), packages={"wandb": True}),
    case("secret with an =", f"check tracker=wandb tracker.wandb.key_env={SECRET}=", "tracker.wandb.key_env: ",
         never=(SECRET,), packages={"wandb": True}),
    case("secret with a comma", f"check tracker=wandb tracker.wandb.key_env={SECRET},x", "tracker.wandb.key_env: ",
         "several values", never=(SECRET,), packages={"wandb": True}),
    case("secret in a key that there is not", f"check tracker=wandb tracker.wandb.api_key={SECRET}",
         "tracker.wandb.api_key: is not a key", never=(SECRET,), packages={"wandb": True}),
]  # fmt: skip

MODELS = [
    case("model folder that is not there", "check model.path=./nothing", "model.path: there is no folder", "nothing",
         "hub id"),
    case("deep model folder that is not there", "check model.path=a/b/c", "model.path: there is no folder", "a/b/c"),
    case("empty model folder", "check model.path=here", "model.path: here is no model", "config.json", "holds nothing",
         files={"here/": ""}),
    case("model folder with something else", "check model.path=here", "model.path: here is no model", "rows.jsonl",
         files={"here/rows.jsonl": ""}),
    case("model folder without model_type", "check model.path=here", "here/config.json: has no model_type",
         files=model_folder("config.json") | {"here/config.json": "{}"}),
    case("model folder with a broken config.json", "check model.path=here", "here/config.json: is not JSON",
         files=model_folder("config.json") | {"here/config.json": '{"model_type": '}),
    case("model folder with a config.json that is not text", "check model.path=here", "here/config.json: is not UTF-8",
         files=model_folder("config.json") | {"here/config.json": b"\xff\xfe{"}),
    case("model folder with a list for a config.json", "check model.path=here", "here/config.json: is not a JSON obj",
         files=model_folder("config.json") | {"here/config.json": "[]"}),
    case("model folder without a tokenizer", "check model.path=here", "model.path: here has no tokenizer",
         "tokenizer.json", files=model_folder("tokenizer.json")),
    case("model folder without weights", "check model.path=here", "model.path: here has no weights",
         "model.safetensors", files=model_folder("model.safetensors")),
    case("model folder with half of its weights", "check model.path=here", "model.path: here has not all of its weight",
         "1 files are missing, first b.safetensors", files=model_folder("model.safetensors") | SHARDS),
    case("model folder with a broken index", "check model.path=here", "here/model.safetensors.index.json: is not JSON",
         files=model_folder("model.safetensors") | {"here/model.safetensors.index.json": "{"}),
    case("adapter without its kind", "check model.path=here", "here/adapter_config.json: has no peft_type",
         files=model_folder("config.json", "model.safetensors")
         | {"here/adapter_config.json": "{}", "here/adapter_model.safetensors": ""}),
    case("adapter without weights", "check model.path=here", "model.path: here has no weights", "adapter_model.safete",
         files=model_folder() | {"here/adapter_config.json": '{"peft_type": "LORA"}'}),
    case("GGUF file that is none", "check model.path=here.gguf", "model.path: here.gguf is no GGUF file", "copied",
         files={"here.gguf": "<html>"}),
    case("empty GGUF file", "check model.path=here.gguf", "model.path: here.gguf is no GGUF file",
         files={"here.gguf": ""}),
    case("model of ftrun's own from the hub", "check model=tiny model.source=hub", "model.source: builtin:tiny is ",
         "not a model on the hub", "model.source=auto"),
    case("model of ftrun's own as a folder", "check model=tiny model.source=folder", "model.source: builtin:tiny is ",
         "not a folder"),
    case("folder as a file", "check model.path=here model.source=gguf", "model.source: here is a folder, not a file",
         files=model_folder()),
    case("folder as a run", "check model.path=here model.source=run", "model.source: here is a folder, not the folder",
         files=model_folder()),
    case("file from the hub", "check model.path=here.gguf model.source=hub", "model.source: here.gguf is a file, not ",
         files={"here.gguf": "GGUF"}),
    case("model on the hub as one of ftrun's own", "check model.path=a/b model.source=builtin", "model.source: a/b is ",
         "not a model that ships with ftrun"),
    case("model on the hub as a folder", "check model.path=a/b model.source=folder", "model.path: there is no folder"),
    case("hub id with two dashes", "check model.path=a--b", "model.path: ", "no hub id looks like that"),
    case("model path with a name that is too long", ["check", f"model.path={'x' * 300}"], "model.path: xxx",
         "cannot be read: File name too long", never=("x" * 150,)),
    case("model that is a file", "check model.path=model.bin", "model.path: model.bin is a file", "config.json",
         files={"model.bin": "x"}),
    case("run without a model", "check model.path=old", "model.path: ", "left no model", "failed", "ftrun resume old",
         files={"old/run.yaml": "x", "old/result.json": '{"status": "failed"}'}),
    case("bad hub id", ["check", "model.path=Qwen/Qwen 2"], "model.path: ", "no hub id looks like that", "ORG/NAME"),
    case("address of a hub page", "check model.path=https://huggingface.co/Qwen/Qwen2-0.5B", "model.path: ",
         "model.path=Qwen/Qwen2-0.5B"),
    case("model that is empty", "check model.path=", "model.path: has no value", "model.path="),
    case("model that is null", "check model=tiny model.path=null", "model.path: has no value", "model.path="),
    case("builtin that there is not", "check model.path=builtin:tny", "model.path: ", "builtin:tiny"),
    case("model that no wheel holds", "check model=qwen2 model.source=wheel", "model.", "wheel",
         never=("there is no folder",)),
    case("model that is nowhere, offline", "model.path=nobody/nothing",
         "model.path: nobody/nothing is not on this machine",
         "HF_HUB_OFFLINE", "model.path=FOLDER", "model=tiny", never=("OfflineModeIsEnabled",)),
]  # fmt: skip

DATA = [
    case("data file that is not there", "check data.path=row.jsonl", "data.path: there is no file row.jsonl",
         "did you mean rows.jsonl", "data.path=FILE", "{here}", files={"rows.jsonl": lines(GOOD)}),
    case("evaluation file that is not there", "check data.eval_path=none.jsonl", "data.eval_path: there is no file",
         "data.eval_path="),
    case("source that is not there", "check data.sources=[{path:none.jsonl}]", "data.sources", "there is no file",
         never=("data.sources=FILE",)),
    case("data that is empty", "check data.path=", "data.path: has no value", "data.path="),
    case("empty data file", "check data.path=a.jsonl", "a.jsonl: has no rows", "a file with rows",
         files={"a.jsonl": ""}),
    case("CSV file of a header", "check data.path=a.csv", "a.csv: has no rows", files={"a.csv": "prompt,completion\n"}),
    case("not UTF-8", "check data.path=a.jsonl", "a.jsonl:3: is not UTF-8", "iconv",
         files={"a.jsonl": f"{GOOD_LINE}\n{GOOD_LINE}\n".encode() + b'{"text": "caf\xe9"}\n'}),
    case("not UTF-8 far below", "check data.path=a.jsonl", "a.jsonl:501: is not UTF-8", "iconv",
         files={"a.jsonl": f"{GOOD_LINE}\n".encode() * 500 + b"\xe9\n"}),
    case("CSV that is not UTF-8", "check data.path=a.csv", "a.csv:301: is not UTF-8", "iconv",
         files={"a.csv": b"prompt,completion\n" + b"Hello?,Hello to you as well.\n" * 299 + b"\xe9,x\n"}),
    case("broken JSON line", "check data.path=a.jsonl", "a.jsonl:2: is not JSON", "column",
         "one JSON object on each line",
         files={"a.jsonl": lines(GOOD, GOOD_LINE[:-3], GOOD)}),
    case("JSON line with single quotes", "check data.path=a.jsonl", "a.jsonl:3: is not JSON", "double quotes",
         files={"a.jsonl": lines(GOOD, "", "{'messages': []}")}),
    case("JSON line that is a list", "check data.path=a.jsonl", "a.jsonl:2: ", "list, not an object", '{"messages"',
         files={"a.jsonl": lines(GOOD, "[1, 2]")}),
    case("JSON line that is null", "check data.path=a.jsonl", "a.jsonl:1: ", "null, not an object",
         files={"a.jsonl": "null\n"}),
    case("JSON array broken in the middle", "check data.path=a.json", "a.json:4: is not JSON", "a list of JSON objects",
         files={"a.json": f"[\n{GOOD_LINE},\n{GOOD_LINE},\n{{broken}},\n{GOOD_LINE}\n]"}),
    case("JSON array broken inside a row", "check data.path=a.json", "a.json:7: is not JSON",
         files={"a.json": '[\n{\n"text": "a"\n},\n{\n"text": "b",\n"more" "c"\n}\n]'}),
    case("JSON array cut off", "check data.path=a.json", "a.json:3: is not JSON",
         files={"a.json": f"[\n{GOOD_LINE},\n{GOOD_LINE}"}),
    case("JSON array with something behind it", "check data.path=a.json", "a.json:4: ", "a list of JSON objects",
         files={"a.json": f"[\n{GOOD_LINE}\n]\n[{GOOD_LINE}]"}),
    case("JSON array without a comma", "check data.path=a.json", "a.json:3: is not JSON", "','",
         files={"a.json": f"[\n{GOOD_LINE}\n{GOOD_LINE}\n]"}),
    case("row of a JSON array that is no object", "check data.path=a.json", "a.json:3: ", "number, not an object",
         files={"a.json": f"[\n{GOOD_LINE},\n3]"}),
    case("wrong row of an indented JSON array", "check data.path=a.json", "a.json:8: ", "question",
         files={"a.json": '[\n{\n"prompt": "a",\n"completion": "b"\n},\n\n\n{\n"question": "c"\n}\n]'}),
    case("CSV with too many cells", "check data.path=a.csv", "a.csv:3: has more cells", "quote",
         files={"a.csv": "prompt,completion\na,b\na,b,c\n"}),
    case("CSV with too few cells", "check data.path=a.csv", "a.csv:4: has fewer cells", "quote",
         files={"a.csv": 'prompt,completion\n"a\na",b\na\n'}),
    case("CSV with an open quote", "check data.path=a.csv", "a.csv:", "is not CSV",
         files={"a.csv": 'prompt,completion\na,"b\nc,d\ne,f\n'}),
    case("columns that say nothing", "check data.path=a.jsonl", "a.jsonl:2: has the columns query, reply",
         "messages", "prompt and completion", files={"a.jsonl": lines(GOOD, {"query": "a", "reply": "b"})}),
    case("columns of all rows that say nothing", "check data.path=a.jsonl", "a.jsonl:1: has the columns question",
         "all of the first 3 rows", never=("on_bad_row",), files={"a.jsonl": lines(*[{"question": "a"}] * 3)}),
    case("row without columns", "check data.path=a.jsonl", "a.jsonl:2: has no columns",
         files={"a.jsonl": lines(GOOD, {})}),
    case("unknown role", "check data.path=a.jsonl", "a.jsonl:2: message 1 has the role 'boss'", "user, ", "assistant",
         "data.on_bad_row=skip", files={"a.jsonl": lines(GOOD, chat({"role": "boss", "content": "x"}, "y"))}),
    case("role that is no text", "check data.path=a.jsonl", "a.jsonl:2: message 1 has the role", "assistant",
         files={"a.jsonl": lines(GOOD, chat({"role": ["user"], "content": "x"}, "y"))}),
    case("message without a role", "check data.path=a.jsonl", "a.jsonl:1: message 2 has no role", "assistant",
         files={"a.jsonl": lines(chat("x", {"content": "y"}), GOOD)}),
    case("message without content", "check data.path=a.jsonl", "a.jsonl:2: message 2 has no text in content",
         '"content"',
         files={"a.jsonl": lines(GOOD, chat("x", {"role": "assistant"}))}),
    case("message with parts that are no text", "check data.path=a.jsonl", "a.jsonl:2: message 2 ", "content",
         files={"a.jsonl": lines(GOOD, chat("x", {"role": "assistant", "content": ["y", {"text": 3}]}))}),
    case("message with a picture", "check data.path=a.jsonl", "a.jsonl:2: has more places for images than images",
         files={"a.jsonl": lines(GOOD, chat({"role": "user", "content": [{"type": "image"}, *PARTS]}, "y"))}),
    case("message that is no object", "check data.path=a.jsonl", "a.jsonl:2: message 1 is not an object", '{"role"',
         files={"a.jsonl": lines(GOOD, {"messages": ["x"]})}),
    case("messages that are no list", "check data.path=a.jsonl", "a.jsonl:2: messages is not a list", '"messages": [',
         files={"a.jsonl": lines(GOOD, {"messages": "x"})}),
    case("empty reply", "check data.path=a.jsonl", "a.jsonl:2: has no reply", "assistant message with text",
         files={"a.jsonl": lines(GOOD, chat("x", ""))}),
    case("no reply", "check data.path=a.jsonl", "a.jsonl:2: has no reply", files={"a.jsonl": lines(GOOD, chat("x"))}),
    case("column that is no text", "check data.path=a.jsonl", "a.jsonl:2: output is null, not text",
         files={"a.jsonl": lines(GOOD, {"instruction": "a", "output": None})}),
    case("history that is no text", "check data.path=a.jsonl", "a.jsonl:2: ", "history",
         files={"a.jsonl": lines(GOOD, {"instruction": "a", "output": "b", "history": [["c", 3]]})}),
    case("a single row, skipped", "check data.path=a.jsonl data.on_bad_row=skip", "a.jsonl:1: has no reply",
         files={"a.jsonl": lines(chat("x"))}),
    case("unknown file ending", "check data.path=a.docx", "data.path: a.docx is of no kind", ".jsonl", ".csv",
         files={"a.docx": "x"}),
    case("empty folder", "check data.path=here", "data.path: the folder here holds no file of rows", ".jsonl",
         files={"here/": ""}),
    case("folder of evaluation rows only", "check data.path=here", "data.path: ", "here", "evaluat",
         files={"here/test.jsonl": lines(GOOD)}),
    case("glob without a match", "check data.path=*.jsonl", "data.path: no file matches *.jsonl", "glob"),
    case("data path with a name that is too long", ["check", f"data.path={'x' * 300}.jsonl"], "data.path: xxx",
         "cannot be read: File name too long", never=("x" * 150,)),
    case("data path with a NUL", ["check", "data.path='a\0b.jsonl'"], "data.path: a\\x00b.jsonl cannot be read: a NUL",
         never=("\0",)),
    case("more rows held out than there are", "check data.path=a.jsonl data.eval_size=3", "data.eval_size: 3 rows ",
         "there are 3", "less than 3", files={"a.jsonl": lines(*[GOOD] * 3)}),
    case("more rows held out than are used", "check data.path=a.jsonl data.rows=2 data.eval_size=2", "data.eval_size: ",
         "there are 2", files={"a.jsonl": lines(*[GOOD] * 9)}),
    case("more rows held out than several files have",
         "check data.sources=[{path:a.jsonl},{path:here,rows:3}] data.eval_size=9", "data.eval_size: 9 rows ",
         "there are 5",
         files={"a.jsonl": lines(*[GOOD] * 2), "here/a.jsonl": lines(*[GOOD] * 2), "here/b.jsonl": lines(*[GOOD] * 2)}),
    case("a share of one row held out", "check data.path=a.jsonl data.eval_size=0.1", "data.eval_size: 1 rows ",
         files={"a.jsonl": lines(GOOD)}),
    case("unknown demo set", "check data.path=demo:identit", "data.path: ", "no data set identit",
         "did you mean identity", "demo:preferences"),
    case("chat rows for a preference stage", "check stage=dpo data.path=a.jsonl", "a.jsonl:1: ", "messages",
         "chosen and rejected", "conversations", never=("rename the columns",),
         files={"a.jsonl": lines(GOOD, GOOD)}),
    case("pairs for a chat stage", "check data.path=a.jsonl", "a.jsonl:1: ", "prompt, chosen, rejected", "pairs",
         never=("rename the columns",), files={"a.jsonl": lines(PAIR, PAIR)}),
    case("pair without a prompt", "check stage=dpo data.path=a.jsonl", "a.jsonl:2: ", "prompt",
         files={"a.jsonl": lines(PAIR, {"chosen": "a", "rejected": "b"})}),
    case("empty text", "check stage=pt data.path=a.jsonl", "a.jsonl:2: has an empty text",
         files={"a.jsonl": lines({"text": "a"}, {"text": " "})}),
]  # fmt: skip

FOLDERS = [
    case("folder without a name", ["check", "output_dir="], "output_dir: has no value", "output_dir=FOLDER"),
    case("folder with a name that is too long", ["check", f"output_dir={'x' * 300}"], "output_dir: xxx", "too long",
         "another folder", never=("x" * 150,)),
    case("folder of another run", "check output_dir=old", "output_dir: old holds another run", "ftrun resume old",
         files={"old/run.yaml": "x"}),
    case("folder that is a file", "check output_dir=old", "output_dir: old is a file", "folder", files={"old": "x"}),
    case("folder below a file", "check output_dir=old/new", "output_dir: ", "old is a file", files={"old": "x"}),
    case("folder that is not empty", "check output_dir=old", "output_dir: old is not empty", "empty folder",
         files={"old/notes.txt": "x"}),
    case("folder that cannot be made", "model=tiny output_dir=/proc/ftrun/run", "output_dir: /proc/ftrun/run ",
         "folder"),
]  # fmt: skip

PLUGINS = [
    case("plugin file that is not there", "check plugins=[none.py]", "plugins: there is no file none.py", "plugins=["),
    case("plugin file with a syntax error", "check plugins=[p1.py]", "plugins: ", "SyntaxError", "{here}/p1.py:3",
         files={"p1.py": "import os\n\nx = (\n"}),
    case("plugin file that imports nothing", "check plugins=[p2.py]", "plugins: ", "No module named 'nothing_there'",
         "{here}/p2.py:3", files={"p2.py": "import os\n\nimport nothing_there\n"}),
    case("plugin file that fails", "check plugins=[p3.py]", "plugins: ", "ValueError: bad", "{here}/p3.py:2",
         files={"p3.py": "def f():\n    raise ValueError('bad')\n\nf()\n"}),
    case("plugin file that ends the program", "check plugins=[p4.py]", "plugins: ", "SystemExit", "{here}/p4.py:3",
         files={"p4.py": "import sys\n\nsys.exit(3)\n"}),
    case("plugin file that registers nothing", "check plugins=[p5.py]", "plugins: {here}/p5.py registers nothing",
         "@register", files={"p5.py": "x = 1\n"}),
    case("plugin without a name", "check plugins=[p6.py]", "plugins: ", "has no name", "{here}/p6.py:",
         files={"p6.py": plugin_file("", name=None)}, never=("plugin.py:",)),
    case("plugin that is no dataclass", "check plugins=[p7.py]", "plugins: ", "no dataclass", "{here}/p7.py:",
         files={"p7.py": plugin_file("").replace("@dataclass(kw_only=True)\n", "")}, never=("plugin.py:",)),
    case("plugin of a name that is taken", "check plugins=[p8.py] optimizer=adamw", "plugins: ",
         "optimizer=adamw is defined twice", "{here}/p8.py:", never=("plugin.py:",),
         files={"p8.py": plugin_file("", name="name: str = 'adamw'")}),
    case("plugin whose default has the wrong type", "check plugins=[p9.py] optimizer=mine", "optimizer=mine: ",
         "strength",
         files={"p9.py": plugin_file("strength: int = None")}),
    Case("option of a plugin file that fails", "check plugins=[p10.py] optimizer=mine10",
         [["plugins: ", "p10.py:1"], ["optimizer: there is no optimizer mine10"]],
         files={"p10.py": "import nothing_there\n"}),
]  # fmt: skip

PRESETS = [
    case("preset that is not YAML", "check train=mine", "{here}/conf/train/mine.yaml:2: is not YAML", "mend the line",
         files={"conf/train/mine.yaml": "epochs: 3\nbad: : x\nmore: 1\n"}),
    case("preset with a tab", "check train=mine", "{here}/conf/train/mine.yaml:1: is not YAML", "'\\t'",
         files={"conf/train/mine.yaml": "\tepochs: 3\n"}),
    case("preset with a key twice", "check train=mine", "{here}/conf/train/mine.yaml:2: ", "duplicate key epochs",
         files={"conf/train/mine.yaml": "epochs: 3\nepochs: 4\n"}),
    case("preset that is not UTF-8", "check train=mine", "{here}/conf/train/mine.yaml", "UTF-8",
         files={"conf/train/mine.yaml": b"# caf\xe9\nepochs: 3\n"}),
    case("preset with an unknown key", "check train=mine", "{here}/conf/train/mine.yaml: train.epocs is not a key",
         "did you mean epochs", "max_steps", files={"conf/train/mine.yaml": "epocs: 3\n"}),
    case("preset with a wrong type", "check train=mine",
         "{here}/conf/train/mine.yaml: train.epochs: 'three' is not a number",
         files={"conf/train/mine.yaml": "epochs: three\n"}),
    case("preset with a wrong value of an enum", "check train=mine", "{here}/conf/train/mine.yaml: train.scheduler: ",
         "did you mean cosine", files={"conf/train/mine.yaml": "scheduler: cosin\n"}),
    case("preset out of range", "check train=mine", "train.epochs: -3.0 is out of range",
         files={"conf/train/mine.yaml": "epochs: -3\n"}),
    case("preset with a broken reference", "check train=mine", "{here}/conf/train/mine.yaml", "${nothing",
         files={"conf/train/mine.yaml": "epochs: ${nothing\n"}),
    case("preset of a plugin with an unknown key", "check optimizer=mine",
         "{here}/conf/optimizer/mine.yaml: optimizer.wd is not a key", "weight_decay",
         never=("name,",), files={"conf/optimizer/mine.yaml": PLUGIN_GROUP + "wd: 1\n"}),
    case("preset of a plugin with a wrong type", "check optimizer=mine",
         "{here}/conf/optimizer/mine.yaml: optimizer.lr: 'high' is not a number",
         files={"conf/optimizer/mine.yaml": PLUGIN_GROUP + "lr: high\n"}),
    case("preset of a plugin without defaults", "check optimizer=mine", "{here}/conf/optimizer/mine.yaml: ",
         "defaults: [", "_self_]", "adamw", files={"conf/optimizer/mine.yaml": "beta1: 0.8\n"}),
    case("preset of a plugin without defaults, a key that all have", "check optimizer=mine",
         "{here}/conf/optimizer/mine.yaml: ", "defaults: [", "_self_]", "adamw", never=("optimizer.name=",),
         files={"conf/optimizer/mine.yaml": "lr: 1.0e-3\n"}),
    case("preset of a plugin that does not exist", "check optimizer=mine", "{here}/conf/optimizer/mine.yaml: ",
         "optimizer=adamww, which does not exist", "did you mean adamw",
         files={"conf/optimizer/mine.yaml": "defaults: [adamww, _self_]\n"}),
    case("preset that sets a name", "check optimizer=mine", "{here}/conf/optimizer/mine.yaml: ", "name",
         files={"conf/optimizer/mine.yaml": PLUGIN_GROUP + "name: other\n"}),
    case("preset that is a list", "check optimizer=mine", "{here}/conf/optimizer/mine.yaml: ",
         files={"conf/optimizer/mine.yaml": "- adamw\n"}),
    case("recipe that asks for no option", "check experiment=mine", "{here}/conf/experiment/mine.yaml: ",
         "optimizer=adamww, which does not exist", "did you mean adamw", "{optimizer}",
         files={"conf/experiment/mine.yaml": GLOBAL + "defaults:\n  - override /optimizer: adamww\n"}),
    case("recipe that asks for no group", "check experiment=mine", "{here}/conf/experiment/mine.yaml: ", "optimiser",
         "did you mean optimizer",
         files={"conf/experiment/mine.yaml": GLOBAL + "defaults:\n  - override /optimiser: adamw\n"}),
    case("recipe that forgets the override", "check experiment=mine", "{here}/conf/experiment/mine.yaml: ",
         "override /optimizer", files={"conf/experiment/mine.yaml": GLOBAL + "defaults:\n  - /optimizer: adamw\n"}),
    case("recipe that forgets the defaults", "check experiment=mine", "{here}/conf/experiment/mine.yaml: ",
         "override /adapter: full", files={"conf/experiment/mine.yaml": GLOBAL + "adapter: full\n"}),
    case("recipe that forgets its package", "check experiment=mine", "{here}/conf/experiment/mine.yaml: ",
         "# @package _global_", files={"conf/experiment/mine.yaml": "train:\n  epochs: 3\n"}),
    case("recipe whose package stands below a comment", "check experiment=mine", "{here}/conf/experiment/mine.yaml: ",
         "# @package _global_", files={"conf/experiment/mine.yaml": f"# Mine.\n{GLOBAL}seed: 3\n"}),
    case("recipe whose package has no name", "check experiment=mine", "{here}/conf/experiment/mine.yaml",
         "# @package _global_", files={"conf/experiment/mine.yaml": "# @package\nseed: 3\n"}),
    case("preset that derives from itself", "check optimizer=adamw", "{here}/conf/optimizer/adamw.yaml", "itself",
         files={"conf/optimizer/adamw.yaml": PLUGIN_GROUP + "lr: 1\n"}),
    case("preset of a tracker without its package", "check tracker=mine", "{here}/conf/tracker/mine.yaml: ",
         "tracker.tensorboard",
         files={"conf/tracker/mine.yaml": "defaults: [tensorboard, _self_]\nfolder: elsewhere\n"}),
    case("recipe with an unknown group", "check experiment=mine",
         "{here}/conf/experiment/mine.yaml: trian is not a key", "did you mean train",
         never=("schema_version",), files={"conf/experiment/mine.yaml": GLOBAL + "trian:\n  epochs: 3\n"}),
]  # fmt: skip

SWEEPS = [
    case("range without a value", "check -m seed=range(5,1)", "seed: seed=range(5,1) gives no value", "VALUE,VALUE"),
    case("pattern that matches nothing", "check -m adapter=glob(zzz*)", "adapter: adapter=glob(zzz*) gives no value"),
    case("two sweeps", "check -m sweep=lora_rank sweep=learning_rate", "sweep: is typed 2 times", "one of them"),
    case("a grid of folders", "check -m model=tiny output_dir=a,b", "output_dir: is the folder of the whole sweep",
         "output_dir=FOLDER"),
    case("grid with a wrong value", "check -m model=tiny seed=1,many adapter=lora,full",
         "seed: 'many' is not a whole number"),
    case("grid with a wrong option", "check -m model=tiny adapter=lora,ful seed=1,2",
         "adapter: there is no adapter ful", "did you mean full"),
    case("grid without an end", "check -m optimizer.lr=interval(0,1)", "optimizer.lr: ", "interval(0,1) has no end",
         "optimizer.lr=VALUE,VALUE"),
    case("grid that is too large", "check -m model=tiny seed=range(0,100000)", "-m: the grid has 100,000 runs",
         "10,000"),
    case("grid that is far too large", "check -m model=tiny seed=range(0,100000000) data.rows=1,2",
         "-m: the grid has at least 400,000 runs", "10,000"),
    case("large grid with a wrong key", "check -m model=tiny sed=range(0,3000)", "sed: is not a key", "seed"),
    case("large grid with a wrong value", "check -m model=tiny seed=range(1,1000) train.epochs=1,many",
         "train.epochs: 'many' is not a number"),
    case("large grid with a value out of range", "check -m model=tiny seed=range(1,1000) train.epochs=1,-1",
         "train.epochs: -1.0 is out of range"),
    case("grid with a file that is not there", "check -m model=tiny seed=1,2 data.path=demo:identity,a.jsonl",
         "data.path: there is no file a.jsonl"),
    case("grid of nothing", "check -m", "-m: ", "VALUE,VALUE", never=("m=VALUE, without",)),
    case("sweep that there is not", "check -m sweep=lora_rnk", "sweep: there is no sweep lora_rnk",
         "did you mean lora_rank", "learning_rate"),
    case("sweep without -m", "check sweep=lora_rank", "sweep: ", "ftrun -m sweep=lora_rank"),
    case("sweep file that is not YAML", "check -m sweep=mine", "{here}/sweeps/mine.yaml:2: is not YAML",
         files={"sweeps/mine.yaml": "seed: 1,2\nbad: : x\nmore: 1\n"}),
    case("sweep file that is a list", "check -m sweep=mine", "{here}/sweeps/mine.yaml: ",
         files={"sweeps/mine.yaml": "- seed=1,2\n"}),
    case("sweep file with an unknown key", "check -m sweep=mine", "optimizer.lrr: is not a key", "optimizer.lr",
         files={"sweeps/mine.yaml": "optimizer.lrr: 1e-4,1e-5\n"}),
]  # fmt: skip

SEVERAL = [
    Case("two wrong options", "check optimizer=adamww stage=sff",
         [["optimizer: there is no optimizer adamww"], ["stage: there is no stage sff"]]),
    Case("a wrong word beside a wrong option", "check a=b=c optimizer=adamww", [["a: "], ["optimizer: "]]),
    Case("a flag beside a wrong value", ["check", "--fast", "seed=-1"], [["--fast: "], ["seed: "]]),
    Case("words, keys, types, ranges, contradictions, model, data and folder at once",
         "check hydra.verbose=true stage=sft,dpo optimizer.lrr=1 train.max_steps=many adapter.rank=0 "
         "data.train_on=roles model.path=./nothing data.path=none.jsonl output_dir=old",
         [["hydra.verbose: "], ["stage: sft,dpo"], ["optimizer.lrr: "], ["train.max_steps: "], ["adapter.rank: "],
          ["data.train_roles: "], ["model.path: "], ["data.path: "], ["output_dir: "]],
         files={"old/run.yaml": "x"}),
    Case("bad rows of two files", "check data.sources=[{path:a.jsonl},{path:b.jsonl}]",
         [["a.jsonl:2: "], ["a.jsonl:3: "], ["b.jsonl:1: is not JSON"]],
         files={"a.jsonl": lines(GOOD, chat("x"), {"messages": 3}), "b.jsonl": "{\n"}),
    Case("two files that are not there", "check data.path=a.jsonl data.eval_path=b.jsonl",
         [["data.path: there is no file a.jsonl"], ["data.eval_path: there is no file b.jsonl"]]),
    Case("the same mistake twice", "check seed=-1 seed=-1", [["seed: -1 is out of range"]]),
    Case("many bad rows", "check data.path=a.jsonl",
         [*([f"a.jsonl:{line}: has no reply"] for line in range(2, 7)),
          ["a.jsonl: has 3 more bad rows", "data.on_bad_row=skip"]],
         files={"a.jsonl": lines(GOOD, *[chat("x")] * 8)}),
]  # fmt: skip

CASES = [*KEYS, *OPTIONS, *VALUES, *MODELS, *DATA, *FOLDERS, *PLUGINS, *PRESETS, *SWEEPS, *SEVERAL]


def pretend(monkeypatch, packages: dict[str, bool]) -> None:
    """Make distributions look installed or not."""
    found = Distribution.from_name

    def from_name(name: str) -> Any:
        if name not in packages:
            return found(name)
        if packages[name]:
            return SimpleNamespace(version="1.0")
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", from_name)


def problems_of(err: str) -> list[str]:
    """Return each problem that was printed, with its fix."""
    return re.findall(r"^(.+\n    fix: .+)$", re.sub(r"\Aerror: (\d+ problems\n)?", "", err), re.MULTILINE)


@pytest.mark.parametrize("wrong", CASES, ids=lambda wrong: wrong.id)
def test_a_mistake_is_named_and_its_fix_told(wrong, driver, write, tmp_path, monkeypatch):
    for name, content in wrong.files.items():
        (tmp_path / name).mkdir(parents=True) if name.endswith("/") else write(name, content)
    pretend(monkeypatch, wrong.packages)
    done = driver(*(wrong.words.split() if isinstance(wrong.words, str) else wrong.words))
    known = {"here": str(tmp_path)} | {group: ", ".join(options.names(group)) for group in options.GROUPS}

    assert done.code == 2, done.out + done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    internals = [word for word in INTERNALS if word not in str(wrong.words)]
    assert not [word for word in (*internals, *wrong.never) if word in done.err], done.err
    found = problems_of(done.err)
    assert "".join(found).replace("\n", "") == re.sub(r"\Aerror: (\d+ problems\n)?|\n", "", done.err), (
        "all is a problem"
    )
    for start, *phrases in wrong.problems:
        expected = [
            re.sub(r"\{(\w+)\}", lambda match: known.get(match[1], match[0]), text) for text in (start, *phrases)
        ]
        matching = [problem for problem in found if problem.startswith(expected[0])]
        assert len(matching) == 1, f"{expected[0]!r} should begin one problem of\n{done.err}"
        for phrase in expected[1:]:
            assert phrase in matching[0], done.err
    assert len(found) == len(wrong.problems), done.err


def test_there_are_many_cases_and_each_is_another():
    assert len(CASES) > 150
    assert len({wrong.id for wrong in CASES}) == len(CASES)


# What Hydra's grammar or the shell would read otherwise.
AWKWARD = [
    "a=b", "[a", "a]", "{a", "a}b", "f(x", "it's=1", 'say "hi"=1', "a,b", "[a,b", "~/rows", "a:b=c", "x = y", "$HOME=1",
    "back\\slash=1", "tail\\", "`date`=1", "a'b'c", "ä=ö", "a#b=1", "a%b=1", "q?=1", "50%,60%", "*.jsonl,x", "a=\\'b",
]  # fmt: skip


@pytest.mark.parametrize("value", AWKWARD)
def test_the_quoting_that_is_suggested_works(value, driver):
    done = driver("show", f"output_dir={value}")
    if done.code == 0:
        assert config.compose([f"output_dir={value}"]).output_dir == value
        return
    assert done.code == 2
    (problem,) = problems_of(done.err)
    quoted = re.search(r'"output_dir=.*"', problem.rpartition("fix: ")[2])
    assert quoted, problem
    typed = subprocess.run(["bash", "-c", f"printf %s {quoted[0]}"], capture_output=True, text=True, check=True).stdout
    assert config.compose([typed]).output_dir == value, problem


def test_a_character_that_needs_quoting_is_named():
    for character in string.punctuation:
        _, _, problems = words.read([f"output_dir={character}a{character}b"])
        for problem in problems:
            if "characters that mean something" in problem.message:
                named = problem.message.partition("characters that mean something")[2]
                assert character in named, f"{character} is not named in {problem.message}"


def test_a_null_recipe_is_no_recipe(driver):
    assert driver("check", "model=tiny", "debug=null").code == 0
    assert driver("check", "model=tiny", "debug=smoke", "debug=null").code == 0


def test_two_plugin_files_of_one_name_are_two(driver, write):
    write("a/same.py", plugin_file("", name="name: str = 'from_a'"))
    write("b/same.py", plugin_file("", name="name: str = 'from_b'"))
    assert driver("check", "model=tiny", "plugins=[a/same.py,b/same.py]", "optimizer=from_b").code == 0


def test_links_in_a_circle_are_named(driver, tmp_path):
    (tmp_path / "a.jsonl").symlink_to("a.jsonl")
    done = driver("check", "model=tiny", "data.path=a.jsonl")
    assert done.code == 2
    assert problems_of(done.err)[0].startswith("data.path: a.jsonl cannot be read: Too many levels of symbolic links")


def test_rows_that_nobody_has_counted_are_not_missed(driver, write):
    write("a.jsonl", lines(*[GOOD] * 1500))
    done = driver("check", "model=tiny", "data.path=a.jsonl", "data.eval_size=1200")
    assert done.code == 0, done.err


def test_a_recipe_may_be_shorter_than_the_warm_up(driver):
    assert driver("check", "model=tiny", "train.warmup=100", "debug=smoke").code == 0
    assert driver("check", "model=tiny", "train.warmup=10", "train.max_steps=10").code == 0


@pytest.mark.parametrize(
    "text", ["{% generation %}x{% endgeneration %}", "{% for m in messages %}{% break %}{% endfor %}{{ x | tojson }}"]
)
def test_jinja_as_transformers_takes_it_is_no_mistake(text, driver):
    done = driver("check", "model=tiny", f"template.chat_template='{text}'")
    assert done.code == 0, done.err


DAMAGED = {
    "empty": (b"", "is empty"),
    "not UTF-8": (b"seed: 1\nobjective: caf\xe9\n", "is damaged: byte 22 is not UTF-8"),
    "not YAML": (b"seed: 1\nmodel: [\n", "is damaged: it is not YAML in line 3"),
    "zeros": (b"\0" * 4096, "is damaged: it is not YAML"),
    "a list": (b"- a\n", "is damaged: it is not KEY: VALUE"),
    "one key": (b"schema_version: 1\n", "is not whole: it has no stage"),
    "another version": (b"schema_version: 7\n", "is of version 7, and this ftrun reads version 1"),
}


def damaged_run(content: str | bytes, driver, write) -> str:
    """Resume a run whose run.yaml is as given, and return the problem."""
    file = write("old/run.yaml", content)
    done = driver("resume", "old")
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    (problem,) = problems_of(done.err)
    assert problem.startswith(f"old/{file.name}: "), problem
    assert "manifest.json" in problem
    return problem


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_run_file_is_named(name, driver, write):
    content, says = DAMAGED[name]
    assert says in damaged_run(content, driver, write)


def test_an_incomplete_run_file_is_named(driver, write):
    whole = config.compose(["model=tiny", "output_dir=old"]).to_yaml()
    for at in range(1, len(whole) - 1, len(whole) // 40):
        damaged_run(whole[:at], driver, write)
    assert "no schema_version" in damaged_run(whole.rpartition("schema_version")[0], driver, write)
    assert "has no plugins" in damaged_run(whole.replace("plugins: []\n", ""), driver, write)
    assert "which adapter" in damaged_run(whole.replace("  name: lora\n", ""), driver, write)
    assert "'many'" in damaged_run(whole.replace("max_steps: null", "max_steps: many"), driver, write)
    assert "max_stepss" in damaged_run(whole.replace("max_steps: null", "max_stepss: null"), driver, write)


def test_words_in_one_text_are_no_words():
    with pytest.raises(ConfigError, match=r"(?s)is one text, and a list of words.*\['stage=sft', 'model=tiny'\]"):
        ftrun.run("stage=sft model=tiny")


def test_a_long_cell_is_no_mistake(driver, write):
    write("a.csv", f"prompt,completion\nHello?,{'long ' * 40_000}\n")
    done = driver("check", "model=tiny", "data.path=a.csv")
    assert done.code == 0, done.err


def test_a_model_that_a_wheel_holds_may_be_taken_from_it(driver):
    done = driver("check", "model.source=wheel")
    assert done.code == 0, done.err
