"""The plugin protocol and the registry: one dataclass per option of a config group, or of a key (`KEYED`).

The fields of a plugin are the option's config, its methods do the work. A plugin's module is imported by the driver,
which must stay light: torch and friends are imported inside the methods.

An option ``<group>=<name>`` is

1. a class registered by a file named on the command line (``plugins=[my_file.py]``),
2. the module ``ftrun_plugins.<group>.<name>``, of this repository or of any installed package,
3. an entry point in the group ``ftrun.plugins`` whose name is ``<group>.<name>``,
4. or what a module registers that an entry point without a dot in its name leads to (``foo = "foo_pkg.plugins"``).
   Such a module says only by being imported what it holds, so it is imported last: for a listing, or for an option that
   is found nowhere else.

Two of one name are an error that names both.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.metadata import EntryPoint, PackageNotFoundError, version
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ftrun.errors import FtrunError, Problem
from ftrun.fields import MISSING, ranged

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer
    from transformers import PreTrainedModel, TrainerCallback

    from ftrun.completions import Completion
    from ftrun.config import Config
    from ftrun.record import Result
    from ftrun.worker.training import Run

NAMESPACE = "ftrun_plugins"
ENTRY_POINTS = "ftrun.plugins"
_FILES = "ftrun_files."


class PluginError(FtrunError):
    """A plugin cannot be imported, or does not keep the protocol."""

    exit_code = 2


@dataclass(kw_only=True)
class Plugin:
    """An option of a config group."""

    group: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    """Distributions this option needs beyond ftrun's own dependencies, as pip names them."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Keys outside the option's own group that it reads, as ``fnmatch`` patterns: ``("data.*", "train.epochs")``."""

    name: str = MISSING
    """The option's name, which is also its file's. Set by choosing the option, never typed."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield what this option cannot work with in ``cfg``. Runs before torch is imported."""
        yield from ()

    def check_files(self, cfg: Config) -> Iterator[Problem]:
        """Yield what is wrong with the files that the option's keys name, as far as this machine's disk can tell."""
        yield from ()

    def settle(self, cfg: Config) -> None:
        """Settle, in place, what the option's keys leave to where and when: absolute paths, commits on the hub.

        Raises:
            ConfigError: Something is nowhere to be found.
        """

    def callbacks(self, model: nn.Module, run: Run) -> Sequence[TrainerCallback]:
        """Return what must hook into the training loop, if anything.

        One with a method ``on_failure()`` is told so if training raises.
        """
        return ()


class ModelHead(Enum):
    """What a model computes of its last hidden states; the value is what peft calls such a model."""

    causal = "CAUSAL_LM"
    """Logits of the next token."""

    score = "SEQ_CLS"
    """One number: what a whole sequence is worth."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that train whole, whatever an adapter trains: hardly a model comes with them."""
        return ("score",) if self is ModelHead.score else ()


