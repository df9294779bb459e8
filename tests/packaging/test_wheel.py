"""A wheel, an sdist, an editable install and a bare checkout each hold, and find, the same files."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

import ftrun as package
from ftrun import forkserver, record

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HAS_BACKEND = importlib.util.find_spec("hatchling") is not None
"""Without it, pip and build make an environment of their own for it, which needs a network."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a clone would hold it: without empty folders and what git ignores."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folder = tmp_path_factory.mktemp("clone")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build(tree: Path, out: Path, *options: str) -> Path:
    """Build a tree and return the wheel."""
    words = [sys.executable, "-m", "build", *options, "--outdir", str(out)]
    words += ["--no-isolation"] if HAS_BACKEND else []
    done = subprocess.run([*words, str(tree)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as it is built from the repository."""
    return build(clone, tmp_path_factory.mktemp("wheel"), "--wheel")


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel, but for its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def below(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Return the files of a folder, named as the wheel names them."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {f"{prefix}{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}


def test_the_wheel_holds_the_packages_the_options_and_nothing_else(wheel, clone):
    expected = below(clone / "ftrun", "ftrun/") | below(clone / "plugins")
    expected |= below(clone / "conf", "ftrun/conf/") | below(clone / "sweeps", "ftrun/sweeps/")
    found = contents(wheel)
    assert sorted(found) == sorted(expected)
    assert found == expected
    assert {"ftrun/conf/ftrun.yaml", "ftrun/demo/identity/train.jsonl", "ftrun_plugins/stage/sft.py"} <= set(found)
    assert any(name.startswith("ftrun/sweeps/") for name in found)
    assert not [name for name in found if name.startswith("ftrun_plugins/") and name.endswith("__init__.py")]


def test_the_metadata_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{folder}/METADATA").decode()
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert f"Version: {package.__version__}\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    assert "Requires-Dist: torch" in metadata
    assert "ftrun = ftrun.cli:main" in scripts


def test_the_sdist_builds_the_same_wheel(wheel, clone, tmp_path):
    again = build(clone, tmp_path)  # an sdist, and a wheel from it
    assert contents(again) == contents(wheel)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= inside
    assert not [name for name in inside if name.startswith("tests/")]


class Environment:
    """A fresh virtual environment that finds the packages ftrun depends on where these tests found them.

    Their folder is put on its path by a ``.pth`` file. What ``.pth`` files in that folder name, such as an editable
    ftrun, is not on it.
    """

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")

    def install(self, *words: str) -> None:
        """Install with the pip of these tests."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *words], check=True)

    def borrow(self) -> None:
        """Put the packages that ftrun depends on, and the build backend, on the path, behind its own."""
        found = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.site / "borrowed.pth").write_text("\n".join(found) + "\n")

    def run(self, *words: str, cwd: Path, **env: str) -> str:
        """Run one of its programs and return what it prints."""
        given = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", forkserver.VARIABLE)}
        program = str(self.python.with_name(words[0]))
        done = subprocess.run([program, *words[1:]], cwd=cwd, env=given | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def finds(self, cwd: Path, **env: str) -> list[Path]:
        """Return where it finds ftrun, a plugin, the options and the sweeps."""
        code = (
            "import ftrun, ftrun.options, ftrun.plugin\n"
            "cls = ftrun.plugin.get('optimizer', 'adamw')\n"
            "print(ftrun.__file__, ftrun.plugin.source('optimizer', 'adamw'), ftrun.options.CONF)"
        )
        return [Path(word) for word in self.run("python", "-P", "-c", code, cwd=cwd, **env).split()]


def shows_everything(show: Sequence[str], environment: Environment, cwd: Path, **env: str) -> None:
    """Fail unless the options that ship with ftrun are all found."""
    words = environment.run(*show, "list", "--json", cwd=cwd, **env)
    listed = {row["group"]: row["options"] for row in json.loads(words)}
    assert {"sft", "dpo"} <= set(listed["stage"])
    assert {"tiny", "smollm2", "qwen2"} <= set(listed["model"])
    tree = yaml.safe_load(environment.run(*show, "show", "stage=sft", "model=tiny", cwd=cwd, **env))
    assert (tree["stage"]["name"], tree["model"]["path"]) == ("sft", "builtin:tiny")
    assert tree["data"]["path"] == "demo:identity"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel."""
    made = Environment(tmp_path_factory.mktemp("installed") / "venv")
    made.install("--no-index", str(wheel))
    made.borrow()
    return made


def test_the_installed_wheel_finds_its_files_and_no_others(installed, tmp_path):
    code, plugin, conf = installed.finds(tmp_path)
    assert code == installed.site / "ftrun" / "__init__.py"
    assert plugin == installed.site / "ftrun_plugins" / "optimizer" / "adamw.py"
    assert conf == installed.site / "ftrun" / "conf"
    shows_everything(["ftrun"], installed, tmp_path)


def test_the_installed_wheel_trains_as_the_checkout_does(installed, ftrun, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("datasets", "transformers", "json"):  # the folder that a user works in may hold such files
        (elsewhere / f"{name}.py").write_text("raise SystemExit('this is not the package of that name')\n")
    words = ("model=tiny", "debug=smoke", "hardware=cpu", "seed=3")
    out = installed.run("ftrun", *words, "output_dir=run", cwd=elsewhere)
    folder = elsewhere / "run"
    assert "completed 2 steps" in out
    result = record.Result.load(folder)
    assert (result.status, result.step) == (record.Status.completed, 2)
    for name in ("run.yaml", "manifest.json", "metrics.jsonl", "log.txt", "model/adapter_model.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    losses = [line["loss"] for line in record.read_lines(folder / record.METRICS) if "loss" in line]
    assert len(losses) == 2
    assert losses == ftrun(*words).sees(0).losses


def test_an_editable_install_finds_the_checkout_from_anywhere(clone, tmp_path):
    made = Environment(tmp_path / "venv")
    made.borrow()
    made.install("--ignore-installed", *(["--no-build-isolation"] if HAS_BACKEND else []), "--editable", str(clone))
    code, plugin, conf = made.finds(tmp_path)
    assert code == clone / "ftrun" / "__init__.py"
    assert plugin == clone / "plugins" / "ftrun_plugins" / "optimizer" / "adamw.py"
    assert conf == clone / "conf"
    shows_everything(["ftrun"], made, tmp_path)


def test_a_checkout_needs_no_installation(clone, tmp_path):
    made = Environment(tmp_path / "venv")
    made.borrow()
    for cwd, path in ((clone, ".:plugins"), (tmp_path, f"{clone}:{clone / 'plugins'}")):
        assert made.finds(cwd, PYTHONPATH=path)[0] == clone / "ftrun" / "__init__.py"
        shows_everything(["python", "-m", "ftrun"], made, cwd, PYTHONPATH=path)
