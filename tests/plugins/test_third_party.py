"""Plugins from elsewhere: the three ways to ship one, what they may rely on, and what a bad one may not break."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from ftrun import config, forkserver, options, record
from ftrun.errors import ConfigError

SGD = '''
"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.fields import ranged
from ftrun.plugin import Optimizer, register

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class PlainSGD(Optimizer):
    """Gradient descent with momentum, as the NAME package has it."""

    lr_scale: ClassVar[float] = 100.0
    name: str = "NAME"

    momentum: float = ranged(0.0, ge=0, lt=1)
    """Decay of the running sum of gradients."""

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        from torch.optim import SGD

        from ftrun.worker.parameters import groups

        return SGD(groups(model, self), lr=self.lr, momentum=self.momentum)
'''.lstrip()


def sgd(name: str) -> str:
    return SGD.replace("NAME", name)


def write(folder: Path, files: dict[str, str]) -> Path:
    """Write files below a folder, and return it."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def project(name: str, packages: str, entry_points: dict[str, str] | None = None) -> str:
    """Return the pyproject.toml of a plugin's distribution."""
    lines = "\n".join(f'"{point}" = "{target}"' for point, target in (entry_points or {}).items())
    table = f'\n[project.entry-points."ftrun.plugins"]\n{lines}\n' if lines else ""
    return f"""
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0"
dependencies = ["ftrun"]
{table}
[tool.hatch.build.targets.wheel]
packages = ["{packages}"]
"""


