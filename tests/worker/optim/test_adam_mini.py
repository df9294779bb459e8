"""Adam-mini's steps are those of its authors' package, and of the formulas; its blocks those that the paper names."""

from __future__ import annotations

import contextlib
import io
import math

import pytest
import torch
from torch import nn

from ftrun.worker.optim import adam_mini, ruled
from ftrun.worker.optim.adam_mini import COLUMN, ROW, WHOLE, AdamMini, Blocks
from ftrun.worker.optim.adamw import AdamW


def causal(family="llama", **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        **{"tie_word_embeddings": False, **more},
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def ours(model, lr=0.01, weight_decay=0.1):
    blocks = adam_mini.blocks(model)
    rules = {str(one): AdamMini(blocks=one) if one else AdamW() for one in blocks.values()}
    groups = [
        {
            "params": [weight],
            "lr": lr,
            "weight_decay": weight_decay if weight.ndim > 1 else 0.0,
            "rule": str(blocks[name]),
        }
        for name, weight in model.named_parameters()
    ]
    return ruled.Ruled(groups, rules)


def backward(model, number):
    ids = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(number))
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize(("family", "more"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {})])
def test_takes_the_steps_of_its_authors(family, more):
    from adam_mini import Adam_mini

    model, theirs = causal(family, **more), causal(family, **more)
    optimizer = ours(model)
    with contextlib.redirect_stdout(io.StringIO()):
        package = Adam_mini(
            theirs.named_parameters(), lr=0.01, weight_decay=0.1, dim=32, n_heads=4, n_kv_heads=2, verbose=False
        )
    for number in range(50):
        backward(model, number)
        # The same gradients for both: with its own, each step would magnify what rounding makes of the one before.
        for one, other in zip(model.parameters(), theirs.parameters(), strict=True):
            other.grad = one.grad.clone()
        optimizer.step()
        package.step()
        optimizer.zero_grad()
    for (name, one), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)


def plain(weight, grads, blocks_of, lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8):
    """The formulas, in float64, for lists of the elements that are blocks."""
    weight = weight.double().flatten()
    mean, squares = torch.zeros_like(weight), [0.0] * len(blocks_of)
    for step, grad in enumerate(grads, 1):
        flat = grad.double().flatten()
        mean = beta1 * mean + (1 - beta1) * flat
        weight = weight * (1 - lr * weight_decay)
        for number, block in enumerate(blocks_of):
            squares[number] = beta2 * squares[number] + (1 - beta2) * float((flat[block] ** 2).mean())
            size = math.sqrt(squares[number] / (1 - beta2**step)) + eps
            weight[block] -= lr * mean[block] / (1 - beta1**step) / size
    return weight


NUMBERS = torch.arange(12 * 10).reshape(12, 10)
EXPERTS = torch.arange(2 * 4 * 5).reshape(2, 4, 5)
CASES = {
    "whole": (WHOLE, NUMBERS, [NUMBERS]),
    "row": (ROW, NUMBERS, list(NUMBERS)),
    "column": (COLUMN, NUMBERS, list(NUMBERS.T)),
    "head": (Blocks(rows=4), NUMBERS, list(NUMBERS.split(4))),
    "experts": (ROW, EXPERTS, list(EXPERTS.flatten(0, 1))),
    "experts of columns": (COLUMN, EXPERTS, list(EXPERTS.mT.flatten(0, 1))),
    "norm": (WHOLE, NUMBERS[0], [NUMBERS[0]]),
}


