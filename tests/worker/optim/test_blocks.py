"""Blocks that take turns, against the paper's formulas and its authors' package, step by step."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ftrun.worker.optim import blocks
from ftrun.worker.optim.ruled import Layerwise

LR, DECAY, EVERY = 1e-3, 0.1, 3


def llama(dtype=torch.float32, **changed):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "initializer_range": 0.2,  # or many gradients would be next to nothing, and Adam's first steps go by their sign
    }
    config = LlamaConfig(**shape | {"num_key_value_heads": 2, "tie_word_embeddings": False} | changed)
    return LlamaForCausalLM(config).to(dtype)


def groups(model, decay=DECAY):
    """Two groups, as every optimizer has them."""
    weights = [*model.parameters()]
    split = [([w for w in weights if w.ndim >= 2], decay), ([w for w in weights if w.ndim < 2], 0.0)]
    return [{"params": params, "lr": LR, "weight_decay": wd, "rule": "adamw"} for params, wd in split]


def in_turns(model, turns, *, made=None):
    made = blocks.of_everything(model, split=False) if made is None else made
    return blocks.InTurns(groups(model), {"adamw": blocks.Mastered()}, [*made.values()], turns, lambda: EVERY)


def train(model, optimizer, steps, first=0, seen=lambda: None):
    """Go through drawn batches, at rates that fall."""
    draws = torch.Generator().manual_seed(1)
    batches = torch.randint(0, 40, (100, 2, 8), generator=draws)
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / 100)
        model(input_ids=batches[step], labels=batches[step]).loss.backward()
        seen()
        optimizer.step()
        optimizer.zero_grad()


def alike(one, other, within=1e-5):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert float((a - b).detach().abs().max()) <= within, name


# Which blocks there are


def test_blocks_are_the_embeddings_the_layers_and_the_head():
    model = llama()
    names = dict(model.named_parameters())
    made = blocks.of_everything(model, split=False)
    assert [*made] == ["embeddings", "model.layers.0", "model.layers.1", "model.layers.2", "head"]
    assert {id(weight) for block in made.values() for weight in block} == {id(weight) for weight in names.values()}
    assert made["model.layers.2"][-1] is names["model.norm.weight"]
    assert sum(len(block) for block in made.values()) == len(names)


def test_layers_are_split_into_parts_with_matrices():
    model = llama(num_hidden_layers=1)
    made = blocks.of_everything(model, split=True)
    assert [*made] == ["embeddings", "model.layers.0.self_attn", "model.layers.0.mlp", "head"]
    assert len(made["model.layers.0.mlp"]) == 3 + 3  # the layer's two norms, and the last one


def test_a_tied_head_is_among_the_embeddings_and_what_comes_first_goes_with_the_first_block():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8))
    assert [*blocks.of_everything(model, split=False)] == ["embeddings", "transformer.h.0", "transformer.h.1"]
    for weight in blocks.of_everything(model, split=False)["embeddings"]:
        weight.requires_grad_(False)
    made = blocks.of_everything(model, split=True)
    assert [*made] == [f"transformer.h.{n}.{part}" for n in (0, 1) for part in ("attn", "mlp")]
    assert made["transformer.h.0.attn"][0] is model.transformer.h[0].ln_1.weight


def test_weights_that_do_not_train_are_in_no_block():
    model = llama()
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    assert [*blocks.of_everything(model, split=False)] == ["model.layers.1"]
    assert [*blocks.of_layers(model)] == ["model.layers.1"]


# Whose turn it is


def test_turns():
    def first(turns, periods):
        return [number for period in range(periods) for number in turns(period)]

    assert first(blocks.one_after_another(3, start=1, stride=1), 5) == [1, 2, 0, 1, 2]
    assert first(blocks.one_after_another(3, start=0, stride=-1), 5) == [0, 2, 1, 0, 2]
    assert first(blocks.one_after_another(3, start=2, stride=0), 3) == [2, 2, 2]
    order = first(blocks.shuffled(5, seed=7), 15)
    assert all(sorted(order[start : start + 5]) == [0, 1, 2, 3, 4] for start in (0, 5, 10))
    assert len({tuple(order[start : start + 5]) for start in (0, 5, 10)}) > 1
    assert order == first(blocks.shuffled(5, seed=7), 15) != first(blocks.shuffled(5, seed=8), 15)
    drawn = [blocks.drawn(6, 2, seed=0)(period) for period in range(20)]
    assert all(len(set(one)) == 2 for one in drawn)
    assert set(itertools.chain(*drawn)) == {0, 1, 2, 3, 4, 5}


# Its steps


def by_the_paper(model, made, order, steps):
    """Adam on one block after another, each from moments of zero."""
    draws = torch.Generator().manual_seed(1)
    batches = torch.randint(0, 40, (100, 2, 8), generator=draws)
    for step in range(steps):
        turn, number = divmod(step, EVERY)
        block = made[order(turn)]
        if number == 0:
            first, second = [torch.zeros_like(w) for w in block], [torch.zeros_like(w) for w in block]
        grads = torch.autograd.grad(model(input_ids=batches[step], labels=batches[step]).loss, block)
        with torch.no_grad():
            rate = LR * (1 - step / 100)
            for weight, grad, m, v in zip(block, grads, first, second, strict=True):
                m.copy_(0.9 * m + 0.1 * grad)
                v.copy_(0.999 * v + 0.001 * grad**2)
                hat_m, hat_v = m / (1 - 0.9 ** (number + 1)), v / (1 - 0.999 ** (number + 1))
                weight *= 1 - rate * (DECAY if weight.ndim >= 2 else 0)
                weight -= rate * hat_m / (hat_v.sqrt() + 1e-8)


ORDERS = {
    "ascending": blocks.one_after_another(5, start=0, stride=1),
    "descending": blocks.one_after_another(5, start=4, stride=-1),
    "fixed": blocks.one_after_another(5, start=2, stride=0),
    "random": blocks.shuffled(5, seed=3),
}


@pytest.mark.parametrize("order", ORDERS)
def test_steps_are_the_papers(order):
    ours, theirs = llama(torch.float64), llama(torch.float64)
    train(ours, in_turns(ours, ORDERS[order]), 50)
    made = [*blocks.of_everything(theirs, split=False).values()]
    by_the_paper(theirs, made, lambda turn: next(iter(ORDERS[order](turn))), 50)
    alike(ours, theirs)


def test_may_be_updated_in_the_backward_pass():
    one, other = llama(), llama()
    optimizer = in_turns(one, ORDERS["random"])
    optimizer.layerwise = Layerwise(optimizer, 0.0)
    train(one, optimizer, 5 * EVERY)
    train(other, in_turns(other, ORDERS["random"]), 5 * EVERY)
    alike(one, other, within=0)


@pytest.mark.parametrize(("order", "dtype"), [*((one, torch.float32) for one in ORDERS), ("random", torch.bfloat16)])
def test_steps_are_the_authors_packages(order, dtype, monkeypatch):
    badam = pytest.importorskip("badam")
    ours, theirs = llama(dtype), llama(dtype)
    train(ours, in_turns(ours, ORDERS[order]), 50)

    rounds = itertools.count()

    def drawn(count):
        """The order of a round, which it takes from the end."""
        first = count * next(rounds)
        return torch.tensor([ORDERS["random"](turn)[0] for turn in range(first, first + count)][::-1])

    monkeypatch.setattr(torch, "randperm", drawn)
    monkeypatch.setattr("gc.collect", lambda: 0)  # which it calls at every switch, and takes the test's time
    base = torch.optim.AdamW(groups(theirs), lr=LR)
    prefixes = [["embed_tokens."], ["layers.0."], ["layers.1."], ["layers.2.", "model.norm."], ["lm_head."]]
    package = badam.BlockOptimizer(
        base_optimizer=base,
        named_parameters_list=[*theirs.named_parameters()],
        block_prefix_list=prefixes,
        switch_block_every=EVERY,
        switch_mode=order,
        start_block=2 if order == "fixed" else None,
    )
    package.global_step = -1  # or the first block would have a step less than the others

    def decay_as_told():
        """AdamW's default decay, of vectors too, would stand in place of what it was given."""
        for group in base.param_groups:
            group["weight_decay"] = 0.0
            for weight in group["params"]:
                if weight.ndim >= 2:
                    weight.data.mul_(1 - package.param_groups[0]["lr"] * DECAY)

    train(theirs, package, 50, seen=decay_as_told)
    alike(ours, theirs)