def on_path(folder: Path, files: dict[str, str], entry_points: dict[str, str] | None = None) -> dict[str, str]:
    """Make what an installed distribution would leave, and return the environment in which it is found."""
    points = "".join(f"{name} = {target}\n" for name, target in (entry_points or {}).items())
    metadata = {
        f"{folder.name}-1.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {folder.name}\nVersion: 1\n",
        f"{folder.name}-1.dist-info/entry_points.txt": f"[ftrun.plugins]\n{points}",
    }
    return {"PYTHONPATH": str(write(folder, files | metadata))}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed two distributions."""
    source = tmp_path_factory.mktemp("source")
    write(source / "nested", {
        "pyproject.toml": project("nested-plugins", "src/ftrun_plugins"),
        "src/ftrun_plugins/optimizer/plainsgd.py": sgd("plainsgd"),
    })  # fmt: skip
    write(source / "pointed", {
        "pyproject.toml": project("pointed-plugins", "pointed", {"optimizer.foo": "pointed.opt:PlainSGD"}),
        "pointed/__init__.py": "",
        "pointed/opt.py": sgd("foo"),
    })  # fmt: skip
    target = tmp_path_factory.mktemp("site")
    isolated = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    words = ["-m", "pip", "install", "--quiet", "--no-deps", *isolated, "--target", str(target)]
    subprocess.run([sys.executable, *words, str(source / "nested"), str(source / "pointed")], check=True)
    return target


@pytest.fixture(scope="module")
def site_server(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A fork server that finds what is installed there."""
    address = str(tmp_path_factory.mktemp("server") / "socket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        process = forkserver.start(address)
    yield address
    process.terminate()
    process.wait()


@dataclasses.dataclass
class Shipped:
    """A plugin that is shipped one way, and what a user types to have it."""

    option: str
    words: list[str]
    env: dict[str, str]


@pytest.fixture(params=["namespace", "entry point", "file"])
def shipped(request: pytest.FixtureRequest, tmp_path: Path) -> Shipped:
    if request.param == "file":
        write(tmp_path, {"my_file.py": sgd("mine")})
        return Shipped("mine", ["plugins=[my_file.py]"], {})
    option = {"namespace": "plainsgd", "entry point": "foo"}[request.param]
    server = request.getfixturevalue("site_server")
    return Shipped(option, [], {"PYTHONPATH": str(request.getfixturevalue("site")), forkserver.VARIABLE: server})


def test_it_is_listed_with_its_summary(ftrun, shipped):
    listed = ftrun("list", "optimizer", "--json", *shipped.words, **shipped.env).sees(0)
    about = {row["option"]: row["about"] for row in json.loads(listed.out)}
    assert about[shipped.option] == f"Gradient descent with momentum, as the {shipped.option} package has it."
    assert about["adamw"].startswith("Adam with decoupled weight decay")
    keys = ftrun("list", f"optimizer={shipped.option}", "--json", *shipped.words, **shipped.env).sees(0)
    assert json.loads(keys.out)[-1] == {
        "key": "optimizer.momentum",
        "default": "0.0",
        "type": "number >= 0 and < 1",
        "about": "Decay of the running sum of gradients.",
    }


def test_its_keys_are_typed_and_checked(ftrun, shipped):
    def show(*words: str, code: int = 0) -> str:
        done = ftrun("show", "adapter=full", f"optimizer={shipped.option}", *shipped.words, *words, **shipped.env)
        assert "Traceback" not in done.sees(code).err
        return done.out if code == 0 else done.err

    tree = yaml.safe_load(show("optimizer.momentum=0.5"))
    of_all = {"lr": 5e-3, "weight_decay": 0.0, "embedding_lr": None, "groups": []}
    assert tree["optimizer"] == {"name": shipped.option, **of_all, "momentum": 0.5}
    assert "optimizer.momentum: 'much' is not a number" in show("optimizer.momentum=much", code=2)
    assert "did you mean optimizer.momentum" in show("optimizer.momentun=0.5", code=2)
    assert "1.0 is out of range" in show("optimizer.momentum=1", code=2)


RUN = (
    "model=tiny", "adapter=full", "data.rows=12", "data.max_length=128", "train.micro_batch_size=4",
    "train.max_steps=5", "train.log_every=1", "train.shuffle=false", "train.scheduler=constant", "train.warmup=0",
    "train.max_grad_norm=0", "optimizer.lr=0.05", "optimizer.momentum=0.5", "optimizer.weight_decay=0.1",
    "stage.num_samples=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def losses_by_hand() -> list[float]:
    """The losses of RUN, by the textbook: v = 0.5 v + g + 0.1 w, w = w - 0.05 v, in which vectors do not decay."""
    import torch
    from torch.nn import functional

    from ftrun.worker import batches, builtin, dataset

    tokenizer = builtin.tokenizer()
    cfg = config.compose([word for word in RUN if "momentum" not in word])
    rows = dataset.load(cfg, tokenizer).train
    model = builtin.model({"dtype": torch.float32})
    momenta = [torch.zeros_like(weight) for weight in model.parameters()]
    losses = []
    for start in (0, 4, 8, 0, 4):
        batch = [rows[index] for index in range(start, min(start + 4, len(rows)))]
        logits = [model(torch.tensor(row["input_ids"])[None]).logits[0, :-1] for row in batch]
        targets = torch.cat([torch.tensor(row["labels"][1:]).long() for row in batch])
        loss = functional.cross_entropy(torch.cat(logits), targets, ignore_index=batches.IGNORED)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for weight, momentum, gradient in zip(model.parameters(), momenta, gradients, strict=True):
                momentum.mul_(0.5).add_(gradient + (0.1 * weight if weight.ndim == 2 else 0))
                weight.sub_(0.05 * momentum)
    return losses


def test_it_trains_as_one_would_by_hand_and_resumes(ftrun, shipped, losses_by_hand, tmp_path):
    words = [f"optimizer={shipped.option}", *shipped.words, *RUN, "train.save_every=2"]
    whole = ftrun(*words, "output_dir=whole", **shipped.env).sees(0)
    assert whole.losses == pytest.approx(losses_by_hand, rel=1e-4)
    assert losses_by_hand[-1] < losses_by_hand[0] - 0.1
    stopped = _stopped_after(whole.folder, 2)
    (tmp_path / "my_file.py").unlink(missing_ok=True)  # the run has its own copy
    resumed = ftrun("resume", stopped.name, **shipped.env).sees(0)
    assert resumed.losses == whole.losses
    assert _weights(stopped) == _weights(whole.folder)


def _stopped_after(folder: Path, step: int) -> Path:
    """Return a copy of a run as it would be had it been stopped after a step."""
    copy = folder.with_name("stopped")
    shutil.copytree(folder, copy)
    for checkpoint in record.checkpoints(copy):
        if record.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(copy / record.MODEL)
    record.Result(status=record.Status.interrupted).save(copy)
    return copy


def _weights(folder: Path) -> bytes:
    return (folder / record.MODEL / "model.safetensors").read_bytes()


def test_a_file_is_copied_into_the_run(ftrun, tmp_path):
    write(tmp_path, {"mine/my_file.py": sgd("mine")})
    done = ftrun("plugins=[mine/my_file.py]", "optimizer=mine", "model=tiny", "train.max_steps=1").sees(0)
    assert (done.folder / "plugins" / "my_file.py").read_text() == sgd("mine")
    assert yaml.safe_load((done.folder / "run.yaml").read_text())["plugins"] == ["plugins/my_file.py"]


def test_a_file_that_is_edited_is_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["plugins=[edited.py]", "optimizer=edited", "model=tiny"]
    write(tmp_path, {"edited.py": sgd("edited")})
    assert config.compose(words).optimizer.momentum == 0.0
    for momentum in ("0.9", "0.0"):  # and back
        write(tmp_path, {"edited.py": sgd("edited").replace("ranged(0.0,", f"ranged({momentum},")})
        assert config.compose(words).optimizer.momentum == float(momentum)


def test_two_files_of_one_name_are_both_copied(ftrun, tmp_path):
    write(tmp_path, {"one/opt.py": sgd("first"), "two/opt.py": sgd("second")})
    words = ("plugins=[one/opt.py,two/opt.py]", "model=tiny", "train.max_steps=1")
    for option in ("first", "second"):
        done = ftrun(*words, f"optimizer={option}").sees(0)
        assert {path.read_text() for path in (done.folder / "plugins").iterdir()} == {sgd("first"), sgd("second")}


def test_a_file_cannot_take_the_name_of_an_option(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, {"mine.py": sgd("adamw")}))
    with pytest.raises(ConfigError, match=r"optimizer=adamw is defined twice, .*optimizer/adamw\.py"):
        config.compose(["plugins=[mine.py]", "optimizer=adamw", "model=tiny"])


Shown = Callable[..., str]


@pytest.fixture
def refused(ftrun) -> Shown:
    """What ``ftrun show optimizer=NAME`` says when it refuses."""

    def show(option: str, env: dict[str, str]) -> str:
        done = ftrun("show", f"optimizer={option}", **env).sees(2)
        assert "Traceback" not in done.err
        return done.err

    return show


def test_one_that_cannot_be_imported_breaks_no_other(ftrun, refused, tmp_path):
    env = on_path(
        tmp_path / "bad",
        {
            "ftrun_plugins/optimizer/fails.py": '"""Fails."""\n\nimport no_such_package\n',
            "ftrun_plugins/optimizer/torn.py": "def (\n",
            "bad/__init__.py": "\n\nraise RuntimeError('not today')\n",
            "bad/opt.py": sgd("package"),
        },
        {"optimizer.package": "bad.opt:PlainSGD", "optimizer.ghost": "nowhere.opt:PlainSGD"},
    )
    assert "No module named 'no_such_package', " in refused("fails", env)
    assert "ftrun_plugins/optimizer/fails.py:3" in refused("fails", env)
    assert "ftrun_plugins/optimizer/torn.py:1" in refused("torn", env)
    assert "RuntimeError: not today" in refused("package", env)
    assert "bad/__init__.py:3" in refused("package", env)
    assert "No module named 'nowhere'" in refused("ghost", env)
    listed = ftrun("list", "optimizer", **env).sees(0)
    assert {"adamw", "fails", "ghost", "package", "torn"} <= {line.split()[0] for line in listed.out.splitlines()}
    assert [line.partition(":")[0] for line in listed.err.splitlines()] == ["warning"]
    assert "torn" in listed.err
    assert ftrun("show", "optimizer=adamw", **env).sees(0).err == ""


SEVERAL = '''
"""Several plugins in one module."""

import os
from dataclasses import dataclass
from pathlib import Path

from ftrun.plugin import Optimizer, Tracker, register

Path(os.environ["MARK"]).touch()


@register
@dataclass(kw_only=True)
class One(Optimizer):
    """The first."""

    name: str = "one"


@register
@dataclass(kw_only=True)
class Two(Optimizer):
    """The second."""

    name: str = "two"


@register
@dataclass(kw_only=True)
class Told(Tracker):
    """Somebody is told."""

    name: str = "told"
'''


def test_an_entry_point_may_lead_to_several_plugins(ftrun, tmp_path):
    env = on_path(
        tmp_path / "several",
        {"several.py": SEVERAL, "broken.py": "raise RuntimeError('broken')\n"},
        {"several": "several", "broken": "broken"},
    ) | {"MARK": str(tmp_path / "mark")}
    ftrun("show", "optimizer=adamw", **env).sees(0)
    assert not (tmp_path / "mark").exists()
    listed = ftrun("list", "optimizer", "--json", **env).sees(0)
    about = {row["option"]: row["about"] for row in json.loads(listed.out)}
    assert (about["one"], about["two"]) == ("The first.", "The second.")
    assert len(listed.err.splitlines()) == 1
    assert "broken.py:1" in listed.err
    assert "Somebody is told." in ftrun("list", "tracker", **env).sees(0).out
    (tmp_path / "mark").unlink()
    shown = ftrun("show", "optimizer=two", "tracker=told", **env).sees(0)
    assert yaml.safe_load(shown.out)["optimizer"]["name"] == "two"
    assert list(yaml.safe_load(shown.out)["tracker"]) == ["told"]
    assert (tmp_path / "mark").exists()


def test_two_of_one_name_are_an_error_that_names_both(refused, tmp_path):
    name = "ftrun_plugins/optimizer/twice.py"
    one = on_path(tmp_path / "one", {name: sgd("twice"), "one.py": sgd("both")}, {"optimizer.both": "one:PlainSGD"})
    other = on_path(
        tmp_path / "other",
        {name: sgd("twice") + "# not the same\n", "other.py": sgd("both")},
        {"optimizer.both": "other:PlainSGD"},
    )
    env = {"PYTHONPATH": f"{one['PYTHONPATH']}:{other['PYTHONPATH']}"}
    said = refused("twice", env)
    assert f"{tmp_path / 'one' / name} and in {tmp_path / 'other' / name}" in said
    said = refused("both", env)
    assert str(tmp_path / "one" / "one.py") in said
    assert str(tmp_path / "other" / "other.py") in said


def test_a_class_of_another_name_than_its_file_is_refused(refused, tmp_path):
    env = on_path(tmp_path / "misnamed", {"ftrun_plugins/optimizer/fast.py": sgd("quick")})
    said = refused("fast", env)
    assert "optimizer/fast.py" in said
    assert "optimizer=quick" in said


ODD = """
from dataclasses import dataclass
from typing import Literal
from ftrun.plugin import Optimizer, register

DECORATORS
class Odd(BASES):
    name: str = "odd"
    FIELD
"""


@pytest.mark.parametrize(
    ("decorators", "bases", "field", "why"),
    [
        ("@register", "Optimizer", "rank: int = 1", "Odd is no dataclass"),
        ("@dataclass\n@register", "Optimizer", "rank: int = 1", "below @register"),
        ("@register\n@dataclass", "", "rank: int = 1", "derive it from one of"),
        ("@register\n@dataclass", "Optimizer", "name: str = '???'", "has no name"),
        ("@register\n@dataclass(kw_only=True)", "Optimizer", "rank: int", "the field rank has no default"),
        ("@register\n@dataclass", "Optimizer", "mode: Literal['a', 'b'] = 'a'", "mode: Unexpected type annotation"),
    ],
)
def test_what_is_no_plugin_is_refused(refused, tmp_path, decorators, bases, field, why):
    text = ODD.replace("DECORATORS", decorators).replace("BASES", bases).replace("FIELD", field)
    said = refused("odd", on_path(tmp_path / "odd", {"ftrun_plugins/optimizer/odd.py": text}))
    assert why in said
    assert said.startswith("error: optimizer=odd")


@pytest.mark.parametrize("closed", ["ftrun_plugins/__init__.py", "ftrun_plugins/optimizer/__init__.py"])
def test_a_package_that_closes_the_namespace_is_named(ftrun, tmp_path, closed):
    env = on_path(tmp_path / "closing", {closed: "", "ftrun_plugins/optimizer/plainsgd.py": sgd("plainsgd")})
    for words in (["list"], ["show", "model=tiny"]):
        assert f"{tmp_path / 'closing' / closed} hides the plugins" in ftrun(*words, **env).sees(2).err


def test_only_the_chosen_one_of_many_is_imported(ftrun, tmp_path):
    mark = "\nimport os, pathlib\n\npathlib.Path(os.environ['MARKS'], __name__).touch()\n"
    many = {f"ftrun_plugins/optimizer/many{i}.py": sgd(f"many{i}") + mark for i in range(100)}
    (tmp_path / "marks").mkdir()
    env = on_path(tmp_path / "many", many) | {"MARKS": str(tmp_path / "marks")}
    assert len(ftrun("list", "optimizer", **env).sees(0).out.splitlines()) == 100 + len(options.names("optimizer"))
    ftrun("--help", **env).sees(0)
    assert not list((tmp_path / "marks").iterdir())
    ftrun("show", "optimizer=many7", **env).sees(0)
    assert [mark.name for mark in (tmp_path / "marks").iterdir()] == ["ftrun_plugins.optimizer.many7"]
