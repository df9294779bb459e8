"""What each weight is in the model, and the groups that keys make of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ftrun.errors import ConfigError
from ftrun.plugin import Optimizer, WeightGroup
from ftrun.worker import parameters
from ftrun.worker.parameters import Role


def config_of(family, **more):
    from transformers import AutoConfig

    return AutoConfig.for_model(
        family, vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        **{"tie_word_embeddings": False, **more},
    )  # fmt: skip


def causal(family="llama", **more):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config_of(family, **more))


def roles(model):
    """The names of the weights that train, by role, of the first layer only."""
    found = {role: set() for role in Role}
    for weight in parameters.weights(model):
        if "layers.1." not in weight.name:
            found[weight.role].add(weight.name.replace("layers.0", "N").removesuffix(".weight"))
    return found


MATRICES = {f"model.N.self_attn.{name}_proj" for name in "qkvo"} | {
    f"model.N.mlp.{x}_proj" for x in ("gate", "up", "down")
}
NORMS = {"model.N.input_layernorm", "model.N.post_attention_layernorm", "model.norm"}


def test_roles_in_a_llama():
    assert roles(causal()) == {
        Role.embedding: {"model.embed_tokens"},
        Role.head: {"lm_head"},
        Role.matrix: MATRICES,
        Role.other: NORMS,
    }


def test_a_head_that_is_the_embedding_is_an_embedding():
    found = roles(causal(tie_word_embeddings=True))
    assert (found[Role.embedding], found[Role.head]) == ({"model.embed_tokens"}, set())


def test_roles_of_what_conv1d_and_positions_are():
    from transformers import GPT2Config, GPT2LMHeadModel

    found = roles(GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=1, n_head=4)))
    assert found[Role.embedding] == {"transformer.wte", "transformer.wpe"}
    assert found[Role.matrix] == {
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert found[Role.head] == set()
    assert all("bias" in name or "ln_" in name for name in found[Role.other])


EXPERTS = {"model.N.mlp.experts.gate_up_proj", "model.N.mlp.experts.down_proj"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_roles_of_experts(family):
    model = causal(family, num_local_experts=4, moe_intermediate_size=16, num_experts_per_tok=2, num_experts=4)
    found = roles(model)
    router = "router" if family == "gpt_oss" else "gate"
    attention = {f"model.N.self_attn.{name}_proj" for name in "qkvo"}
    assert found[Role.matrix] == EXPERTS | attention | {f"model.N.mlp.{router}"}
    assert {weight.parameter.ndim for weight in parameters.weights(model) if "experts.down_proj" in weight.name} >= {3}
    for weight in parameters.weights(model):
        if "bias" in weight.name:  # of all experts in one table
            assert (weight.role, weight.decays) == (Role.other, False), weight.name


def test_roles_of_factors_and_of_modules_that_train_whole():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head", "embed_tokens"])
    found = roles(get_peft_model(causal(), config))
    front = "base_model.model."
    assert found[Role.embedding] == {f"{front}model.embed_tokens.modules_to_save.default"}
    assert found[Role.head] == {f"{front}lm_head.modules_to_save.default"}
    modules = ("self_attn.q_proj", "mlp.down_proj")
    assert found[Role.matrix] == {f"{front}model.N.{one}.lora_{ab}.default" for one in modules for ab in "AB"}
    assert found[Role.other] == set()


def test_roles_of_factors_of_the_head_and_the_embedding():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["lm_head", "embed_tokens"], use_dora=False)
    found = roles(get_peft_model(causal(), config))
    front = "base_model.model."
    assert found[Role.head] == {f"{front}lm_head.lora_{ab}.default" for ab in "AB"}
    assert found[Role.embedding] == {f"{front}model.embed_tokens.lora_embedding_{ab}.default" for ab in "AB"}


@pytest.mark.parametrize("wrapped", [False, True])
def test_roles_in_a_model_that_scores(wrapped):
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(config_of("llama", num_labels=1))
    if wrapped:
        model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["q_proj"]))
    head = "base_model.model.score.modules_to_save.default" if wrapped else "score"
    assert roles(model)[Role.head] == {head}


def test_kernels_and_vectors_are_other():
    model = nn.Module()
    model.conv, model.scale, model.gate = nn.Conv2d(3, 8, 4), nn.Parameter(torch.ones(8)), nn.Linear(8, 1, bias=False)
    assert {weight.role for weight in parameters.weights(model)} == {Role.other}


def test_only_what_trains_has_a_role():
    model = causal()
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    assert [weight.name for weight in parameters.weights(model)] == ["model.norm.weight"]


def grouped(model, rule_of=lambda _: "adamw", **keys):
    """The groups, as (names of weights, rate, decay, rule)."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    made = parameters.groups(model, Optimizer(**{"lr": 1e-3, "weight_decay": 0.1, **keys}), rule_of)
    every = [id(weight) for group in made for weight in group["params"]]
    assert sorted(every) == sorted(id(weight) for weight in model.parameters() if weight.requires_grad)
    return [
        ({names[id(weight)] for weight in group["params"]}, group["lr"], group["weight_decay"], group["rule"])
        for group in made
    ]


def test_vectors_do_not_decay():
    matrices, vectors = grouped(causal("qwen2"))
    assert matrices[1:] == (1e-3, 0.1, "adamw")
    assert vectors[1:] == (1e-3, 0.0, "adamw")
    assert all("norm" in name or "bias" in name for name in vectors[0])
    assert not any("norm" in name or "bias" in name for name in matrices[0])


def test_embeddings_have_their_rate_and_the_usual_rate_comes_first():
    made = grouped(causal(), embedding_lr=1e-4)
    assert [rate for _, rate, _, _ in made] == [1e-3, 1e-3, 1e-4]
    assert made[-1][0] == {"model.embed_tokens.weight"}


def test_the_first_pattern_that_fits_counts():
    groups = [
        WeightGroup(weights=r"layers\.0\..*norm", weight_decay=0.5),
        WeightGroup(weights=r"layers\.0\.", lr=1e-2, lr_scale=0.5),
        WeightGroup(weights="embed", lr_scale=0.1),
    ]
    made = grouped(causal(), embedding_lr=1e-4, groups=groups)
    by_name = {name: (rate, decay) for names, rate, decay, _ in made for name in names}
    assert by_name["model.layers.0.input_layernorm.weight"] == (1e-3, 0.5)
    assert by_name["model.layers.0.mlp.up_proj.weight"] == (5e-3, 0.1)
    assert by_name["model.layers.1.mlp.up_proj.weight"] == (1e-3, 0.1)
    assert by_name["model.embed_tokens.weight"] == (pytest.approx(1e-5), 0.1)
    rates = [rate for _, rate, _, _ in made]
    assert rates == sorted(rates, key=lambda rate: rate != 1e-3)


def test_each_rule_has_groups_of_its_own():
    made = grouped(causal(), lambda weight: str(weight.role))
    assert [(rule, decay) for _, _, decay, rule in made] == [
        ("embedding", 0.1),
        ("matrix", 0.1),
        ("other", 0.0),
        ("head", 0.1),
    ]


def test_a_pattern_that_no_weight_has_is_refused():
    groups = [WeightGroup(weights="layers"), WeightGroup(weights="lora_B", lr=1e-2)]
    with pytest.raises(ConfigError, match="no weight that trains has 'lora_B' in its name"):
        grouped(causal(), groups=groups)