@dataclass(kw_only=True)
class Stage(Plugin):
    """What a run does: train with one objective."""

    group: ClassVar[str] = "stage"
    default_data: ClassVar[str] = ""
    """``data.path`` where the user names no data: a set that ships with ftrun (``demo:identity``)."""

    default_lr: ClassVar[float] = 5e-5
    """Peak learning rate for training every weight; adapters and optimizers scale it."""

    rows: ClassVar[str] = ""
    """The kind of rows the stage trains on, one of `ftrun.data.formats.KINDS`."""

    head: ClassVar[ModelHead] = ModelHead.causal
    """What the model that the stage trains computes; a model with another head is given this one, or refused."""

    default_reward: ClassVar[str] = ""
    """The reward where the user chooses none, of a stage that has replies judged; no other stage takes one."""

    depends_on_batches: ClassVar[str] = ""
    """Why the loss depends on how a step's rows are divided into micro batches, if it does."""

    takes_shards: ClassVar[bool] = True
    """Whether it trains a model of which each process holds shards (FSDP2, ZeRO 3)."""

    metrics: ClassVar[tuple[str, ...]] = ()
    """Names of the metrics a run ends with, any of which may be the ``objective``; the first is its default."""

    def outline(self, model: nn.Module) -> nn.Module:
        """Return a model without weights, on the meta device, with all that the stage adds to it before it trains."""
        return model

    def run(self, cfg: Config) -> Result:
        """Do it. Every process of the run calls this once."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Adapter(Plugin):
    """Which weights train, and which new ones are added."""

    group: ClassVar[str] = "adapter"
    lr_scale: ClassVar[float] = 1.0
    """How the default learning rate compares with training every weight."""

    trains_base_weights: ClassVar[bool] = False
    """Whether weights of the model itself train, rather than new ones beside them."""

    two_factors: ClassVar[bool] = False
    """Whether the new weights are pairs of factors A and B, named ``lora_A`` and ``lora_B``, of which B starts at 0."""

    @property
    def off_is_start(self) -> bool:
        """Whether the model with the adapter switched off (peft's ``disable_adapter``) is what the run starts from."""
        return False

    def apply(self, model: nn.Module, run: Run) -> nn.Module:
        """Return ``model`` with exactly the weights that train set to ``requires_grad``."""
        raise NotImplementedError

    def outline(self, model: nn.Module, run: Run) -> nn.Module:
        """Do what `apply` does to a model without weights, on the meta device, of a run whose rows are not read."""
        return self.apply(model, run)

    def save(self, model: PreTrainedModel, folder: Path, run: Run) -> None:
        """Write what the run ended with, so that it can be loaded on the model that the run started from."""
        model.save_pretrained(folder)


@dataclass(kw_only=True)
class Quant(Plugin):
    """How the frozen base weights are stored."""

    group: ClassVar[str] = "quant"

    def load_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that ``from_pretrained`` takes for it."""
        raise NotImplementedError


@dataclass(kw_only=True)
class WeightGroup:
    """Weights with a rate or a decay of their own."""

    weights: str = MISSING
    """A regular expression that is found in their names: ``embed_tokens``, ``layers\\.[01]\\.``, ``lora_B``."""

    lr: float | None = ranged(None, gt=0)
    """Their peak learning rate. Default: as without the group."""

    lr_scale: float = ranged(1.0, gt=0)
    """What their rate is multiplied by."""

    weight_decay: float | None = ranged(None, ge=0)
    """Their weight decay, of norms and biases among them too. Default: as without the group."""


@dataclass(kw_only=True)
class Optimizer(Plugin):
    """How a gradient becomes a step."""

    group: ClassVar[str] = "optimizer"
    lr_scale: ClassVar[float] = 1.0
    """How the default learning rate compares with AdamW's."""

    elementwise: ClassVar[bool] = False
    """Whether each element of a weight is updated by its own gradient alone, so that ZeRO's flat shards can be."""

    takes_shards: ClassVar[bool] = False
    """Whether it updates weights of which each process holds a shard (FSDP2) as it updates whole ones."""

    skips_weights: ClassVar[bool] = False
    """Whether some of the weights that train have no gradient in some steps."""

    lr: float | None = ranged(None, gt=0)
    """Peak learning rate. Default: what suits the stage and the adapter (``ftrun show`` prints it)."""

    weight_decay: float = ranged(0.0, ge=0)
    """Decoupled weight decay, of matrices only: norms and biases never decay."""

    embedding_lr: float | None = ranged(None, gt=0)
    """Peak learning rate of embeddings, and of a head that shares their weights. Default: ``optimizer.lr``."""

    groups: list[WeightGroup] = field(default_factory=list)
    """Weights with a rate or decay of their own: ``[{weights: layers.0, lr_scale: 0.1}]``. The first fit counts."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield the groups that cannot be."""
        for number, group in enumerate(self.groups):
            key = f"optimizer.groups.{number}"
            if group.weights in ("", MISSING):
                yield Problem(f"{key}.weights", "has no value", "weights: a part of the weights' names")
                continue
            try:
                re.compile(group.weights)
            except re.error as error:
                yield Problem(f"{key}.weights", f"is no regular expression: {error}", "weights: lora_B, for example")
            if group == WeightGroup(weights=group.weights):
                yield Problem(key, "sets nothing for its weights", "lr, lr_scale or weight_decay in it")

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Return an optimizer over the weights of ``model`` that train."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Tracker(Plugin):
    """Who else is told the metrics, besides the run's own metrics.jsonl."""

    group: ClassVar[str] = "tracker"


@dataclass(kw_only=True)
class Reward(Plugin):
    """What a reply is worth."""

    group: ClassVar[str] = "reward"

    weight: float = ranged(1.0)
    """How much it counts in the sum of all rewards; below 0 it is a penalty."""

    def prepare(self, run: Run, model: nn.Module) -> None:
        """Load what it needs. Called once in each process, before the first reply; ``model`` is the policy."""

    def score(self, completions: Sequence[Completion]) -> Sequence[float | None]:
        """Return one value a reply, before ``weight``; None where it has nothing to say of it."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Format(Plugin):
    """How rows of a layout that ftrun does not know are read: ``data.format=<name>``. It has no keys of its own."""

    group: ClassVar[str] = "format"

    def convert(self, row: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """Return a row, or several, in one of the layouts that ftrun knows. What it raises makes the row a bad one.

        Args:
            row: The row's columns, renamed as ``data.columns`` says.
        """
        raise NotImplementedError


def is_installed(distribution: str) -> bool:
    """Tell whether a distribution, as pip names it, is installed here."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


GROUPS: dict[str, type[Plugin]] = {base.group: base for base in (Stage, Adapter, Quant, Optimizer, Tracker, Reward)}
"""The config groups whose options are plugins."""

SEVERAL = (Tracker.group, Reward.group)
"""Those of which a run may have several options, so that the keys of each carry its name: ``tracker.wandb.mode``."""

KEYED: dict[str, tuple[type[Plugin], str]] = {Format.group: (Format, "data.format")}
"""The other plugins, which no config group holds: they are chosen by the key named here."""

VERBS = {
    "stage": "run",
    "adapter": "apply",
    "quant": "load_arguments",
    "optimizer": "build",
    "tracker": "callbacks",
    "reward": "score",
}
"""The method by which a plugin of each group does its work."""

_registered: dict[tuple[str, str], type[Plugin]] = {}

P = TypeVar("P", bound=type[Plugin])


def register(cls: P) -> P:
    """Make ``cls`` selectable as ``<group>=<name>``, with its fields as the option's config.

    Raises:
        PluginError: It is no dataclass of a group, a field has no default, it has no name, or the name is taken.
    """
    where = f"{cls.__module__}.{cls.__qualname__}"
    bases = (*GROUPS.values(), *(base for base, _ in KEYED.values()))
    if not issubclass(cls, bases):
        raise PluginError(f"{where} is no plugin: derive it from one of {', '.join(b.__name__ for b in bases)}")
    if not is_dataclass(cls) or "__dataclass_fields__" not in vars(cls):
        raise PluginError(f"{where} is no dataclass: write @dataclass(kw_only=True) below @register")
    for key in cls.__dataclass_fields__.values():
        if key.default is NO_DEFAULT and key.default_factory is NO_DEFAULT:
            why = "for a value that has to be typed, write `= MISSING` (from ftrun.fields)"
            raise PluginError(f"{where}: the field {key.name} has no default; {why}")
    if cls.group in KEYED and (keys := {key.name for key in fields(cls)} - {"name"}):
        why = f"{_typed(cls.group)}= chooses it by its name, and nothing could set a key of it"
        raise PluginError(f"{where} has the field {min(keys)}: {why}; make it a ClassVar")
    name = str(cls.__dataclass_fields__["name"].default)
    if name == MISSING:
        raise PluginError(f'{where} has no name: give it the field `name: str = "{cls.__module__.split(".")[-1]}"`')
    if cls.__module__.startswith(_FILES) and (places := _places(cls.group, name)):
        what = f"{_typed(cls.group)}={name}"
        raise PluginError(f"{what} is defined twice, here and in {places[0]}: give yours another name")
    taken = _registered.get((cls.group, name))
    both_named = taken and all(c.__module__.startswith(_FILES) for c in (taken, cls))  # the newer file wins
    if taken and taken.__module__ != cls.__module__ and not both_named:
        what = f"{_typed(cls.group)}={name}"
        raise PluginError(f"{what} is defined twice, in {taken.__module__} and in {cls.__module__}")
    _registered[cls.group, name] = cls
    return cls


def place(group: str, name: str) -> str:
    """Return where an option's keys stand in the tree: ``optimizer``, or ``tracker.wandb``."""
    return f"{group}.{name}" if group in SEVERAL else group


def _typed(group: str) -> str:
    """Return the key that an option of a group is chosen by."""
    return KEYED[group][1] if group in KEYED else group


def get(group: str, name: str) -> type[Plugin]:
    """Return the class behind ``<group>=<name>``, importing its module.

    Raises:
        LookupError: There is no such option.
        PluginError: There is, but its module fails to import or registers something else.
    """
    if (group, name) not in _registered and (places := _places(group, name)):
        _import_one(group, name, places)
    elif (group, name) not in _registered:
        _import_undotted()
    if (group, name) not in _registered:
        raise LookupError(f"{group}={name}")
    return _registered[group, name]


def exists(group: str, name: str) -> bool:
    """Tell whether a group has an option of that name, without importing it."""
    if (group, name) not in _registered and not _places(group, name):
        _import_undotted()
    return (group, name) in _registered or bool(_places(group, name))


def registered(group: str, name: str) -> type[Plugin] | None:
    """Return the class behind ``<group>=<name>`` if it has been imported."""
    return _registered.get((group, name))


def names(group: str) -> list[str]:
    """Return the names of a group's options, sorted, importing none whose name can be told without."""
    _import_undotted()
    found = {module.name for module in pkgutil.iter_modules(_folders(group)) if not module.name.startswith("_")}
    found |= {point.name.removeprefix(f"{group}.") for point in _entry_points() if point.name.startswith(f"{group}.")}
    found |= {name for of_group, name in _registered if of_group == group}
    return sorted(found)


def source(group: str, name: str) -> Path | None:
    """Return the file that an option is written in, without importing it."""
    if cls := registered(group, name):
        origin = getattr(sys.modules.get(cls.__module__), "__file__", None)
        return Path(origin) if origin else None
    return next((place.file for place in _places(group, name)), None)


def forget_files() -> None:
    """Forget what plugin files have registered: each command names its own."""
    for option in [option for option, cls in _registered.items() if cls.__module__.startswith(_FILES)]:
        del _registered[option]


class _Uncached(SourceFileLoader):
    """Compiles a file as it stands: the cache goes by second and size, and leaves a folder beside the user's files."""

    def get_code(self, fullname: str) -> CodeType:
        """Return the module's code."""
        return self.source_to_code(self.get_data(self.path), self.path)


def load_file(path: Path) -> None:
    """Import a plugin file named on the command line.

    Raises:
        PluginError: It fails to import, or registers nothing.
    """
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise PluginError(f"{path} cannot be read: {error.strerror}") from None
    module_name = f"{_FILES}{path.stem}_{digest}"  # another file of the same name is another module
    spec = importlib.util.spec_from_file_location(module_name, path, loader=_Uncached(module_name, str(path)))
    if spec is None or spec.loader is None or path.suffix != ".py":
        raise PluginError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    before = dict(_registered)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise _import_failed(str(path), error) from error
    if _registered == before:
        raise PluginError(f"{path} registers nothing: put @register above a plugin class")


@dataclass(frozen=True)
class _Place:
    """Where an option is written, as far as that can be told without importing it."""

    module: str
    file: Path | None

    def __str__(self) -> str:
        return str(self.file or self.module)


def _places(group: str, name: str) -> list[_Place]:
    """Return where ``<group>=<name>`` is written, over all installed packages; more than one is one too many."""
    if name.startswith("_") or Path(name).name != name:
        return []
    written_as = (f"{name}.py", f"{name}/__init__.py")
    files = [file for folder in _folders(group) for form in written_as if (file := Path(folder, form)).is_file()]
    # A checkout and an installed wheel of the same ftrun may both be on the path.
    different = {file.read_bytes(): file for file in reversed(files)}
    found = [_Place(f"{NAMESPACE}.{group}.{name}", file) for file in reversed(different.values())]
    modules = {point.module for point in _entry_points() if point.name == f"{group}.{name}"}
    return found + [_Place(module, _file_of(module)) for module in sorted(modules)]


def _file_of(module: str) -> Path | None:
    """Return the file of a module; unlike `importlib.util.find_spec`, without importing the packages it lies in."""
    name, *inner = module.split(".")
    spec = importlib.util.find_spec(name)
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    return Path(spec.origin) if spec and spec.origin else None


def _import_one(group: str, name: str, places: Sequence[_Place]) -> None:
    what = f"{_typed(group)}={name}"
    if len(places) > 1:
        raise PluginError(f"{what} is defined {len(places)} times, in {' and in '.join(map(str, places))}")
    (place,) = places
    before = set(_registered)
    try:
        importlib.import_module(place.module)
    except PluginError as error:
        raise PluginError(f"the plugin {what} is not one: {error}") from error
    except (Exception, SystemExit) as error:
        raise _import_failed(f"{what} ({place.module})", error) from error
    if (group, name) not in _registered:
        others = ", ".join(f"{g}={n}" for g, n in sorted(set(_registered) - before)) or "nothing"
        raise PluginError(f"{what}: {place} should register it, and registers {others}: the two names must be the same")


@functools.cache
def _import_undotted() -> None:
    """Import the modules of entry points that do not say what they hold."""
    for point in _entry_points():
        if "." in point.name:
            continue
        before = set(_registered)
        try:
            point.load()
        except (Exception, SystemExit) as error:
            failed = error if isinstance(error, PluginError) else _import_failed(f"{point.name} ({point.value})", error)
            warnings.warn(str(failed), stacklevel=2)
        for group, name in set(_registered) - before:
            if places := _places(group, name):
                warnings.warn(f"{group}={name} is defined in {places[0]}, so not from {point.value}", stacklevel=2)
                del _registered[group, name]


def _import_failed(what: str, error: BaseException) -> PluginError:
    """Name the plugin and its last line that took part in the failure."""
    trace = error.__traceback__
    where = ""
    while trace:
        if "importlib" not in trace.tb_frame.f_code.co_filename and trace.tb_frame.f_code.co_filename != __file__:
            where = f", {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        where = f", {error.filename}:{error.lineno}"
    return PluginError(f"the plugin {what} cannot be imported: {type(error).__name__}: {error}{where}")


def _folders(group: str) -> list[str]:
    """Return the folders, over all installed packages, that hold a group's plugin modules."""
    folders: list[str] = []
    for name in (NAMESPACE, f"{NAMESPACE}.{group}"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            return []
        if spec.origin:
            why = "hides the plugins of every other package, which share this namespace"
            raise PluginError(f"{spec.origin} {why}: delete it, or uninstall the package that it came with")
        folders = list(spec.submodule_search_locations or [])
    return folders


@functools.cache
def _entry_points() -> tuple[EntryPoint, ...]:
    from importlib.metadata import entry_points

    return tuple(entry_points(group=ENTRY_POINTS))
