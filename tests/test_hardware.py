"""Accelerators are found by what their drivers leave on a machine, without torch."""

from __future__ import annotations

import os

import pytest

from ftrun import config, hardware
from ftrun.errors import ConfigError
from ftrun.hardware import CheckpointForm, Device, Hardware, Offload, Sharding, Wrap
from ftrun.train import Precision, Train


@pytest.fixture
def nvidia(tmp_path, monkeypatch):
    """A machine with GPUs, as far as ``nvidia-smi`` goes."""

    def with_gpus(*lines):
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return with_gpus


def settled(**keys):
    chosen, train = Hardware(**keys), Train()
    hardware.settle(chosen, train)
    return chosen, train


def test_every_gpu_gets_a_process_and_bf16_where_it_can(nvidia):
    nvidia("NVIDIA H100, 9.0", "NVIDIA H100, 9.0")
    chosen, train = settled()
    assert (chosen.device, chosen.num_processes, train.precision) == (Device.cuda, 2, Precision.bf16)


def test_an_older_gpu_gets_fp16(nvidia):
    nvidia("Tesla V100, 7.0")
    assert settled()[1].precision is Precision.fp16


def test_only_visible_gpus_count(nvidia, monkeypatch):
    nvidia("A, 8.0", "B, 8.0", "C, 8.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert settled()[0].num_processes == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert settled()[0].device is Device.cpu


def test_what_is_asked_for_is_taken(nvidia):
    nvidia("A, 8.0", "B, 8.0")
    assert settled(device=Device.cpu)[0].device is Device.cpu
    assert settled(num_processes=1)[0].num_processes == 1
    assert settled(device=Device.npu)[0].device is Device.npu  # the worker refuses it if torch has none


def test_a_machine_without_accelerators_computes_in_fp32():
    chosen, train = settled()
    assert (chosen.device, chosen.num_processes, train.precision) == (Device.cpu, 1, Precision.fp32)
    assert chosen.num_threads == 1  # as OMP_NUM_THREADS says in these tests


def test_threads_are_shared_by_the_processes(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    usable = len(os.sched_getaffinity(0))
    assert hardware.default_threads(1) == usable
    assert hardware.default_threads(usable * 2) == 1


def test_a_device_that_torch_does_not_see_is_refused(ftrun, nvidia):
    nvidia("NVIDIA H100, 9.0")
    done = ftrun("model=tiny", "debug=smoke", PATH=os.environ["PATH"]).sees(2)
    assert "does not see a cuda device" in done.err
    assert "hardware=cpu" in done.err


def problems(*words):
    cfg, found = config.examine(["model=tiny", *words])
    return [*found, *(problem for problem in cfg.hardware.check_with(cfg) if problem not in found)]


def test_a_run_gets_the_cpus_that_are_asked_for(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert settled(cpus=64)[0].num_threads == 64
    assert settled(cpus=64, num_processes=8)[0].num_threads == 8


def test_the_world_is_all_processes_of_all_machines():
    assert Hardware(num_nodes=3, num_processes=4).world_size == 12
    assert not Hardware(num_processes=1).in_a_group


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        (["hardware.wrap=size"], "hardware.wrap", "hardware.sharding=none does not read it"),
        (["hardware.checkpoint=sharded"], "hardware.checkpoint", "hardware.sharding=none does not read it"),
        (["hardware.offload_weights=cpu"], "hardware.offload_weights", "hardware.sharding=none does not read it"),
        (["hardware=fsdp2", "hardware.offload_optimizer=cpu"], "hardware.offload_optimizer", "fsdp2 does not read it"),
        (["hardware=fsdp2", "hardware.wrap_min_parameters=5"], "hardware.wrap_min_parameters", "wrap=layer does not"),
        (
            ["hardware=fsdp2", "hardware.offload_weights=nvme", "hardware.nvme_path=/d"],
            "hardware.offload_weights",
            "and no further",
        ),
        (
            ["hardware=zero2", "hardware.offload_optimizer=nvme", "hardware.nvme_path=/d"],
            "hardware.offload_optimizer",
            "with zero3 only",
        ),
        (["hardware=zero3", "hardware.offload_weights=nvme"], "hardware.nvme_path", "needs a folder"),
        (["hardware=zero3"], "hardware.sharding", "needs the package deepspeed"),
        (["hardware=zero3", "hardware.device=cpu"], "hardware.sharding", "leaves DeepSpeed out on a CPU"),
        (["hardware=zero3", "train.on_bad_loss=skip"], "train.on_bad_loss", "within the backward pass"),
        (["hardware=fsdp2", "hardware.num_processes=1"], "hardware.num_processes", "nobody to share it with"),
        (["hardware=fsdp2_offload", "hardware.device=cpu"], "hardware.offload_weights", "already"),
        (["hardware=fsdp2", "adapter=full", "optimizer=adafactor"], "optimizer", "FSDP2 gives it shards"),
        (["hardware=zero2", "adapter=full", "optimizer=muon"], "optimizer", "ZeRO gives it pieces"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(words, key, says):
    assert [problem.key for problem in problems(*words) if says in problem.message] == [key]


@pytest.mark.parametrize("name", ["adamw", "galore", "muon", "adam_mini", "apollo"])
def test_optimizers_that_take_shards_are_let_through(name):
    assert not problems("hardware=fsdp2", "hardware.num_processes=2", "adapter=full", f"optimizer={name}")


def test_one_process_of_a_cpu_is_refused_once_it_is_known():
    with pytest.raises(ConfigError, match="nobody to share it with"):
        settled(sharding=Sharding.fsdp2, device=Device.cpu)


def test_a_worker_looks_at_the_options_again():
    cfg = config.compose(["model=tiny", "hardware.num_processes=2", "adapter=full", "optimizer=adafactor"])
    cfg.hardware.sharding = Sharding.fsdp2
    from ftrun.worker import training

    with pytest.raises(ConfigError, match="FSDP2 gives it shards"):
        training.prepare(cfg)


def test_what_deepspeed_is_told():
    from ftrun.worker import sharding

    cfg = config.compose(
        ["model=tiny", "train.micro_batch_size=2", "train.grad_accumulation=8", "train.precision=bf16"]
    )
    cfg.hardware = Hardware(
        sharding=Sharding.zero3, offload_weights=Offload.nvme, offload_optimizer=Offload.cpu, nvme_path="/disk"
    )
    told = sharding.deepspeed_config(cfg)
    zero = told["zero_optimization"]
    assert (zero["stage"], zero["stage3_gather_16bit_weights_on_model_save"]) == (3, True)
    assert zero["offload_param"] == {"device": "nvme", "nvme_path": "/disk"}
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert (told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"]) == (2, 8)
    assert (told["bf16"], told["fp16"], told["gradient_clipping"]) == ({"enabled": True}, {"enabled": False}, 1.0)
    cfg.hardware = Hardware(sharding=Sharding.zero1)
    assert sharding.deepspeed_config(cfg)["zero_optimization"].keys() == {
        "stage", "overlap_comm", "contiguous_gradients",
    }  # fmt: skip


FSDP_FILE = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: true
  fsdp_reshard_after_forward: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_activation_checkpointing: true
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 2
num_processes: 16
rdzv_backend: static
same_network: true
tpu_env: []
use_cpu: false
"""

ZERO_FILE = """
distributed_type: DEEPSPEED
deepspeed_config:
  gradient_accumulation_steps: 4
  gradient_clipping: 0.5
  offload_optimizer_device: cpu
  offload_param_device: none
  zero3_init_flag: true
  zero_stage: 2
mixed_precision: 'no'
num_machines: 1
num_processes: 4
"""


def accelerated(write, text, *words):
    return config.examine(["model=tiny", f"hardware.accelerate_config={write('accelerate.yaml', text)}", *words])


def test_a_file_of_accelerate_for_fsdp(write):
    cfg, found = accelerated(write, FSDP_FILE)
    ours = cfg.hardware
    assert not found
    assert (ours.sharding, ours.num_nodes, ours.num_processes) == (Sharding.fsdp2, 2, 8)
    assert (ours.wrap, ours.reshard_after_forward, ours.offload_weights) == (Wrap.layer, False, Offload.cpu)
    assert (ours.checkpoint, cfg.train.precision) == (CheckpointForm.sharded, Precision.bf16)
    assert cfg.train.gradient_checkpointing


def test_a_file_of_accelerate_for_deepspeed(write):
    cfg, found = accelerated(write, ZERO_FILE)
    assert [problem.key for problem in found] == ["hardware.sharding"]  # for want of the package
    assert (cfg.hardware.sharding, cfg.hardware.offload_optimizer) == (Sharding.zero2, Offload.cpu)
    assert cfg.hardware.offload_weights is Offload.none
    assert (cfg.hardware.num_processes, cfg.train.grad_accumulation, cfg.train.max_grad_norm) == (4, 4, 0.5)


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        (FSDP_FILE, ["hardware.num_processes=4"], "num_processes: 16, and hardware.num_processes=4 is typed"),
        (FSDP_FILE, ["train.precision=fp32"], "mixed_precision: bf16, and train.precision=fp32 is typed"),
        (FSDP_FILE.replace("version: 2", "version: 1"), [], "fsdp_version: 1, and ftrun has FSDP2 only"),
        (FSDP_FILE.replace("TRANSFORMER_BASED_WRAP", "NO_WRAP"), [], "the whole model would be gathered at once"),
        (FSDP_FILE.replace("num_processes: 16", "num_processes: 15"), [], "shared out among 2 machines evenly"),
        (FSDP_FILE.replace("debug", "fsdp_confg"), [], None),
        (FSDP_FILE + "fsdp_confg: {a: 1}\n", [], "did you mean fsdp_config"),
        (
            FSDP_FILE.replace("  fsdp_version: 2", "  fsdp_version: 2\n  fsdp_ignored_modules: head"),
            [],
            "nothing for it",
        ),
        (ZERO_FILE.replace("zero_stage: 2", "zero_stage: 0"), [], "ZeRO has the stages 1, 2 and 3"),
        (ZERO_FILE.replace("DEEPSPEED", "MULTI_GPU"), [], "deepspeed_config: ..., and distributed_type is MULTI_GPU"),
        ("distributed_type: MEGATRON_LM", [], "does not distribute in this way"),
        ("num_machines: many", [], "num_machines: many, which is no value of hardware.num_nodes"),
        ("distributed_type: FSDP\nfsdp_config: [1]", [], "it is keys with values"),
        ("[1]", [], "is not KEY: VALUE"),
        ("a: [", [], "is no YAML"),
    ],
)
def test_nothing_in_a_file_of_accelerate_is_dropped(write, text, words, says):
    _, found = accelerated(write, text, *words)
    of_file = [problem.message for problem in found if problem.key == "hardware.accelerate_config"]
    assert len(of_file) == (says is not None), of_file
    assert says is None or says in of_file[0]


def test_a_file_of_accelerate_that_is_not_there():
    _, found = config.examine(["model=tiny", "hardware.accelerate_config=nowhere.yaml"])
    assert [problem.message for problem in found] == ["nowhere.yaml cannot be read: No such file or directory"]