@pytest.mark.parametrize("case", CASES)
def test_is_the_formulas(case):
    blocks, elements, blocks_of = CASES[case]
    torch.manual_seed(0)
    weight = torch.randn(elements.shape)
    sizes = torch.rand(elements.shape) * 3
    grads = [torch.randn(elements.shape) * sizes for _ in range(50)]
    expected = plain(weight, grads, [block.flatten() for block in blocks_of])
    rule = AdamMini(beta2=0.99, blocks=blocks)
    state = rule.start(weight)
    for grad in grads:
        rule.update([weight], [grad.clone()], [state], lr=0.01, weight_decay=0.1)
    torch.testing.assert_close(weight.double().flatten(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_a_first_moment_and_a_number_for_each_block(dtype):
    for blocks, elements, blocks_of in CASES.values():
        weight = torch.zeros(elements.shape, dtype=dtype)
        kept = AdamMini(blocks=blocks).start(weight)
        assert kept["exp_avg"].nbytes + kept["exp_avg_sq"].nbytes == weight.nbytes + 4 * len(blocks_of)
        assert not kept["exp_avg_sq"].any()


def test_in_bfloat16_second_moments_still_move():
    weight = torch.zeros(4, 8, dtype=torch.bfloat16)
    rule = AdamMini(blocks=ROW)
    state = rule.start(weight)
    for _ in range(2000):
        rule.update([weight], [torch.ones_like(weight)], [state], lr=0.0, weight_decay=0.0)
    torch.testing.assert_close(state["exp_avg_sq"], torch.full((4, 1, 1), 1 - 0.999**2000), rtol=1e-3, atol=0)


def test_a_rate_of_zero_leaves_a_weight_alone():
    weight = torch.ones(4, 8)
    rule = AdamMini(blocks=ROW)
    rule.update([weight], [torch.ones(4, 8)], [rule.start(weight)], lr=0.0, weight_decay=0.5)
    assert torch.equal(weight, torch.ones(4, 8))


def test_weights_of_one_group_may_have_taken_other_numbers_of_steps():
    torch.manual_seed(0)
    rule, grad = AdamMini(blocks=ROW), torch.randn(4, 8)
    weights = [torch.ones(4, 8), torch.ones(4, 8)]
    states = [rule.start(weight) for weight in weights]
    rule.update(weights[:1], [grad.clone()], states[:1], lr=0.1, weight_decay=0.0)
    rule.update(weights, [grad.clone(), grad.clone()], states, lr=0.1, weight_decay=0.0)
    alone, state = torch.ones(4, 8), rule.start(weights[0])
    rule.update([alone], [grad.clone()], [state], lr=0.1, weight_decay=0.0)
    assert torch.equal(weights[1], alone)
    assert [state["step"] for state in states] == [2, 1]


def found(model):
    return {name.removeprefix("model.layers.0."): blocks for name, blocks in adam_mini.blocks(model).items()}


def test_blocks_of_a_llama():
    blocks = found(causal(head_dim=16))  # which is not hidden_size / num_attention_heads
    assert blocks["self_attn.q_proj.weight"] == blocks["self_attn.k_proj.weight"] == Blocks(rows=16)
    rows = {"self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert all(blocks[f"{name}.weight"] == ROW for name in rows)
    assert blocks["model.embed_tokens.weight"] == blocks["lm_head.weight"] == ROW
    assert blocks["input_layernorm.weight"] == blocks["model.norm.weight"] == WHOLE


def test_biases_are_left_to_adam():
    blocks = found(causal("qwen2"))
    assert blocks["self_attn.q_proj.bias"] is None
    assert blocks["self_attn.q_proj.weight"] == Blocks(rows=8)


def test_a_matrix_with_its_outputs_in_columns():
    from transformers import GPT2Config, GPT2LMHeadModel

    blocks = adam_mini.blocks(
        GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=1, n_head=4))
    )
    layer = "transformer.h.0"
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert all(
        blocks[f"{layer}.{name}.weight"] == COLUMN and blocks[f"{layer}.{name}.bias"] is None for name in matrices
    )
    assert blocks["transformer.wte.weight"] == blocks["transformer.wpe.weight"] == ROW
    assert blocks[f"{layer}.ln_1.weight"] == WHOLE


@pytest.mark.parametrize(("family", "outputs"), [("mixtral", ROW), ("gpt_oss", COLUMN)])
def test_experts(family, outputs):
    blocks = found(causal(family, num_local_experts=4, head_dim=8))
    assert {blocks[f"mlp.experts.{name}_proj"] for name in ("gate_up", "down")} == {outputs}


def test_factors():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(causal(), LoraConfig(r=8, target_modules=["q_proj", "v_proj", "embed_tokens"]))
    blocks = adam_mini.blocks(model)
    layer = "base_model.model.model.layers.0.self_attn"
    assert blocks[f"{layer}.q_proj.lora_A.default.weight"] == ROW
    assert blocks[f"{layer}.q_proj.lora_B.default.weight"] == Blocks(rows=8)
    assert blocks[f"{layer}.v_proj.lora_B.default.weight"] == ROW
    table = "base_model.model.model.embed_tokens"
    assert blocks[f"{table}.lora_embedding_A.default"] == COLUMN  # the token's
    assert blocks[f"{table}.lora_embedding_B.default"] == ROW
    assert len(blocks) == len([weight for weight in model.parameters() if weight.requires_grad])


def test_other_modules_are_by_output():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head_dim = 8
            self.qkv_proj, self.q_proj = nn.Linear(32, 96), nn.Linear(32, 36)

    blocks = adam_mini.blocks(Attention())
    assert blocks["qkv_proj.weight"] == ROW
    assert blocks["q_proj.weight"] == ROW  # no whole number of heads
