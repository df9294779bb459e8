"""The commands beside training: help, lists, show, env, runs, completion; what they print, and their exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import ftrun as package
from ftrun import cli, config, model, options, plugin, record
from ftrun.config import Config
from ftrun.data import formats
from ftrun.display import console
from ftrun.model import Source
from ftrun.record import Holder, Result, Status
from ftrun.train import Scheduler

PLUGINS = [(group, name) for group in plugin.GROUPS for name in plugin.names(group)]
NEEDS = {
    **{("optimizer", name): ("adapter=full",) for name in ("galore", "fira", "apollo", "apollo_mini", "badam")},
    **{("optimizer", name): ("adapter=full",) for name in ("badam_ratio", "lisa")},
    ("optimizer", "schedule_free"): ("train.scheduler=constant",),
    ("optimizer", "torch"): ("optimizer.cls=torch.optim.RAdam",),
    ("optimizer", "hf"): ("optimizer.optim=ademamix",),
    ("reward", "code"): ("reward.code.allow_execution=true",),
    ("reward", "http"): ("reward.http.url=http://host/score",),
    ("reward", "model"): ("reward.model.path=ORG/judge",),
    ("reward", "adapter"): ("reward.adapter.path=ORG/judge",),
    ("stage", "distill"): ("stage.teacher_path=ORG/teacher",),
}
"""What options need besides being chosen."""

PRESETS = [(path.parent.name, path.stem) for path in sorted(options.CONF.glob("*/*.yaml"))]
FAMILIES = [name for group, name in PRESETS if group == "model"]


def user_environment() -> dict[str, str]:
    """Return the environment with ``ftrun`` on its path, and standard output buffered, as it is for users."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"PATH": path}


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Do a line that a user types."""
    return subprocess.run(["bash", "-c", line], cwd=folder, env=user_environment(), capture_output=True, text=True)


def listed(page: str) -> set[str]:
    """Return the words of a page."""
    return set(re.findall(r"[\w.=|/-]+", page))


def keys_of(tree: dict, prefix: str = "") -> set[str]:
    """Return the dotted keys of a tree of plain values."""
    found: set[str] = set()
    for name, value in tree.items():
        found |= keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}"}
    return found


# help


def test_version(driver):
    done = driver("--version").sees(0)
    assert done.out.strip() == f"ftrun {package.__version__}"


@pytest.mark.parametrize("words", [("--help",), ("-h",)])
def test_help_names_every_command_group_and_option_and_gives_examples(words, driver):
    page = driver(*words).sees(0).out
    for command in options.COMMANDS:
        assert f"ftrun {command}" in page
    for group, about in options.GROUPS.items():
        assert re.search(rf"^ +{group} +{re.escape(about)}", page, re.MULTILINE)
        for name in options.names(group):
            assert name in listed(page), f"{group}={name}"
    assert "Examples" in page


def test_the_examples_of_the_help_page_compose(driver):
    """Each is a line that a newcomer types first."""
    lines = [line for line in driver("--help").out.partition("Examples")[2].splitlines() if line.strip()]
    examples = [re.split(r"\s{2,}", line.strip())[0].split() for line in lines]
    assert len(examples) > 4
    for _, *words in examples:
        done = driver("check" if "-m" in words else "show", *(word for word in words if word != "--help"))
        assert done.code == 0, f"{' '.join(words)}\n{done.err}"


def test_help_of_a_choice_lists_its_keys_with_value_range_and_meaning(driver):
    page = driver("stage=dpo", "--help").sees(0).out
    tree = yaml.safe_load(driver("show", "stage=dpo").out)
    internal = re.compile(r"(.*\.)?name|model\.sizes|schema_version|reward")
    for key in keys_of(tree):
        assert internal.fullmatch(key) or re.search(rf"^ *{re.escape(key)} ", page, re.MULTILINE), key
    assert re.search(r"stage\.beta +0\.1 +How closely .* > 0\)", page)
    assert re.search(r"train\.shuffle +true ", page)
    assert "demo:preferences" in page
    assert "stage.sample_prompts" not in page, "that is a key of sft"
    assert "schema_version" not in page


def test_help_may_stand_anywhere(driver):
    pages = {
        driver(*words).sees(0).out
        for words in (("stage=dpo", "--help"), ("--help", "stage=dpo"), ("show", "stage=dpo", "-h"))
    }
    assert len(pages) == 1


def test_help_of_a_wrong_choice_says_so(driver):
    done = driver("stage=orpp", "--help").sees(2)
    assert "did you mean orpo" in done.err


@pytest.mark.parametrize("command", options.COMMANDS)
def test_every_command_has_a_page(command, driver):
    page = driver(command, "--help").sees(0).out
    assert len(page.splitlines()) > 4
    assert "Traceback" not in page


def test_every_command_is_listed_where_words_are_suggested():
    assert set(options.COMMANDS) == {name for name in cli._COMMANDS if not name.startswith("_")}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("list optimizer adapter", "unrecognized arguments: adapter"),
        ("list --xml", "--xml"),
        ("runs a b", "unrecognized arguments: b"),
        ("runs --depth", "--depth"),
        ("resume", "folder"),
        ("resume nothing", "holds no run"),
        ("completion", "shell"),
        ("completion tcsh", "bash"),
        ("env --all", "--all"),
        ("show --all", "--all"),
    ],
)
def test_wrong_arguments_end_in_2_and_one_problem(words, says, driver):
    done = driver(*words.split()).sees(2)
    assert says in done.err
    assert done.err.count("fix: ") == 1
    assert "usage:" not in done.err


# list


def test_list_names_every_group_and_option(driver):
    page, rows = driver("list").sees(0).out, json.loads(driver("list", "--json").sees(0).out)
    assert [row["group"] for row in rows] == list(options.GROUPS)
    for row in rows:
        assert row["about"] == options.GROUPS[row["group"]]
        assert row["options"] == options.names(row["group"]), "a list for machines, not text with commas"
        assert {row["group"], *row["options"]} <= listed(page)


@pytest.mark.parametrize("group", options.GROUPS)
def test_list_of_a_group_says_what_each_option_is(group, driver):
    page, rows = driver("list", group).sees(0).out, json.loads(driver("list", group, "--json").sees(0).out)
    assert [row["option"] for row in rows] == options.names(group)
    for row in rows:
        assert len(row["about"]) > 10, f"{group}={row['option']} has no opening line"
        assert re.search(rf"^{re.escape(row['option'])} +\S", page, re.MULTILINE)


@pytest.mark.parametrize(("group", "name"), PLUGINS, ids=lambda word: word)
def test_list_of_a_plugin_gives_its_keys(group, name, driver):
    rows = json.loads(driver("list", f"{group}={name}", "--json").sees(0).out)
    page = driver("list", f"{group}={name}").sees(0).out
    prefix = plugin.place(group, name)
    fields = {field.name for field in dataclasses.fields(plugin.get(group, name))} - {"name"}
    assert {row["key"] for row in rows} == {f"{prefix}.{field}" for field in fields}
    for row in rows:
        assert row["about"], f"{row['key']} has no docstring"
        assert row["type"]
        assert row["key"] in page


def test_list_of_a_preset_gives_what_it_sets(driver):
    rows = {row["key"]: row["default"] for row in json.loads(driver("list", "debug=smoke", "--json").out)}
    assert rows == {"train.max_steps": "2", "train.log_every": "1"}
    rows = {row["key"]: row["default"] for row in json.loads(driver("list", "experiment=identity", "--json").out)}
    assert rows == {"stage": "sft", "model": "smollm2", "data": "identity", "adapter": "lora"}


@pytest.mark.parametrize("group", ["train", "data", "hardware"])
def test_list_of_a_preset_shows_its_values_not_the_defaults(group, driver):
    for name in options.names(group):
        wanted = yaml.safe_load((options.CONF / group / f"{name}.yaml").read_text()) or {}
        wanted.pop("defaults", None)
        rows = {row["key"]: row["default"] for row in json.loads(driver("list", f"{group}={name}", "--json").out)}
        for key, value in wanted.items():
            assert yaml.safe_load(rows[f"{group}.{key}"]) == value, f"{group}={name}"


def test_list_of_a_family_names_its_sizes(driver):
    page = driver("list", "model=qwen2").sees(0).out
    assert {"0.5B", "57B-A14B", "72B-math-base"} <= listed(page)


def test_list_of_the_sweeps(driver):
    out = driver("list", "sweep").sees(0).out
    assert all(name in out for name in options.sweeps())


def test_every_choice_of_a_key_is_shown(driver, monkeypatch):
    monkeypatch.setattr(console, "_width", 80)
    page = driver("stage=sft", "--help").sees(0).out
    assert "…" not in page.replace("SmolLM2-13…", "")
    assert all(source in page for source in Source)


def test_list_of_a_preset_of_ones_own(driver, write):
    write("conf/optimizer/mine.yaml", "# Slow and steady.\ndefaults: [adamw, _self_]\nlr: 1.0e-6\n")
    write(
        "conf/method/slow.yaml",
        "# @package _global_\n# Slower still.\ndefaults:\n  - override /optimizer: mine\nseed: 1\n",
    )
    assert re.search(r"^mine +Slow and steady\. *$", driver("list", "optimizer").sees(0).out, re.MULTILINE)
    assert {"mine", "slow"} <= listed(driver("list").out)
    rows = {row["key"]: row["default"] for row in json.loads(driver("list", "method=slow", "--json").out)}
    assert rows == {"optimizer": "mine", "seed": "1"}
    rows = {row["key"]: row["default"] for row in json.loads(driver("list", "optimizer=mine", "--json").sees(0).out)}
    assert float(rows["optimizer.lr"]) == 1e-6


def test_a_preset_that_cannot_be_read_does_not_break_the_list(driver, write):
    write("conf/optimizer/mine.yaml", b"# caf\xe9\n")
    write("conf/optimizer/other.yaml", "lr: [\n")
    assert {"mine", "other", "adamw"} <= listed(driver("list", "optimizer").sees(0).out)
    assert {"mine", "other", "adamw"} <= listed(driver("--help").sees(0).out)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("optimiser", "did you mean optimizer"),
        ("zzz", "is no group"),
        ("optimizer=adammw", "did you mean adamw"),
        ("seed", "is no group"),
    ],
)
def test_list_of_what_there_is_not(what, says, driver):
    for words in (("list", what), ("list", what, "--json")):
        done = driver(*words).sees(2)
        assert says in done.err
        assert ("optimizer, " if "=" not in what else "adamw") in done.err
        assert done.out == ""


FORMAT = '''\
from dataclasses import dataclass

from ftrun.plugin import Format, register


@register
@dataclass(kw_only=True)
class Mine(Format):
    """Rows of mine."""

    name: str = "mine"
'''


def test_list_of_the_formats_of_rows(driver, write):
    page, rows = driver("list", "data.format").sees(0).out, json.loads(driver("list", "data.format", "--json").out)
    assert [row["option"] for row in rows] == formats.names()
    for row in rows:
        assert row["about"]
        assert re.search(rf"^{row['option']} +{row['rows']}", page, re.MULTILINE)
    assert {"option": "tokens", "rows": "conversations or texts", "about": "input_ids"} in rows
    assert "a format has no keys" in driver("list", "data.format=alpaca").sees(2).err
    assert "did you mean data.format" in driver("list", "data.formats").sees(2).err
    write("mine.py", FORMAT)
    page = driver("list", "data.format", "plugins=[mine.py]").sees(0).out
    assert re.search(r"^mine +any kind +Rows of mine\.", page, re.MULTILINE)


# show


SHOWN = [
    "",
    "stage=dpo model=qwen2 adapter=lora",
    "stage=pt model=tiny adapter=full tracker=tensorboard seed=7",
    "data.sources=[{path:a.jsonl,weight:2}] adapter.targets=[q_proj] train.max_steps=3 output_dir=here",
]


@pytest.mark.parametrize("words", SHOWN)
def test_what_is_shown_is_a_whole_run(words, driver, write):
    """Saved as run.yaml it is read back as what was composed."""
    shown = driver("show", *words.split()).sees(0)
    assert shown.err == ""
    path = write("run.yaml", shown.out)
    assert Config.load(path) == config.compose(words.split())
    assert Config.load(path).to_yaml() == shown.out


def test_what_is_shown_has_every_default_written_out(driver):
    tree = yaml.safe_load(driver("show", "stage=simpo", "model=qwen2", "adapter=lora").sees(0).out)
    assert tree["stage"] == {"name": "simpo", "beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0}
    assert tree["model"]["path"] == "Qwen/Qwen2-0.5B-Instruct"
    assert tree["adapter"]["name"] == "lora"
    assert tree["optimizer"]["lr"] == pytest.approx(1e-5)
    assert tree["data"]["path"] == "demo:preferences"
    assert "${" not in json.dumps(tree)
    assert "???" not in json.dumps(tree)


def test_showing_does_nothing(driver, tmp_path):
    driver("show", "output_dir=here").sees(0)
    driver("check", "model=tiny", "output_dir=here").sees(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_composes_with_each_of_its_sizes(family, driver):
    tree = yaml.safe_load((options.CONF / "model" / f"{family}.yaml").read_text())
    sizes = tree.get("sizes", {})
    shown = yaml.safe_load(driver("show", f"model={family}").sees(0).out)["model"]
    assert shown["path"] == (sizes[tree["size"]] if sizes else tree["path"])
    assert len(set(sizes.values())) == len(sizes), "no two sizes are one model"
    for size, path in sizes.items():
        assert isinstance(size, str)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", path)
        chosen = model.Model(size=size, sizes=dict(sizes))
        assert list(model.pick_size(chosen)) == []
        assert (chosen.path, chosen.sizes) == (path, {})
    for size in list(sizes)[-1:]:  # what is typed is text, also where it looks like a number
        assert (
            yaml.safe_load(driver("show", f"model={family}", f"model.size={size}").sees(0).out)["model"]["path"]
            == sizes[size]
        )


# Those of the model have a test above, those of the template one in test_template.py.
COMPOSED = [(group, name) for group, name in PRESETS if group not in ("model", "template")]


@pytest.mark.parametrize(("group", "name"), COMPOSED, ids=lambda word: word)
def test_every_preset_composes(group, name, driver, monkeypatch):
    monkeypatch.setattr(plugin, "is_installed", lambda _: True)
    shown = yaml.safe_load(driver("show", f"{group}={name}", *NEEDS.get((group, name), ())).sees(0).out)
    wanted = yaml.safe_load((options.CONF / group / f"{name}.yaml").read_text()) or {}
    place = shown if group in options.OPTIONAL_GROUPS else shown[group]
    wanted.pop("defaults", None)
    for key in keys_of(wanted):
        here, there = wanted, place
        for part in key.split("."):
            here, there = here[part], there[part]
        assert here == there, key


@pytest.mark.parametrize(("group", "name"), PLUGINS, ids=lambda word: word)
def test_every_plugin_composes(group, name, driver, monkeypatch):
    monkeypatch.setattr(plugin.get(group, name), "requires", ())
    words = ["stage=grpo"] if group == "reward" else []
    words += [f"{group}={name}", *NEEDS.get((group, name), ())]
    shown = yaml.safe_load(driver("show", *words).sees(0).out)[group]
    assert (shown[name] if group in plugin.SEVERAL else shown)["name"] == name


@pytest.mark.parametrize(("group", "name"), dict(PRESETS).items(), ids=lambda word: word)
def test_a_preset_of_the_working_folder_wins_over_the_shipped_one(group, name, driver, write):
    text, holds = {
        "model": ("path: mine/model", lambda tree: tree["model"]["path"] == "mine/model"),
        "template": ("chat_template: mine", lambda tree: tree["template"]["chat_template"] == "mine"),
        "data": ("path: mine.jsonl", lambda tree: tree["data"]["path"] == "mine.jsonl"),
        "train": ("epochs: 77", lambda tree: tree["train"]["epochs"] == 77),
        "hardware": ("num_threads: 77", lambda tree: tree["hardware"]["num_threads"] == 77),
        "optimizer": ("defaults: [adamw, _self_]\nbeta1: 0.77", lambda tree: tree["optimizer"]["beta1"] == 0.77),
    }.get(group, ("seed: 77", lambda tree: tree["seed"] == 77))
    head = "# @package _global_\n" if group in options.OPTIONAL_GROUPS else ""
    write(f"conf/{group}/{name}.yaml", f"{head}# Mine, and nobody else's.\n{text}\n")
    assert holds(yaml.safe_load(driver("show", f"{group}={name}").sees(0).out))
    assert options.summary(group, name) == "Mine, and nobody else's."


# env


def test_env_holds_what_a_bug_report_needs(driver, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12345")
    page, table = driver("env").sees(0).out, json.loads(driver("env", "--json").sees(0).out)
    assert table["ftrun"] == package.__version__
    assert table["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "peft", "accelerate", "accelerators", "cache", "$SLURM_JOB_ID"} <= set(table)
    for name, value in table.items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(value)}$", page, re.MULTILINE), name


def test_env_prints_no_secret(driver, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "hf_thesecretthatnobodymaysee")
    assert "thesecret" not in driver("env").out + driver("env", "--json").out


# runs


def make_run(
    folder: Path, status: str, *, holder: Holder | None = None, started: str = "2026-01-02T03:04:05+00:00", **more
) -> None:
    """Lay out a run's folder, as a driver and its worker leave it."""
    folder.mkdir(parents=True)
    (folder / record.RUN).write_text("schema_version: 1\n")
    manifest = {"started": started, "overrides": ["model=tiny", "seed=3"]}
    (folder / record.MANIFEST).write_text(json.dumps(manifest))
    Result(status=Status(status), holder=holder, **more).save(folder)


