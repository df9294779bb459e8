"""What every plugin owes, as test suites to inherit: a plugin's own tests add its mathematics.

    from ftrun.conformance import OptimizerSuite

    class TestFoo(OptimizerSuite):
        option = "foo"

pytest then checks that the option keeps its group's protocol: it composes, imports nothing heavy, survives being saved
and read back, and does its group's work on a small model. ftrun's own options are checked by the same suites.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import math
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

import ftrun
from ftrun import config, fields, launch, plugin, record
from ftrun.completions import Completion
from ftrun.config import Config
from ftrun.data import formats
from ftrun.data.rows import BadRow, Row
from ftrun.errors import ConfigError
from ftrun.plugin import Plugin

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from ftrun.worker.training import Run

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "pandas", "pyarrow")
"""Packages that importing a plugin must not bring into the driver."""

SMALL = ("model=tiny", "hardware=cpu", "train.micro_batch_size=4", "train.log_every=1")


class PluginSuite:
    """What an option of any group owes."""

    group: ClassVar[str]
    option: ClassVar[str]
    """The option's name."""

    overrides: ClassVar[tuple[str, ...]] = ()
    """What the option needs besides being chosen, as it would be typed."""

    @property
    def cls(self) -> type[Plugin]:
        """The plugin's class."""
        return plugin.get(self.group, self.option)

    @property
    def words(self) -> list[str]:
        """A small run with this option, as it would be typed."""
        return [*SMALL, f"{self.group}={self.option}", *self.overrides]

    def test_is_a_dataclass_that_needs_no_value(self) -> None:
        """Every field has a default, so that choosing the option is enough."""
        unset = [
            f.name
            for f in dataclasses.fields(self.cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        assert not unset
        assert self.cls.name == self.option

    def test_the_file_bears_its_name(self) -> None:
        """An option is found by its file's name."""
        assert self.cls.__module__.rpartition(".")[2] == self.option or plugin.NAMESPACE not in self.cls.__module__

    def test_says_what_it_is(self) -> None:
        """The class and each of its fields have a docstring: they are the help and the reference."""
        assert fields.summary(inspect.getdoc(self.cls))
        undocumented = {f.name for f in dataclasses.fields(self.cls)} - set(fields.docs(self.cls))
        assert undocumented <= {"name"}

    def test_does_its_groups_work(self) -> None:
        """The group's verb is implemented."""
        verb = plugin.VERBS[self.group]
        base = plugin.GROUPS[self.group]
        assert self.group == "tracker" or getattr(self.cls, verb) is not getattr(base, verb)

    def test_importing_it_is_light(self) -> None:
        """The driver imports a chosen plugin; torch and friends belong inside its methods."""
        code = f"import sys; from ftrun import plugin; plugin.get({self.group!r}, {self.option!r})\n"
        code += f"print(*[name for name in {HEAVY} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == []

    def test_survives_being_frozen(self, tmp_path: Path) -> None:
        """What a worker reads is what was composed."""
        self._needs_its_packages()
        cfg = config.compose(self.words)
        cfg.save(tmp_path / record.RUN)
        assert Config.load(tmp_path / record.RUN) == cfg

    def _needs_its_packages(self) -> None:
        for distribution in self.cls.requires:
            if not plugin.is_installed(distribution):
                pytest.skip(f"{distribution} is not installed")


class OptimizerSuite(PluginSuite):
    """What an optimizer owes."""

    group = "optimizer"
    lr: ClassVar[float] = 1e-2
    """A learning rate at which fifty steps visibly lower the loss of a small model."""

    adapter: ClassVar[str] = "full"
    """One that it works with."""

    some_weights: ClassVar[str] = "layers.0"
    """A pattern that is found in the names of some of the weights that train."""

    others: ClassVar[dict[str, list[Any]]] = {}
    """Other values of its keys, of which each changes ten steps; for what is no number, switch or choice, or needs more
    than to be doubled or halved."""

    def test_lowers_the_loss(self, tmp_path: Path) -> None:
        """Fifty steps on the same rows."""
        model, run, optimizer = self._made(tmp_path)
        losses = _steps(model, run, optimizer, 50)
        assert all(math.isfinite(loss) for loss in losses)
        assert losses[-1] < 0.7 * losses[0]

    def test_follows_the_schedule(self, tmp_path: Path) -> None:
        """A learning rate of zero, set from outside as a schedule does, leaves every weight alone."""
        model, run, optimizer = self._made(tmp_path)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        _steps(model, run, optimizer, 2)
        assert _same(model.state_dict(), before)

    def test_decays_matrices_and_nothing_else(self, tmp_path: Path) -> None:
        """Weight decay alone, without a gradient, shrinks matrices and leaves norms and biases alone."""
        model, run, _ = self._made(tmp_path)
        optimizer = self._optimizer(run, model, weight_decay=0.5)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0
        optimizer.step()
        for name, weight in model.named_parameters():
            if not weight.requires_grad or weight.ndim < 2:
                assert bool((weight == before[name]).all()), name
            else:
                assert bool((weight.abs() <= before[name].abs()).all()), name
                assert float(weight.detach().norm()) < float(before[name].norm()) or not before[name].any(), name

    @pytest.mark.parametrize("words", [(), ("model.dtype=bfloat16", "train.precision=bf16"), ("adapter=lora",)])
    def test_resumes_bit_for_bit(self, words: tuple[str, ...], tmp_path: Path) -> None:
        """Five steps, save, load, five steps: the same as ten; the state loads with ``weights_only``."""
        import torch

        model, run, optimizer = self._made(tmp_path, *words)
        _steps(model, run, optimizer, 5)
        saved = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        _steps(model, run, optimizer, 5, first=5)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        again = self._model(run)
        resumed = self._optimizer(run, again)
        again.load_state_dict(state["model"])
        resumed.load_state_dict(state["optimizer"])
        _steps(again, run, resumed, 5, first=5)
        assert _equal(model, again)

    def test_every_key_does_something(self, tmp_path: Path) -> None:
        """Another value of any key gives other weights after ten steps, or is refused."""
        run = self._run(tmp_path)
        usual, idle = self._weights_after(run, {}), []
        for key in dataclasses.fields(self.cls):
            for value in self._others(key, getattr(run.cfg.optimizer, key.name)):
                changed = {key.name: value}
                if not self._refused(run, changed) and _same(self._weights_after(run, changed), usual):
                    idle.append(f"{key.name}={value}")
        assert not idle, idle

    def test_takes_the_same_steps_in_the_backward_pass(self, tmp_path: Path) -> None:
        """With ``layerwise`` no gradient is left after the backward pass, and the steps are the same."""
        if "layerwise" not in self.cls.__dataclass_fields__:
            pytest.skip(f"{self.option} has no key layerwise")
        run = self._run(tmp_path, "train.max_grad_norm=0")
        assert _same(self._weights_after(run, {"layerwise": True}), self._weights_after(run, {}))
        model = self._model(run)
        self._optimizer(run, model, layerwise=True)
        model(**run.batches(1)[0]).loss.backward()
        assert all(weight.grad is None for weight in model.parameters())

    def _others(self, key: dataclasses.Field[Any], value: Any) -> list[Any]:
        """Return other values of a key, of which each must make a difference."""
        from ftrun.plugin import WeightGroup

        known: dict[str, list[Any]] = {
            "name": [],
            "layerwise": [],
            "embedding_lr": [self.lr / 2],
            "groups": [[WeightGroup(weights=self.some_weights, lr_scale=0.5)]],
            "eps": [1e-2],
            **self.others,
        }
        if key.name in known:
            return known[key.name]
        if isinstance(value, bool):
            return [not value]
        if isinstance(value, Enum):
            return [other for other in type(value) if other is not value]
        if isinstance(value, int | float):
            return [type(value)(value * 2) if value >= 1 else value / 2 or 0.5]
        raise AssertionError(f"another value of {key.name} must be named in `others`")

    def _refused(self, run: Run, changed: dict[str, Any]) -> bool:
        cfg = copy.deepcopy(run.cfg)
        cfg.optimizer = dataclasses.replace(cfg.optimizer, **changed)
        try:
            cfg.optimizer.settle(cfg)
        except ConfigError:
            return True
        return bool([*cfg.optimizer.check(cfg), *fields.out_of_range(cfg.optimizer)])

    def _weights_after(self, run: Run, changed: dict[str, Any]) -> dict[str, torch.Tensor]:
        model = self._model(run)
        _steps(model, run, self._optimizer(run, model, **changed), 10)
        return model.state_dict()

    def _run(self, folder: Path, *words: str) -> Run:
        """Return a small run, unless the option does not go with the words, or its packages are missing."""
        self._needs_its_packages()
        typed = [*self.words, f"adapter={self.adapter}", f"optimizer.lr={self.lr}", *words]
        if words and (problems := config.examine(typed)[1]):
            pytest.skip(str(problems[0]))
        return _small_run(folder, typed)

    def _model(self, run: Run) -> nn.Module:
        return run.cfg.adapter.apply(_small_model(run), run)

    def _made(self, folder: Path, *words: str) -> tuple[nn.Module, Run, torch.optim.Optimizer]:
        run = self._run(folder, *words)
        model = self._model(run)
        return model, run, self._optimizer(run, model)

    def _optimizer(self, run: Run, model: nn.Module, **changed: Any) -> torch.optim.Optimizer:
        return dataclasses.replace(run.cfg.optimizer, **changed).build(model, run)


class AdapterSuite(PluginSuite):
    """What an adapter owes."""

    group = "adapter"

    def test_changes_nothing_before_training(self, tmp_path: Path) -> None:
        """The same logits as without it."""
        run = self._run(tmp_path)
        model, batch = _small_model(run), run.batches(1)[0]
        before = _logits(model, batch)
        adapted = run.cfg.adapter.apply(model, run)
        assert float((_logits(adapted, batch) - before).abs().max()) < 1e-4

    def test_exactly_what_trains_moves(self, tmp_path: Path) -> None:
        """After a few steps every weight with ``requires_grad`` has moved, and no other one has."""
        run = self._run(tmp_path)
        model = run.cfg.adapter.apply(_small_model(run), run)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        optimizer = run.cfg.optimizer.build(model, run)
        _steps(model, run, optimizer, 3)
        moved = {name for name, weight in model.named_parameters() if bool((weight != before[name]).any())}
        assert moved == {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert moved

    def test_what_it_saves_loads_on_the_model_it_started_from(self, tmp_path: Path) -> None:
        """A run ends; the next one that starts from it has the same logits."""
        from ftrun.model import Source
        from ftrun.worker import loading

        run = self._run(tmp_path)
        model = run.cfg.adapter.apply(_small_model(run), run)
        _steps(model, run, run.cfg.optimizer.build(model, run), 3)
        batch = run.batches(1)[0]
        trained = _logits(model, batch)
        run.cfg.adapter.save(model, run.folder / record.MODEL, run)
        run.tokenizer.save_pretrained(run.folder / record.MODEL)
        after = copy.deepcopy(run.cfg)
        after.model.path, after.model.source = str(run.folder), Source.run
        loaded = loading.model(after, loading.tokenizer(after))
        assert float((_logits(loaded, batch) - trained).abs().max()) < 1e-4

    def _run(self, folder: Path) -> Run:
        self._needs_its_packages()
        return _small_run(folder, [*self.words, "optimizer.lr=1e-2"])


class QuantSuite(PluginSuite):
    """What a way of storing weights owes."""

    group = "quant"

    def test_a_model_loads_with_it(self, tmp_path: Path) -> None:
        """``from_pretrained`` takes its arguments."""
        self._needs_its_packages()
        run = _small_run(tmp_path, self.words)
        assert _logits(_small_model(run), run.batches(1)[0]).isfinite().all()


class StageSuite(PluginSuite):
    """What a stage owes. Needs no network: it runs on the data set that the stage names."""

    group = "stage"

    def test_trains_through_the_command(self, tmp_path: Path) -> None:
        """Three steps and an evaluation give finite numbers, among them every metric the stage declares."""
        result = ftrun.run([*self.words, "train.max_steps=3", f"output_dir={tmp_path / 'run'}"])
        assert (result.status, result.step) == (record.Status.completed, 3)
        assert all(math.isfinite(value) for value in result.metrics.values())
        assert set(self.cls.metrics) <= set(result.metrics)  # type: ignore[attr-defined]
        assert result.objective is not None

    divisions: ClassVar[tuple[tuple[int, int], ...]] = ((8, 1), (4, 2), (1, 8))
    """Micro batch sizes and how many of them a step has, all of which shall come to the same."""

    def test_the_batch_can_be_divided(self, tmp_path: Path) -> None:
        """Eight rows at once, twice four, or eight times one: the same losses and gradients."""
        found = []
        for size, accumulation in self.divisions:
            folder = tmp_path / f"{size}x{accumulation}"
            batch = [f"train.micro_batch_size={size}", f"train.grad_accumulation={accumulation}"]
            # Every weight trains, so that every gradient counts; the last step of the epoch has four rows left.
            run = ["adapter=full", "data.rows=20", "train.max_steps=3", "optimizer.lr=1e-3", f"output_dir={folder}"]
            ftrun.run([*self.words, *batch, *run])
            lines = record.read_lines(folder / record.METRICS)
            found.append([(line["loss"], line["grad_norm"]) for line in lines if "loss" in line])
        for one in found[1:]:
            for ours, expected in zip(one, found[0], strict=True):
                assert ours == pytest.approx(expected, abs=1e-5, rel=1e-5)


class TrackerSuite(PluginSuite):
    """What a tracker owes."""

    group = "tracker"

    def test_a_run_ends_well_with_it(self, tmp_path: Path) -> None:
        """Telling somebody else changes nothing for the run."""
        self._needs_its_packages()
        result = ftrun.run([*self.words, "train.max_steps=2", f"output_dir={tmp_path / 'run'}"])
        assert result.status is record.Status.completed


class RewardSuite(PluginSuite):
    """What a reward owes. It runs with the first stage that has replies judged, on the data set of that stage."""

    group = "reward"

    replies: ClassVar[tuple[tuple[str, Any], ...]] = (("It is 4.", "4"), ("5", "4"), ("", "4"), ("Who knows?", None))
    """Replies with the answers of their rows, as the reward knows them: None for a row without one."""

    @property
    def words(self) -> list[str]:
        """A small run with this option, as it would be typed."""
        stages = ((name, plugin.get("stage", name)) for name in plugin.names("stage"))
        judging = (name for name, stage in stages if issubclass(stage, plugin.Stage) and stage.default_reward)
        if not (stage := next(judging, None)):
            pytest.skip("no stage here has replies judged")
        return [f"stage={stage}", *super().words]

    def test_judges_every_reply(self, tmp_path: Path) -> None:
        """One finite value each, or None; none for no replies."""
        reward, replies = self._prepared(tmp_path)
        values = reward.score(replies)
        assert len(values) == len(replies)
        assert all(value is None or math.isfinite(value) for value in values)
        assert list(reward.score([])) == []

    def test_judges_a_reply_by_itself(self, tmp_path: Path) -> None:
        """The same value alone, in another order, and a second time: batches and resuming must not change rewards."""
        reward, replies = self._prepared(tmp_path)
        values = list(reward.score(replies))
        alone = [value for reply in replies for value in reward.score([reply])]
        for again in (reward.score(replies), alone, list(reward.score(replies[::-1]))[::-1]):
            for value, other in zip(values, again, strict=True):
                assert value == other if value is None or other is None else value == pytest.approx(other, abs=1e-4)

    def _prepared(self, folder: Path) -> tuple[plugin.Reward, list[Completion]]:
        self._needs_its_packages()
        run = _small_run(folder, self.words)
        reward = run.cfg.reward[self.option]
        reward.prepare(run, run.cfg.adapter.apply(_small_model(run), run))
        return reward, [self._reply(run, text, answer) for text, answer in self.replies]

    def _reply(self, run: Run, text: str, answer: Any) -> Completion:
        prompt = [{"role": "user", "content": "How much is 2 and 2?"}]
        prompt_ids = run.tokenizer.encode("How much is 2 and 2?")
        ids = run.tokenizer.encode(text, add_special_tokens=False)
        return Completion(
            prompt=prompt, answer=answer, text=text, prompt_ids=prompt_ids, ids=[*ids, run.pad_id], finished=True
        )


class FormatSuite(PluginSuite):
    """What a format owes."""

    group = "format"
    kind: ClassVar[str] = "conversations"
    """The kind of rows it is for, one of `ftrun.data.formats.KINDS`."""

    rows: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Some rows that it reads: without them, what it makes of rows is not tested."""

    @property
    def words(self) -> list[str]:
        """A small run with this option, as it would be typed."""
        return [*SMALL, f"{plugin.KEYED[self.group][1]}={self.option}", *self.overrides]

    def test_does_its_groups_work(self) -> None:
        """It converts."""
        assert issubclass(self.cls, plugin.Format)
        assert self.cls.convert is not plugin.Format.convert

    def test_what_it_makes_of_a_row_is_read(self) -> None:
        """Its rows are in a layout that ftrun knows, and can be trained on."""
        for row in self._rows():
            assert formats.understand(Row(row, "rows.jsonl", 1), self.kind, self.option)

    def test_the_row_itself_is_left_as_it_was(self) -> None:
        """A row may be read again, by the preview or in the next epoch."""
        rows = self._rows()
        before = copy.deepcopy(rows)
        made = [self._made(row) for row in rows]
        assert rows == before
        assert [self._made(row) for row in rows] == made

    def test_a_row_of_other_columns_is_a_bad_one(self) -> None:
        """It must not be read as something else, but counted."""
        with pytest.raises(BadRow):
            formats.understand(Row({}, "rows.jsonl", 1), self.kind, self.option)

    def _rows(self) -> tuple[dict[str, Any], ...]:
        self._needs_its_packages()
        return self.rows or pytest.skip("the suite names no rows")

    def _made(self, row: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        converter = self.cls()
        assert isinstance(converter, plugin.Format)
        return converter.convert(row)


SUITES: dict[str, type[PluginSuite]] = {
    suite.group: suite
    for suite in (StageSuite, AdapterSuite, QuantSuite, OptimizerSuite, TrackerSuite, RewardSuite, FormatSuite)
}
"""The suite of each group."""


def _small_run(folder: Path, words: list[str]) -> Run:
    """Return what a plugin is told of its run, for a frozen config and real rows."""
    from ftrun.worker import dataset, loading, training

    overrides = [*words, f"output_dir={folder / 'run'}", "data.rows=16", "train.max_steps=20"]
    cfg = Config.load(launch.freeze(launch.check(overrides), overrides) / record.RUN)
    tokenizer = loading.tokenizer(cfg)
    return training.Run(cfg, dataset.load(cfg, tokenizer), tokenizer)


def _small_model(run: Run) -> PreTrainedModel:
    import transformers

    from ftrun.worker import loading

    transformers.set_seed(0)
    return loading.model(run.cfg, run.tokenizer)


def _logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def _steps(model: nn.Module, run: Run, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> list[float]:
    """Train on the run's rows, round and round; return the loss of each step."""
    batches = run.batches(4)
    losses = []
    model.train()
    for step in range(first, first + count):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _equal(one: nn.Module, other: nn.Module) -> bool:
    return _same(one.state_dict(), other.state_dict())


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(bool((weight == other[name]).all()) for name, weight in one.items())
