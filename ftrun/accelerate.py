"""What a file of ``accelerate config`` says, in ftrun's own keys.

Each key of the file is taken over, or is of no consequence here, or is a problem: none is dropped without a word. What
is typed and what the file says must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftrun.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from ftrun.hardware import Hardware
    from ftrun.train import Train

KEY = "hardware.accelerate_config"

_NO_CONSEQUENCE = {
    "compute_environment", "debug", "enable_cpu_affinity", "main_training_function", "rdzv_backend", "same_network",
    "machine_rank", "main_process_ip", "main_process_port", "downcast_bf16",
}  # fmt: skip
"""Keys for accelerate's own launcher: ``ftrun`` starts processes itself, and each machine is told its place."""

_EMPTY: tuple[Any, ...] = (None, False, "", "no", "NO", [], {})
"""What a key is set to that asks for nothing."""


@dataclass
class _Wish:
    """A value that the file gives to one of our keys."""

    key: str
    value: Any
    said: str
    """What the file says, as it stands there."""


def take_over(hardware: Hardware, train: Train) -> Iterator[Problem]:
    """Set, in place, what the file says, and yield what it says that cannot be."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    assert hardware.accelerate_config is not None
    path = Path(hardware.accelerate_config).expanduser()
    try:
        said = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        yield Problem(
            KEY, f"{path} cannot be read: {error.strerror or error}", "the file that `accelerate config` made"
        )
        return
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        yield Problem(KEY, f"{path} is no YAML: {str(error).splitlines()[0]}", "the file that `accelerate config` made")
        return
    if not isinstance(said, dict):
        yield Problem(KEY, f"{path} is not KEY: VALUE", "the file that `accelerate config` made")
        return
    read = _File({str(name): value for name, value in said.items()})
    wishes = list(read.wishes())
    yield from read.problems
    for wish in wishes:
        yield from _grant(wish, hardware, train)


def _grant(wish: _Wish, hardware: Hardware, train: Train) -> Iterator[Problem]:
    """Set a key, unless it is set to something else already."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ValidationError

    group, _, name = wish.key.partition(".")
    node: Any = hardware if group == "hardware" else train
    default, now = getattr(type(node)(), name), getattr(node, name)
    schema = OmegaConf.structured(type(node))
    try:
        schema[name] = wish.value
    except ValidationError:
        yield Problem(KEY, f"it says {wish.said}, which is no value of {wish.key}", "another, or leave it out")
        return
    if now not in (default, schema[name]):
        message = f"it says {wish.said}, and {wish.key}={_typed(now)} is typed"
        yield Problem(KEY, message, f"{wish.key}={_typed(wish.value)}, or another {wish.said.partition(':')[0]} in it")
        return
    setattr(node, name, schema[name])


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class _File:
    """One file, read key by key."""

    def __init__(self, said: dict[str, Any]) -> None:
        self.said = said
        self.problems: list[Problem] = []

    def wishes(self) -> Iterator[_Wish]:
        """Yield what it asks for; what cannot be is in `problems` afterwards."""
        for key, value in self.said.items():
            if key in _NO_CONSEQUENCE:
                continue
            if key in _TOP:
                yield from _TOP[key](self, key, value)
            elif value not in _EMPTY:
                self.refuse(key, value, f"ftrun has nothing for it{did_you_mean(key, [*_TOP])}")

    def refuse(self, key: str, value: Any, why: str, fix: str = "leave it out of the file") -> None:
        """Note a problem with a key."""
        self.problems.append(Problem(KEY, f"it says {key}: {_typed(value)}, and {why}", fix))

    def _one_of(self, ours: str, known: Mapping[str, Any], key: str, value: Any, why: str) -> Iterator[_Wish]:
        """Yield what one of several words stands for."""
        if str(value) in known:
            yield _Wish(ours, known[str(value)], f"{key}: {value}")
        else:
            self.refuse(key, value, why, f"one of {', '.join(known)}")

    def _processes(self, key: str, value: Any) -> Iterator[_Wish]:
        """Processes of all machines, where ours are those of each."""
        nodes = self.said.get("num_machines") or 1
        if not isinstance(value, int) or not isinstance(nodes, int) or value < 1 or value % nodes:
            self.refuse(key, value, f"that many cannot be shared out among {nodes} machines evenly", "a multiple")
            return
        yield _Wish("hardware.num_processes", value // nodes, f"{key}: {value}")

    def _machines(self, key: str, value: Any) -> Iterator[_Wish]:
        yield _Wish("hardware.num_nodes", value, f"{key}: {value}")

    def _precision(self, key: str, value: Any) -> Iterator[_Wish]:
        from ftrun.train import Precision

        known = {"no": Precision.fp32, "False": Precision.fp32, "bf16": Precision.bf16, "fp16": Precision.fp16}
        yield from self._one_of("train.precision", known, key, value, "train.precision has no such type")

    def _device(self, key: str, value: Any) -> Iterator[_Wish]:
        from ftrun.hardware import Device

        if value is True:
            yield _Wish("hardware.device", Device.cpu, f"{key}: true")

    def _kind(self, key: str, value: Any) -> Iterator[_Wish]:
        """What is distributed how; of FSDP and DeepSpeed, their own parts of the file say more."""
        from ftrun.hardware import Device

        devices = {"MULTI_CPU": Device.cpu, "MULTI_NPU": Device.npu, "MULTI_XPU": Device.xpu}
        parts = {"FSDP": "fsdp_config", "DEEPSPEED": "deepspeed_config"}
        if value in devices:
            yield _Wish("hardware.device", devices[value], f"{key}: {value}")
        elif value in parts and not self.said.get(parts[value]):
            self.refuse(key, value, f"there is no {parts[value]} in it", f"a {parts[value]}")
        elif value not in parts and value not in ("NO", "no", False, "MULTI_GPU"):
            self.refuse(key, value, "ftrun does not distribute in this way", "NO, MULTI_GPU, FSDP or DEEPSPEED")
        for kind, part in parts.items():
            if value != kind and self.said.get(part):
                self.refuse(part, "...", f"distributed_type is {value}", f"distributed_type: {kind}, or without {part}")

    def _fsdp(self, key: str, value: Any) -> Iterator[_Wish]:
        from ftrun.hardware import Sharding

        if not isinstance(value, dict):
            yield from self._part(key, value, _FSDP, ())
        elif value:
            yield _Wish("hardware.sharding", Sharding.fsdp2, key)
            if str(value.get("fsdp_version", 1)) != "2":
                why = "ftrun has FSDP2 only, whose files `accelerate to-fsdp2` makes of those for FSDP1"
                self.refuse("fsdp_version", value.get("fsdp_version", 1), why, "fsdp_version: 2")
            yield from self._part(key, value, _FSDP, ("fsdp_version",))

    def _wrap(self, key: str, value: Any) -> Iterator[_Wish]:
        from ftrun.hardware import Wrap

        known = {"TRANSFORMER_BASED_WRAP": Wrap.layer, "SIZE_BASED_WRAP": Wrap.size}
        yield from self._one_of("hardware.wrap", known, key, value, "the whole model would be gathered at once")

    def _fewest(self, key: str, value: Any) -> Iterator[_Wish]:
        yield _Wish("hardware.wrap_min_parameters", value, f"{key}: {value}")

    def _reshards(self, key: str, value: Any) -> Iterator[_Wish]:
        if isinstance(value, bool):
            yield _Wish("hardware.reshard_after_forward", value, f"{key}: {_typed(value)}")
        else:
            self.refuse(key, value, "with FSDP2 it is true or false", f"{key}: true")

    def _offloads_weights(self, key: str, value: Any) -> Iterator[_Wish]:
        from ftrun.hardware import Offload

        if value not in _EMPTY:
            yield _Wish("hardware.offload_weights", Offload.cpu, f"{key}: {_typed(value)}")

    def _state_dict(self, key: str, value: Any) -> Iterator[_Wish]:
        from ftrun.hardware import CheckpointForm

        known = {"FULL_STATE_DICT": CheckpointForm.whole, "SHARDED_STATE_DICT": CheckpointForm.sharded}
        yield from self._one_of("hardware.checkpoint", known, key, value, "there are no such checkpoints here")

    def _checkpointing(self, key: str, value: Any) -> Iterator[_Wish]:
        if value not in _EMPTY:
            yield _Wish("train.gradient_checkpointing", True, f"{key}: {_typed(value)}")

    def _nothing(self, key: str, value: Any) -> Iterator[_Wish]:
        """Of no consequence: weights are loaded by every process, and FSDP2 always keeps the model's own."""
        yield from ()

    def _deepspeed(self, key: str, value: Any) -> Iterator[_Wish]:
        yield from self._part(key, value, _DEEPSPEED, ())

    def _stage(self, key: str, value: Any) -> Iterator[_Wish]:
        from ftrun.hardware import Sharding

        known = {str(stage): Sharding(f"zero{stage}") for stage in (1, 2, 3)}
        yield from self._one_of("hardware.sharding", known, key, value, "ZeRO has the stages 1, 2 and 3")

    def _offload(self, key: str, value: Any) -> Iterator[_Wish]:
        from ftrun.hardware import Offload

        ours = {"offload_optimizer_device": "offload_optimizer", "offload_param_device": "offload_weights"}[key]
        known = {each.value: each for each in Offload}
        yield from self._one_of(f"hardware.{ours}", known, key, value, "that is no place to offload to")

    def _nvme(self, key: str, value: Any) -> Iterator[_Wish]:
        if value not in (*_EMPTY, "none"):
            yield _Wish("hardware.nvme_path", value, f"{key}: {value}")

    def _accumulation(self, key: str, value: Any) -> Iterator[_Wish]:
        if value != "auto":
            yield _Wish("train.grad_accumulation", value, f"{key}: {value}")

    def _clipping(self, key: str, value: Any) -> Iterator[_Wish]:
        if value != "auto":
            yield _Wish("train.max_grad_norm", value, f"{key}: {value}")

    def _part(self, name: str, part: Any, readers: dict[str, _Reader], known: tuple[str, ...]) -> Iterator[_Wish]:
        if not isinstance(part, dict):
            if part not in _EMPTY:
                self.refuse(name, part, "it is keys with values")
            return
        for key, value in part.items():
            if key in readers:
                yield from readers[key](self, key, value)
            elif key not in known and value not in _EMPTY:
                self.refuse(key, value, f"ftrun has nothing for it{did_you_mean(key, [*readers])}")


_Reader = Callable[[_File, str, Any], Iterator[_Wish]]

_TOP: dict[str, _Reader] = {
    "distributed_type": _File._kind,
    "num_processes": _File._processes,
    "num_machines": _File._machines,
    "mixed_precision": _File._precision,
    "use_cpu": _File._device,
    "fsdp_config": _File._fsdp,
    "deepspeed_config": _File._deepspeed,
}

_FSDP: dict[str, _Reader] = {
    "fsdp_auto_wrap_policy": _File._wrap,
    "fsdp_min_num_params": _File._fewest,
    "fsdp_reshard_after_forward": _File._reshards,
    "fsdp_offload_params": _File._offloads_weights,
    "fsdp_state_dict_type": _File._state_dict,
    "fsdp_activation_checkpointing": _File._checkpointing,
    "fsdp_cpu_ram_efficient_loading": _File._nothing,
    "fsdp_use_orig_params": _File._nothing,
    "fsdp_sync_module_states": _File._nothing,
}

_DEEPSPEED: dict[str, _Reader] = {
    "zero_stage": _File._stage,
    "gradient_accumulation_steps": _File._accumulation,
    "gradient_clipping": _File._clipping,
    "offload_optimizer_device": _File._offload,
    "offload_param_device": _File._offload,
    "offload_optimizer_nvme_path": _File._nvme,
    "offload_param_nvme_path": _File._nvme,
    "zero3_init_flag": _File._nothing,
    "zero3_save_16bit_model": _File._nothing,
}
