"""Who imports what: the driver nothing heavy, the worker no Hydra, a listing no plugin, a run its chosen ones only."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ftrun import forkserver, options

HEAVY = {
    "torch", "transformers", "peft", "trl", "datasets", "pandas", "numpy", "accelerate", "pyarrow", "plotly",
    "optuna", "ray",
}  # fmt: skip

_DRIVER = """\
import json, sys
from ftrun import cli
code = cli.main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump(sorted(sys.modules), file)
sys.exit(code)
"""


@pytest.fixture
def imported(tmp_path):
    """Do ``ftrun WORDS`` in a fresh interpreter, and return the modules that it holds at the end."""

    def after(*words: str, code: int = 0, **env: str) -> set[str]:
        file = tmp_path / "modules.json"
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, str(file), *words],
            cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return set(json.loads(file.read_text()))

    return after


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def plugins(modules: set[str]) -> set[str]:
    """Return ``group.name`` of each plugin module."""
    return {
        name.removeprefix("ftrun_plugins.") for name in modules if name.count(".") == 2 and name.startswith("ftrun_p")
    }


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("list", 0),
        ("list optimizer", 0),
        ("list optimizer=adamw", 0),
        ("list train=default", 0),
        ("list experiment=identity", 0),
        ("show", 0),
        ("show stage=dpo model=qwen2 adapter=lora", 0),
        ("stage=dpo --help", 0),
        ("check --quick model=tiny", 0),
        ("check seed=many", 2),
        ("check data.path=nothing.jsonl", 2),
        ("preview --rows 0", 2),
        ("preview data.path=nothing.jsonl", 2),
        ("cache", 0),
        ("model.path=nobody/nothing", 2),
        ("runs", 0),
        ("env", 0),
        ("resume nothing", 2),
        ("compare nothing", 2),
        ("diff nothing nothing", 2),
        ("cancel nothing", 2),
        ("check --quick -m model=tiny seed=1,2", 0),
        ("check --quick -m model=tiny hardware=cpu seed=1,2 hydra/launcher=slurm", 0),
        ("completion bash", 0),
        ("__complete train.scheduler=", 0),
    ],
)
def test_the_driver_imports_nothing_heavy(words, code, imported):
    assert not HEAVY & packages(imported(*words.split(), code=code))


def test_the_driver_of_a_whole_run_imports_nothing_heavy(imported, server, tmp_path):
    modules = imported("model=tiny", "debug=smoke", "output_dir=run", **{forkserver.VARIABLE: server})
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "completed"
    assert not HEAVY & packages(modules)
    assert "ftrun.launch" in modules
    assert not {name for name in modules if name.startswith("ftrun.worker")}


@pytest.mark.parametrize(
    "words", ["--help", "--version", "list", "list optimizer", "list model", "list --json", "completion bash"]
)
def test_help_and_listings_import_neither_hydra_nor_a_plugin(words, imported):
    modules = imported(*words.split())
    assert not {"hydra", "omegaconf", "antlr4", "yaml"} & packages(modules)
    assert not plugins(modules)


def test_completion_of_options_imports_neither_hydra_nor_a_plugin(imported):
    modules = imported("__complete", "stage=")
    assert "hydra" not in packages(modules)
    assert not plugins(modules)


def test_only_the_chosen_plugins_are_imported(imported):
    chosen = {"stage.sft", "quant.none", "optimizer.adamw", "optimizer._ruled", "tracker.none"}
    assert plugins(imported("show", "optimizer=adamw", "adapter=full")) == chosen | {"adapter.full"}
    assert plugins(imported("show", "adapter=lora", "tracker=[tensorboard]")) == (
        chosen - {"tracker.none"} | {"adapter.lora", "tracker.tensorboard"}
    )


def test_a_wrong_option_imports_only_what_is_chosen_beside_it(imported):
    modules = imported("show", "optimizer=adammw", "adapter=full", code=2)
    beside = {"stage.sft", "quant.none", "tracker.none", "adapter.full"}
    assert plugins(modules) <= beside | {"optimizer.adamw", "optimizer._ruled"}


def test_a_plugin_that_cannot_be_imported_harms_only_who_chooses_it(imported, tmp_path, write):
    """An installed package that holds a broken plugin must not break the others."""
    write("elsewhere/ftrun_plugins/optimizer/broken.py", "import nothing_there\n")
    path = {"PYTHONPATH": str(tmp_path / "elsewhere")}
    imported("show", "optimizer=adamw", **path)
    imported("list", "optimizer", **path)
    imported("--help", **path)
    imported("show", "optimizer=broken", code=2, **path)


def test_a_frozen_run_is_read_without_hydra_and_without_torch(driver, write, tmp_path):
    """What a worker does first, before it imports anything heavy."""
    write("run.yaml", driver("show", "stage=dpo", "adapter=lora", "tracker=tensorboard").sees(0).out)
    script = (
        "import json, sys; from pathlib import Path; import ftrun.worker.main; from ftrun.config import Config\n"
        "cfg = Config.load(Path('run.yaml')); assert cfg.stage.name == 'dpo'; print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout))
    assert not {"hydra", *HEAVY} & packages(modules)
    assert "ftrun.compose" not in modules
    chosen = {"stage.dpo", "adapter.lora", "quant.none", "optimizer.adamw", "optimizer._ruled", "tracker.tensorboard"}
    assert plugins(modules) == chosen | {"stage._pairs"}


SPY = '''\
"""AdamW, and a note of what the worker has imported by the time it is built."""

import json
import sys
from dataclasses import dataclass

from ftrun.plugin import get, register


@register
@dataclass(kw_only=True)
class Spy(get("optimizer", "adamw")):
    """AdamW that looks around."""

    name: str = "spy"

    def build(self, model, run):
        (run.folder / "modules.json").write_text(json.dumps(sorted(sys.modules)))
        return super().build(model, run)
'''


def test_the_worker_never_imports_hydra(ftrun, write):
    write("spy.py", SPY)
    done = ftrun("model=tiny", "debug=smoke", "plugins=[spy.py]", "optimizer=spy").sees(0)
    modules = set(json.loads((done.folder / "modules.json").read_text()))
    assert {"torch", "transformers", "ftrun.worker.training", "ftrun.worker.causal", "ftrun.config"} <= modules
    assert not {name for name in modules if name.partition(".")[0] in ("hydra", "hydra_plugins")}
    assert not {"ftrun.compose", "ftrun.words", "ftrun.diagnose", "ftrun.cli", "ftrun.launch"} & modules


def test_the_plugins_of_this_repository_are_those_that_are_listed():
    """`plugins()` above tells a plugin by its module's name, so each must be found that way."""
    assert "adamw" in options.names("optimizer")
    assert plugins({"ftrun_plugins.optimizer.adamw", "ftrun_plugins.optimizer", "ftrun.plugin"}) == {"optimizer.adamw"}
