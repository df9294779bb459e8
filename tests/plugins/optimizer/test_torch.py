"""optimizer=torch: somebody else's class, given our groups; and what is refused of it."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ftrun.config import compose
from ftrun.errors import ConfigError, RunFailed
from ftrun_plugins.optimizer.torch import Torch


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 9)

    def give_gradients(self, step: int) -> None:
        made = torch.Generator().manual_seed(step)
        for weight in self.parameters():
            weight.grad = torch.randn(weight.shape, generator=made).to(weight.dtype)


class Wide(torch.optim.Optimizer):
    """Keeps its state in float32, whatever the weights are in, and a note beside it."""

    def __init__(self, params: Any, lr: float = 0.1, note: Any = "fine") -> None:
        super().__init__(params, {"lr": lr, "note": note})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight, dtype=torch.float32))
                mean.lerp_(weight.grad.float(), 0.01)
                weight.sub_(group["lr"] * mean.to(weight.dtype))


def chosen(cls: str = "torch.optim.RAdam", **keys: Any) -> Torch:
    return Torch(cls=cls, **{"lr": 0.05, **keys})


def train(model: Small, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (1 + step)  # as a schedule does
        model.give_gradients(step)
        optimizer.step()


def test_it_takes_the_steps_of_the_class_and_vectors_do_not_decay():
    mine, theirs = Small(), Small()
    train(mine, chosen(args={"betas": [0.8, 0.9]}, weight_decay=0.2).build(mine, None), range(50))
    groups = [
        {"params": [theirs.linear.weight], "weight_decay": 0.2},
        {"params": [theirs.linear.bias], "weight_decay": 0},
    ]
    train(theirs, torch.optim.RAdam(groups, lr=0.05, betas=(0.8, 0.9)), range(50))
    assert torch.equal(mine.linear.weight, theirs.linear.weight)
    assert torch.equal(mine.linear.bias, theirs.linear.bias)


@pytest.mark.parametrize(
    ("cls", "keys", "said"),
    [
        ("torch.optim.Radam", {}, "has no optimizer Radam; did you mean RAdam"),
        ("torch.optimm.RAdam", {}, "torch.optimm cannot be imported: No module named 'torch.optimm'"),
        ("torch.nn.Linear", {}, "torch.nn has no optimizer Linear"),
        ("torch.optim.RAdam", {"args": {"beta": [0.9, 0.99]}}, "RAdam has no such argument; did you mean betas?"),
        ("torch.optim.RAdam", {"args": {"betas": [0.9, 1.99]}}, "RAdam refuses: Invalid beta parameter"),
        ("torch.optim.RAdam", {"args": {"eps": "small"}}, "RAdam refuses: "),
        ("torch.optim.Rprop", {"weight_decay": 0.1}, "Rprop has none"),
        ("torch.optim.LBFGS", {}, "wants to compute a step's loss itself"),
        ("torch.optim.Muon", {}, "Muon refuses: Muon only supports 2D parameters"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(cls, keys, said):
    with pytest.raises(ConfigError) as refused:
        chosen(cls, **keys).build(Small(), None)
    assert said in str(refused.value)


def test_what_evaluates_other_weights_than_it_trains_is_refused(monkeypatch):
    class Averaging(Wide):
        def eval(self) -> None: ...

    monkeypatch.setitem(sys.modules, "averaging", SimpleNamespace(Averaging=Averaging))
    with pytest.raises(ConfigError, match="trains other weights than those that are to be evaluated"):
        chosen("averaging.Averaging").build(Small(), None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "optimizer.cls: has no value"),
        (["optimizer.cls=RAdam"], "'RAdam' does not say which module it is in"),
        (["optimizer.cls=torch.optim.SGD", "optimizer.args.lr=0.1"], "optimizer.args.lr: is said by a key"),
        (["optimizer.cls=torch.optim.SGD", "optimizer.args=[0.9]"], "optimizer.args: '[0.9]' is not a set of names"),
    ],
)
def test_what_can_be_seen_without_torch_is_refused_by_the_command(words, said):
    with pytest.raises(ConfigError) as refused:
        compose(["model=tiny", "optimizer=torch", *words])
    assert said in str(refused.value)


def test_arguments_are_typed_one_by_one_or_together():
    words = ["model=tiny", "optimizer=torch", "optimizer.cls=torch.optim.SGD"]
    one_by_one = compose([*words, "optimizer.args.momentum=0.9", "optimizer.args.nesterov=true"])
    together = compose([*words, "optimizer.args={momentum: 0.9, nesterov: true}"])
    assert one_by_one.optimizer == together.optimizer
    assert together.optimizer.args == {"momentum": 0.9, "nesterov": True}


def test_a_state_is_loaded_in_the_types_that_it_had():
    def made(model: Small) -> torch.optim.Optimizer:
        groups = [{"params": list(model.parameters()), "lr": 0.05, "weight_decay": 0.0}]
        return chosen().made(Wide, groups, {})

    whole, first, second = (Small().bfloat16() for _ in range(3))
    train(whole, made(whole), range(7))
    stopped, resumed = made(first), made(second)
    train(first, stopped, range(3))
    second.load_state_dict(first.state_dict())
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(state["mean"].dtype == torch.float32 for state in resumed.state.values())
    train(second, resumed, range(3, 7))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("note", "fits"), [("fine", True), ([1, None, {"a": 2.0}], True), (Small(), False)])
def test_a_state_that_no_checkpoint_could_give_back_ends_the_run_after_its_first_step(note, fits):
    model = Small()
    optimizer = Wide(model.parameters(), note=note)
    (watch,) = chosen().callbacks(model, None)  # type: ignore[arg-type]
    watch.on_step_end(optimizer=optimizer)  # a step that was skipped
    train(model, optimizer, range(1))
    if fits:
        watch.on_step_end(optimizer=optimizer)
    else:
        with pytest.raises(RunFailed, match=r"Wide keeps a .*test_torch\.Small in its state"):
            watch.on_step_end(optimizer=optimizer)


def test_a_run_trains_with_it_and_one_with_a_wrong_name_says_so(ftrun):
    small = ("model=tiny", "hardware=cpu", "adapter=full", "train.max_steps=10", "train.log_every=1")
    chosen = (*small, "optimizer=torch", "optimizer.lr=1e-2", "optimizer.args.eps=1e-6")
    done = ftrun(*chosen, "optimizer.cls=torch.optim.NAdam").sees(0)
    assert done.losses[-1] < 0.85 * done.losses[0]
    wrong = ftrun(*chosen, "optimizer.cls=torch.optim.NAdm")
    assert wrong.code != 0
    assert "has no optimizer NAdm; did you mean NAdam" in wrong.err + wrong.out