# What is kept


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_block_whose_turn_it_is_has_gradients_and_a_state(checkpointing):
    model = llama()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    made = [*blocks.of_everything(model, split=False).values()]
    optimizer = in_turns(model, ORDERS["random"])
    optimizer.begin()
    step = itertools.count()

    def look():
        (active,) = ORDERS["random"](next(step) // EVERY)
        with_gradient = {id(weight) for weight in model.parameters() if weight.grad is not None}
        assert with_gradient == {id(weight) for weight in made[active]}
        assert {id(weight) for weight in optimizer.state} <= with_gradient

    train(model, optimizer, 4 * EVERY + 1, seen=look)
    assert len(optimizer.state) == len(made[ORDERS["random"](4)[0]])


@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, 8), (torch.bfloat16, 12)])
def test_the_state_is_two_moments_of_the_block_and_a_copy_of_what_is_rounded(dtype, each):
    model = llama(dtype)
    optimizer = in_turns(model, ORDERS["ascending"])
    for block in blocks.of_everything(model, split=False).values():
        train(model, optimizer, 1)
        tensors = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
        assert sum(tensor.nbytes for tensor in tensors) == each * sum(weight.numel() for weight in block)
        train(model, optimizer, EVERY - 1)


def test_without_a_rate_nothing_moves():
    for dtype in (torch.float32, torch.bfloat16):
        model = llama(dtype)
        before = copy.deepcopy(model)
        optimizer = in_turns(model, ORDERS["random"])
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for _ in range(2 * EVERY):
            model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
            optimizer.step()
        alike(model, before, within=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [1, EVERY, EVERY + 2, 5 * EVERY, 7 * EVERY - 1])
def test_goes_on_bit_for_bit(at, dtype):
    model = llama(dtype)
    optimizer = in_turns(model, ORDERS["random"])
    train(model, optimizer, at)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 9, first=at)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = llama(dtype)
    resumed = in_turns(again, ORDERS["random"])
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    (active,) = ORDERS["random"](at // EVERY)
    made = [*blocks.of_everything(llama(dtype), split=False).values()]
    assert sum(weight.requires_grad for weight in again.parameters()) == len(made[active])
    train(again, resumed, 9, first=at)
    alike(model, again, within=0)
    assert resumed.steps == at + 9
