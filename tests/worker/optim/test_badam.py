"""A share of each weight's entries at a time, against the formulas and the package of BAdam's authors."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from ftrun.worker.optim.badam import Share
from ftrun.worker.optim.blocks import Mastered
from ftrun.worker.optim.ruled import Layerwise, Ruled

LR, EVERY = 1e-2, 4


class Net(nn.Module):
    """Matrices, wide and tall, between an embedding and a head, which the package leaves out."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 12)
        self.wide = nn.Linear(12, 30, bias=False)
        self.tall = nn.Linear(30, 12, bias=False)
        self.lm_head = nn.Linear(12, 10, bias=False)
        self.embed.requires_grad_(False)
        self.lm_head.requires_grad_(False)
        self.to(dtype)

    def forward(self, ids):
        return self.lm_head(self.tall(torch.tanh(self.wide(self.embed(ids)))))


def share(ratio=0.15, *, scattered=False, eps=1e-8):
    return Share(rule=Mastered(eps=eps), ratio=ratio, interval=lambda: EVERY, scattered=scattered, seed=5)


def optimizer_of(net, rule, decay=0.0):
    weights = [net.wide.weight, net.tall.weight]
    return Ruled([{"params": weights, "lr": LR, "weight_decay": decay, "rule": "share"}], {"share": rule})


def train(net, optimizer, steps, first=0):
    batches = torch.randint(0, 10, (100, 2, 6), generator=torch.Generator().manual_seed(1))
    for step in range(first, first + steps):
        ids, targets = batches[step]
        nn.functional.cross_entropy(net(ids), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(net):
    return [net.wide.weight, net.tall.weight]


def alike(one, other, within=1e-5):
    for a, b in zip(weights(one), weights(other), strict=True):
        assert float((a - b).detach().abs().max()) <= within


def test_steps_are_the_authors_packages():
    badam = pytest.importorskip("badam")
    ours, theirs = Net(torch.float64), Net(torch.float64)
    eps = 1e-14  # which it adds before it corrects the moments
    train(ours, optimizer_of(ours, share(eps=eps)), 50)
    package = badam.BlockOptimizerRatio(
        [{"params": weights(theirs)}],
        [*theirs.named_parameters()],
        update_ratio=0.15,
        switch_every=EVERY,
        lr=LR,
        eps=eps,
        include_embedding=True,
        include_lm_head=True,
    )
    train(theirs, package, 50)
    alike(ours, theirs)
    assert all(
        bool((now != before).any()) for now, before in zip(weights(ours), weights(Net(torch.float64)), strict=True)
    )


@pytest.mark.parametrize("scattered", [False, True])
def test_steps_are_adams_on_the_entries_whose_turn_it_is(scattered):
    ours, theirs, rule = Net(torch.float64), Net(torch.float64), share(scattered=scattered)
    train(ours, optimizer_of(ours, rule, decay=0.1), 50)

    class Masked:
        """Adam that keeps everything dense."""

        steps = 0

        @torch.no_grad()
        def step(self):
            turn, number = divmod(self.steps, EVERY)
            if number == 0:
                self.m, self.v = ([torch.zeros_like(w) for w in weights(theirs)] for _ in range(2))
            for weight, m, v in zip(weights(theirs), self.m, self.v, strict=True):
                mask = torch.zeros(weight.numel(), dtype=weight.dtype)
                mask[rule.places(weight, turn)] = 1
                mask = mask.view_as(weight)
                m.mul_(0.9).add_(0.1 * weight.grad)
                v.mul_(0.999).add_(0.001 * weight.grad**2)
                hat_m, hat_v = m / (1 - 0.9 ** (number + 1)), v / (1 - 0.999 ** (number + 1))
                weight -= mask * LR * (0.1 * weight + hat_m / (hat_v.sqrt() + 1e-8))
            self.steps += 1

        def zero_grad(self):
            theirs.zero_grad()

    train(theirs, Masked(), 50)
    alike(ours, theirs)


def test_may_be_updated_in_the_backward_pass():
    one, other = Net(), Net()
    optimizer = optimizer_of(one, share(), decay=0.1)
    optimizer.layerwise = Layerwise(optimizer, 0.0)
    train(one, optimizer, 3 * EVERY)
    train(other, optimizer_of(other, share(), decay=0.1), 3 * EVERY)
    alike(one, other, within=0)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("shape", [(12, 30), (7, 1), (1, 1), (64, 64)])
def test_a_round_reaches_every_entry(shape, scattered):
    weight, rule = torch.zeros(shape), share(0.25, scattered=scattered)
    count = max(1, int(weight.numel() * 0.25))
    turns = -(-weight.numel() // count)
    reached = torch.cat([rule.places(weight, turn) for turn in range(turns)])
    assert len(reached) == turns * count
    assert len(reached.unique()) == weight.numel()
    assert len(rule.places(weight, 3).unique()) == count


@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, 8), (torch.bfloat16, 12)])
def test_the_state_is_of_the_share_alone(dtype, each):
    net = Net(dtype)
    optimizer = optimizer_of(net, share())
    train(net, optimizer, EVERY + 1)
    for weight, state in optimizer.state.items():
        size = sum(value.nbytes for name, value in state.items() if name not in ("step", "steps"))
        assert size == each * int(0.15 * weight.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [1, EVERY, 2 * EVERY + 3])
def test_goes_on_bit_for_bit(at, dtype):
    net = Net(dtype)
    optimizer = optimizer_of(net, share(scattered=True), decay=0.1)
    train(net, optimizer, at)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(net, optimizer, 9, first=at)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Net(dtype)
    resumed = optimizer_of(again, share(scattered=True), decay=0.1)
    again.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 9, first=at)
    alike(net, again, within=0)


def test_without_a_rate_nothing_moves():
    net, before = Net(torch.bfloat16), Net(torch.bfloat16)
    optimizer = optimizer_of(net, share(), decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    train(net, optimizer, EVERY + 1)
    alike(net, before, within=0)