def runs(driver, *words: str) -> dict[str, dict]:
    """Return the rows of ``ftrun runs``, by the name of the run's folder."""
    return {Path(row["folder"]).name: row for row in json.loads(driver("runs", *words, "--json").sees(0).out)}


def dead_process() -> int:
    """Return the number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_no_runs(driver, tmp_path):
    assert "no runs below outputs" in driver("runs").sees(0).out
    assert json.loads(driver("runs", "--json").sees(0).out) == []
    (tmp_path / "outputs").mkdir()
    assert "no runs below outputs" in driver("runs").sees(0).out
    assert "no runs below elsewhere" in driver("runs", "elsewhere").sees(0).out


def test_runs_of_each_status(driver, tmp_path):
    root = tmp_path / "outputs" / "sft"
    make_run(root / "done", "completed", started="2026-01-05T00:00:00+00:00", step=12, wall_seconds=3725.0,
             metrics={"loss": 1.25, "eval_loss": 1.5}, objective=1.5)  # fmt: skip
    make_run(root / "broke", "failed", started="2026-01-04T00:00:00+00:00", reason="out of memory")
    make_run(root / "stopped", "interrupted", started="2026-01-03T00:00:00+00:00", step=4)
    make_run(root / "moved", "preempted", started="2026-01-02T00:00:00+00:00", step=5)
    make_run(root / "going", "running", started="2026-01-01T00:00:00+00:00", holder=Holder.me())
    found = runs(driver)
    assert {name: row["status"] for name, row in found.items()} == {
        "done": "completed", "broke": "failed", "stopped": "interrupted", "moved": "preempted", "going": "running",
    }  # fmt: skip
    assert list(found) == ["going", "moved", "stopped", "broke", "done"], "the newest last"
    assert found["done"]["metrics"] == {"loss": 1.25, "eval_loss": 1.5}
    assert found["done"]["folder"] == str(root / "done")
    assert found["broke"]["reason"] == "out of memory"
    lines = {name: re.search(rf"^.* (sft/)?{name}( .*|)$", driver("runs").sees(0).out, re.M) for name in found}
    for name, row in found.items():
        assert lines[name], name
        assert row["status"] in lines[name][0]
    for cell in ("12", "1.25", "1.5", "1:02:05", "01-05 00:00", "model=tiny seed=3"):
        assert f" {cell} " in f" {lines['done'][0]} "


def test_a_run_whose_holder_is_dead_was_interrupted(driver, tmp_path):
    pid = dead_process()
    make_run(tmp_path / "outputs" / "gone", "running", holder=Holder(socket.gethostname(), pid, 1.0))
    make_run(tmp_path / "outputs" / "reused", "running", holder=Holder(socket.gethostname(), os.getpid(), 1.0))
    make_run(tmp_path / "outputs" / "nobody", "running")
    far = Holder("another-host", 1, 1.0)
    make_run(tmp_path / "outputs" / "far", "running", holder=far)
    make_run(tmp_path / "outputs" / "far_and_silent", "running", holder=far)
    long_ago = time.time() - 3600
    os.utime(tmp_path / "outputs" / "far_and_silent" / record.RESULT, (long_ago, long_ago))
    assert {name: row["status"] for name, row in runs(driver).items()} == {
        "gone": "interrupted", "reused": "interrupted", "nobody": "interrupted", "far": "running",
        "far_and_silent": "interrupted",
    }  # fmt: skip


def test_a_torn_line_of_metrics_is_passed_over(driver, tmp_path):
    folder = tmp_path / "outputs" / "torn"
    make_run(folder, "running", holder=Holder.me())
    (folder / record.METRICS).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert runs(driver)["torn"]["step"] == 2
    (folder / record.METRICS).write_text('{"step": 1, "lo')
    assert runs(driver)["torn"]["step"] == 0
    (folder / record.METRICS).write_text("")
    assert runs(driver)["torn"]["step"] == 0


def test_a_run_that_is_going_shows_its_loss(driver, tmp_path):
    folder = tmp_path / "outputs" / "going"
    make_run(folder, "running", holder=Holder.me())
    (folder / record.METRICS).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    (line,) = [line for line in driver("runs").sees(0).out.splitlines() if "running" in line]
    assert " 2 " in line
    assert " 1.5 " in line


def test_runs_that_were_just_made_or_are_damaged_harm_no_other(driver, tmp_path):
    root = tmp_path / "outputs"
    make_run(root / "good", "completed")
    make_run(root / "unfinished", "running", holder=Holder.me())
    (root / "unfinished" / record.RESULT).unlink()
    make_run(root / "damaged", "completed")
    (root / "damaged" / record.RESULT).write_text("{")
    make_run(root / "strange", "completed")
    (root / "strange" / record.RESULT).write_text('{"status": "dancing"}')
    make_run(root / "newer", "completed")
    (root / "newer" / record.RESULT).write_text('{"status": "completed", "carbon": 3}')
    make_run(root / "plain", "completed")
    (root / "plain" / record.MANIFEST).unlink()
    (root / "notes.txt").write_text("x")
    (root / ".hidden").mkdir()
    found = runs(driver)
    assert {"good", "plain"} <= set(found), "a run without its manifest is a run"
    assert driver("runs").sees(0).err == ""


def test_runs_are_found_however_deep_and_a_run_is_itself(driver, tmp_path):
    make_run(tmp_path / "a" / "b" / "c" / "one", "completed")
    make_run(tmp_path / "a" / "two", "completed")
    make_run(tmp_path / "a" / "two" / "checkpoints" / "inner", "completed")
    assert set(runs(driver, "a")) == {"one", "two"}, "nothing inside a run is a run"
    assert set(runs(driver, "a/two")) == {"two"}
    assert "b/c/one" in driver("runs", "a").out


def test_resuming_what_is_done_or_held_is_refused(driver, tmp_path):
    make_run(tmp_path / "done", "completed")
    done = driver("resume", "done").sees(2)
    assert "done: is completed" in done.err
    make_run(tmp_path / "held", "running", holder=Holder.me())
    done = driver("resume", "held").sees(2)
    assert f"process {os.getpid()}" in done.err
    assert Result.load(tmp_path / "held").status is Status.running, "and nothing was touched"


# completion


def complete(*words: str) -> list[str]:
    from ftrun import completion

    return completion.candidates(words)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["sta"], ["stage.", "stage="]),
        (["stage="], [f"stage={name}" for name in options.names("stage")]),
        (["model=qwen2"], [f"model={name}" for name in options.names("model") if name.startswith("qwen2")]),
        (["debug=s"], ["debug=smoke"]),
        (["train.scheduler=c"], [f"train.scheduler={name}" for name in sorted(Scheduler) if name.startswith("c")]),
        (["train.shuffle="], ["train.shuffle=false", "train.shuffle=true"]),
        (["objective_mode="], ["objective_mode=auto", "objective_mode=max", "objective_mode=min"]),
        (["train.warm"], ["train.warmup="]),
        (["adapter=freeze", "adapter."], ["adapter.extra=", "adapter.layers=", "adapter.modules="]),
        (["stage=orpo", "stage."], ["stage.beta="]),
        (["stage=dpo", "model=tiny", "optimizer.wei"], ["optimizer.weight_decay="]),
        (["model=qwen2", "model.size=57"], ["model.size=57B-A14B", "model.size=57B-A14B-base"]),
        (["tracker=wandb", "tracker.wandb.mode="], ["tracker.wandb.mode=offline", "tracker.wandb.mode=online"]),
        (["tracker=wandb", "tracker.wandb.pro"], ["tracker.wandb.project="]),
        (["sh"], ["show"]),
        (["show", "sta"], ["stage.", "stage="]),
        (["show", "sh"], []),
        (["check", "stage=s"], [f"stage={name}" for name in options.names("stage") if name.startswith("s")]),
        (["list", "opt"], ["optimizer"]),
        (["list", "adapter="], [f"adapter={name}" for name in options.names("adapter")]),
        (["completion", "z"], ["zsh"]),
        (["zzz"], []),
        (["--h"], ["--help"]),
        (["-m", "sweep=lo"], ["sweep=lora_rank"]),
        (["-m", "sw"], ["sweep="]),
        (["sw"], []),
        (["data.path="], []),
        (["nothing.x="], []),
        (["nothing="], []),
        (["stage=nothing", "stage."], []),
        (["seed="], []),
    ],
    ids=lambda value: " ".join(value) if value else "none",
)  # fmt: skip
def test_candidates(words, found, driver):
    assert complete(*words) == found
    assert driver("__complete", *words).sees(0).out.split() == found


def test_every_candidate_is_a_word_that_can_be_typed(driver):
    everything = complete("")
    assert {*options.COMMANDS, "seed=", "output_dir=", "plugins="} <= set(everything)
    assert {f"{group}=" for group in options.GROUPS} <= set(everything)
    typed = {key for group in options.GROUPS for key in complete(f"{group}.")}
    shown = keys_of(yaml.safe_load(driver("show").out))
    assert typed - {"data.sources="} <= {f"{key}=" for key in shown}
    assert not {key for key in typed if re.search(r"\.name=|\.sizes=", key)}, "those are not for typing"


def test_completion_knows_the_presets_of_the_working_folder(driver, write):
    write("conf/optimizer/mine.yaml", "defaults: [adamw, _self_]\nlr: 1.0e-6\n")
    assert driver("__complete", "optimizer=m").out.split() == [
        f"optimizer={name}" for name in options.names("optimizer") if name.startswith("m")
    ]
    assert "optimizer.beta1=" in driver("__complete", "optimizer=mine", "optimizer.b").out.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_asks_ftrun(shell, driver):
    script = driver("completion", shell).sees(0).out
    assert "ftrun __complete" in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


BASH = """\
source <(ftrun completion bash) || exit 9
function_name=$(complete -p ftrun | sed 's/.*-F \\([^ ]*\\).*/\\1/')
while IFS= read -r line; do
    COMP_LINE="$line" COMP_POINT=${#line} COMP_TYPE=9 COMP_KEY=9
    [[ "$COMP_WORDBREAKS" == *=* ]] && line="${line//=/ = }"
    read -r -a COMP_WORDS <<< "$line"
    [[ "$COMP_LINE" == *' ' ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    COMPREPLY=()
    "$function_name" ftrun "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}" 2>/dev/null
    printf '%s\\t' "${COMPREPLY[@]}"
    echo
done
"""
"""What bash does when a user types a line and presses the tab key."""


def bash_completes(folder: Path, *lines: str, before: str = "") -> list[list[str]]:
    """Return what bash would offer behind each line."""
    typed = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(
        ["bash", "--norc", "-c", before + BASH],
        input=typed, cwd=folder, env=user_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [[word for word in line.split("\t") if word] for line in done.stdout.splitlines()]


def test_bash_completes(tmp_path):
    """Bash breaks words at ``=`` by default: what is offered behind one is what follows it."""
    lines = {
        "ftrun sta": ["stage.", "stage="],
        "ftrun stage=": options.names("stage"),
        "ftrun stage=dpo adapter=l": [name for name in options.names("adapter") if name.startswith("l")],
        "ftrun optimizer.": complete("optimizer."),
        "ftrun optimizer.wei": ["optimizer.weight_decay="],
        "ftrun train.scheduler=": sorted(Scheduler),
        "ftrun show train.scheduler=con": ["constant"],
        "ftrun list optim": ["optimizer"],
        "ftrun list quant=n": [name for name in options.names("quant") if name.startswith("n")],
        "ftrun completion ": ["bash", "fish", "zsh"],
        "ftrun zzz": [],
    }
    assert dict(zip(lines, bash_completes(tmp_path, *lines), strict=True)) == lines


def test_bash_completes_where_words_do_not_break_at_an_equals_sign(tmp_path):
    lines = {"ftrun sta": ["stage.", "stage="], "ftrun stage=": complete("stage=")}
    found = bash_completes(tmp_path, *lines, before="COMP_WORDBREAKS=${COMP_WORDBREAKS//=}\n")
    assert dict(zip(lines, found, strict=True)) == lines


def test_bash_offers_files_where_ftrun_has_nothing_to_offer(tmp_path):
    told = shell("source <(ftrun completion bash); complete -p ftrun", tmp_path).stdout
    assert re.search(r"-o (bash)?default", told), "behind data.path= and resume a user types paths"


# pipes and exit codes


@pytest.mark.parametrize(
    "words", ["list", "show", "--help", "list model --json", "list --help", "env", "completion bash"]
)
def test_a_closed_pipe_is_no_error(words, tmp_path):
    """As behind ``ftrun list | head -1``; here the reader is gone before anything is written."""
    done = shell(f"{{ sleep 0.2; ftrun {words}; echo code $? >&2; }} | true", tmp_path)
    assert done.stderr == "code 0\n"


def test_the_first_line_of_a_pipe(tmp_path):
    done = shell("ftrun list | head -1; echo ${PIPESTATUS[0]}", tmp_path)
    assert done.stdout.splitlines()[0].startswith("stage")
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


def test_exit_codes_and_streams_of_the_installed_command(tmp_path):
    for command, code in [("ftrun --version", 0), ("ftrun check model=tiny", 0), ("ftrun check model=tny", 2),
                          ("ftrun nothing", 2), ("python -m ftrun show seed=many", 2)]:  # fmt: skip
        done = shell(command, tmp_path)
        assert done.returncode == code, done.stderr
        assert bool(done.stderr) == bool(code), "problems go to stderr"
        assert bool(done.stdout) != bool(code), "and nothing else to stdout"


def test_problems_have_no_colours_in_a_file(tmp_path):
    assert "\x1b" not in shell("TERM=xterm-256color ftrun check seed=many stage=nothing", tmp_path).stderr


def test_what_is_shown_is_not_wrapped_in_a_narrow_terminal(tmp_path):
    path = "a/" * 60 + "rows.jsonl"
    narrow = shell(f"COLUMNS=40 ftrun show data.path={path}", tmp_path)
    assert yaml.safe_load(narrow.stdout)["data"]["path"] == path
    assert f"there is no file {path}\n" in shell(f"COLUMNS=40 ftrun check data.path={path}", tmp_path).stderr


def test_resuming_a_run_with_a_damaged_result_says_so(driver, write):
    write("run/run.yaml", "schema_version: 1\n")
    write("run/result.json", '{"status": ')
    done = driver("resume", "run").sees(2)
    assert "run/result.json: cannot be read" in done.err
    assert "delete it" in done.err
