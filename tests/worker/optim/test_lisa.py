"""A few layers at a time, and always what is outside of them, against a plain computation."""

from __future__ import annotations

import torch

from ftrun.worker.optim import blocks
from tests.worker.optim.test_blocks import EVERY, alike, groups, in_turns, llama, train

DRAWN = blocks.drawn(3, 2, seed=0)


def test_layers_are_drawn_and_the_rest_always_trains():
    ours, theirs = llama(torch.float64), llama(torch.float64)
    train(ours, in_turns(ours, DRAWN, made=blocks.of_layers(ours)), 20)

    # One AdamW for what is outside of the layers, and a new one for the layers of each period.
    layers = [*blocks.of_layers(theirs).values()]
    inside = {id(weight) for layer in layers for weight in layer}

    def adamw(wanted):
        return torch.optim.AdamW(
            [group | {"params": [w for w in group["params"] if wanted(w)]} for group in groups(theirs)]
        )

    outside, of_period = adamw(lambda weight: id(weight) not in inside), None

    class Both:
        def __init__(self):
            self.param_groups = [{"lr": 0.0}]

        def step(self):
            for optimizer in (outside, of_period):
                for group in optimizer.param_groups:
                    group["lr"] = self.param_groups[0]["lr"]
                optimizer.step()

        def zero_grad(self):
            theirs.zero_grad()

    both = Both()
    for step in range(20):
        if step % EVERY == 0:
            active = {id(weight) for number in DRAWN(step // EVERY) for weight in layers[number]}
            of_period = adamw(lambda weight, active=active: id(weight) in active)
        train(theirs, both, 1, first=step)
    alike(ours, theirs)


def test_layers_that_are_left_lose_their_state_and_the_rest_keeps_its_own():
    model = llama()
    layers = [*blocks.of_layers(model).values()]
    optimizer = in_turns(model, DRAWN, made=blocks.of_layers(model))
    train(model, optimizer, EVERY + 1)
    active = {id(weight) for number in DRAWN(1) for weight in layers[number]}
    inside = {id(weight) for layer in layers for weight in layer}
    for weight in model.parameters():
        kept = weight in optimizer.state
        assert kept == (id(weight) in active or id(weight) not in inside)
        if kept:
            assert optimizer.state[weight]["step"] == (1 if id(weight) in active else EVERY + 1)
