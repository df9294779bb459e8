"""Scores: read at the last token however rows are batched, by reward models of any family, alone or beside a policy."""

from __future__ import annotations

import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ftrun.errors import ConfigError
from ftrun.plugin import ModelHead
from ftrun.worker import batches, builtin, loading, score_head, scoring
from ftrun.worker.losses.ranking import bradley_terry
from ftrun.worker.score_head import ScoreHead

END = 1
"""What the rows below end with, and what pads them."""

SMALL = {"vocab_size": 128, "pad_token_id": None, "bos_token_id": None, "eos_token_id": END}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "gemma": LLAMA | {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4},
}  # fmt: skip


def causal(family: str = "llama", **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SMALL | FAMILIES[family] | more
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


def scorer_of(family: str = "llama") -> Any:
    net = causal(family)
    width = score_head.new_head(net.config, 0).shape[1]
    return score_head.put_on(net, torch.linspace(-0.3, 0.3, width)[None])


def row_of(*ids: int) -> Any:
    each = np.array(ids, np.int32)
    return {"input_ids": each, "labels": each}


ROWS = [row_of(5, 6, 7, END), row_of(9, 8, 7, 6, 5, END, END), row_of(4, END), row_of(3)]


def alone(net: Any, row: Any) -> float:
    """The score of one row by the plain formula: the head at the last hidden state of the row alone."""
    hidden = net.base_model(torch.tensor(row["input_ids"])[None].long()).last_hidden_state
    return (hidden[0, -1] @ net.score.weight[0]).item()


@pytest.mark.parametrize("collate", [partial(batches.pad, pad_id=END), batches.flatten], ids=["padded", "flat"])
def test_a_score_is_read_at_the_last_token_even_where_padding_is_the_end_of_a_reply(collate):
    net = scorer_of()
    scores = ScoreHead(net).scores(net, collate(ROWS))
    assert scores.dtype is torch.float32
    assert scores.tolist() == pytest.approx([alone(net, row) for row in ROWS], abs=1e-5)
    assert net.config.pad_token_id is None


def test_rows_that_are_padded_on_the_left_end_where_they_end():
    batch = {"input_ids": torch.ones(2, 4), "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])}
    assert score_head.last_tokens(batch).nonzero().tolist() == [[0, 3], [1, 2]]
    assert score_head.last_tokens(batches.pad([], 0)).tolist() == [[True]]


def test_the_gradient_is_that_of_the_plain_formula():
    net = scorer_of()
    ScoreHead(net).scores(net, batches.pad(ROWS, END)).pow(2).sum().backward()
    found = {name: weight.grad.clone() for name, weight in net.named_parameters()}
    net.zero_grad()
    for row in ROWS:
        hidden = net.base_model(torch.tensor(row["input_ids"])[None].long()).last_hidden_state
        (hidden[0, -1] @ net.score.weight[0]).pow(2).backward()
    for name, weight in net.named_parameters():
        assert torch.allclose(found[name], weight.grad, rtol=1e-4, atol=1e-5), name


def test_under_autocast_the_head_itself_is_computed_in_float32():
    net = scorer_of().bfloat16()
    net.score.float()
    with torch.autocast("cpu", torch.bfloat16):
        scores = ScoreHead(net).scores(net, batches.pad(ROWS, END))
    assert scores.dtype is torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_is_saved_and_found_again_with_the_same_scores(family, tmp_path):
    net = scorer_of(family)
    net.save_pretrained(tmp_path)
    again = loading._pretrained(str(tmp_path), {"dtype": torch.float32}, {})
    expected = ScoreHead(net).scores(net, batches.pad(ROWS, 0))
    assert torch.equal(ScoreHead(again).scores(again, batches.pad(ROWS, 0)), expected)
    assert type(again).__name__.endswith("ForSequenceClassification")


def test_a_new_head_depends_on_the_seed_alone():
    config = causal().config
    torch.manual_seed(5)
    one, again, other = (score_head.new_head(config, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_what_cannot_score_is_refused():
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model("llama", **SMALL, **LLAMA, num_labels=3)
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.config.architectures = [type(classifier).__name__]
    with pytest.raises(ConfigError, match="tells 3 classes apart"):
        score_head.with_score(classifier, None, 0)
    bert = AutoConfig.for_model(
        "bert", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_labels=1
    )
    encoder = AutoModelForSequenceClassification.from_config(bert)
    encoder.config.architectures = [type(encoder).__name__]
    with pytest.raises(ConfigError, match="no score head at the last token"):
        score_head.with_score(encoder, None, 0)


def test_a_file_that_is_no_value_head_is_refused(tmp_path):
    save_file({"score.weight": torch.ones(1, 4)}, tmp_path / "value_head.safetensors")
    with pytest.raises(ConfigError, match=r"holds no v_head\.summary\.weight"):
        score_head.value_head(tmp_path / "value_head.safetensors")


def test_padding_is_named_only_where_it_cannot_be_taken_for_the_end():
    net = scorer_of()
    for pad_id, eos_id, named in ((0, 1, 0), (1, 1, None)):
        tokenizer = types.SimpleNamespace(pad_token_id=pad_id, eos_token_id=eos_id)
        score_head.name_padding(net, tokenizer)  # type: ignore[arg-type]
        assert net.config.pad_token_id == named


def test_the_pairs_of_one_row_share_its_weight():
    stores = [types.SimpleNamespace(origins=np.array([0, 0, 0, 1])), types.SimpleNamespace(origins=np.array([0, 1, 1]))]
    which, index = np.array([0, 0, 0, 1, 0, 1]), np.array([3, 0, 2, 1, 1, 0])
    rows = types.SimpleNamespace(stores=stores, which=which, index=index, __len__=lambda _: 6)
    rows = type("Rows", (), vars(rows))()
    assert scoring.pair_shares(rows).tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 2, 1 / 3, 1])  # type: ignore[arg-type]


def adapter(net: Any, folder: Path, head: ModelHead, seed: int, targets: list[str]) -> Any:
    """Put an adapter on a model, as if it had been trained, and save it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    whole = {"modules_to_save": list(head.modules)} if head.modules else {}
    made = get_peft_model(net, LoraConfig(r=2, target_modules=targets, task_type=head.value, lora_dropout=0.5, **whole))
    with torch.no_grad():
        for weight in made.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn(weight.shape)
    made.save_pretrained(folder)
    return made


@pytest.fixture
def tokenizer() -> Any:
    return builtin.tokenizer()


def test_a_reward_adapter_beside_a_policy_scores_as_it_does_alone(tmp_path, tokenizer):
    trained = adapter(scorer_of(), tmp_path / "rm", ModelHead.score, 1, ["q_proj", "up_proj"]).eval()
    expected = ScoreHead(trained).scores(trained, batches.pad(ROWS, END)).tolist()

    policy = adapter(causal(), tmp_path / "policy", ModelHead.causal, 2, ["q_proj", "v_proj"]).train()
    batch = batches.model_inputs(batches.pad(ROWS, END))
    before = policy.eval()(**batch).logits
    trains = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    policy.train()
    beside = scoring.attach_scorer(policy, tmp_path / "rm", tokenizer)
    assert beside.scores([row["input_ids"].tolist() for row in ROWS], batch_size=3) == pytest.approx(expected, abs=1e-5)
    assert policy.training
    assert {name for name, weight in policy.named_parameters() if weight.requires_grad} == trains
    assert torch.equal(policy.eval()(**batch).logits, before)
    policy.save_pretrained(tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").iterdir()} == {
        file.name for file in (tmp_path / "policy").iterdir()
    }


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_reward_adapter_for_other_layers_is_refused(tmp_path, tokenizer, family):
    deep = causal(num_hidden_layers=3) if family == "llama" else causal()
    adapter(score_head.put_on(deep, torch.ones(1, 32)), tmp_path / "rm", ModelHead.score, 1, ["q_proj"])
    policy = adapter(causal(family), tmp_path / "policy", ModelHead.causal, 2, ["c_attn", "v_proj"])
    with pytest.raises(ConfigError, match="is for other layers than the policy's"):
        scoring.attach_scorer(policy, tmp_path / "rm", tokenizer)


def test_an_adapter_without_a_head_is_refused(tmp_path, tokenizer):
    policy = adapter(causal(), tmp_path / "policy", ModelHead.causal, 2, ["q_proj"])
    with pytest.raises(ConfigError, match="no weights of one"):
        scoring.attach_scorer(policy, tmp_path / "policy", tokenizer)


def test_scores_come_back_in_the_order_of_the_rows(tmp_path, tokenizer):
    net = scorer_of()
    net.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = scoring.load_scorer(tmp_path)
    rows = [row["input_ids"].tolist() for row in ROWS]
    expected = [alone(net, row) for row in ROWS]
    for size in (1, 2, 16):
        assert scorer.scores(rows, batch_size=size) == pytest.approx(expected, abs=1e-5)
    assert scorer.scores([]) == []
    assert scorer.tokenizer.eos_token == tokenizer.eos_token


def test_what_is_no_reward_model_is_refused(tmp_path):
    causal().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="it is no reward model"):
        scoring.load_scorer(tmp_path)
    save_file({"v_head.summary.weight": torch.ones(1, 32)}, tmp_path / "value_head.safetensors")
    builtin.tokenizer().save_pretrained(tmp_path)
    net = score_head.put_on(causal(), torch.ones(1, 32))
    expected = [alone(net, row) for row in ROWS]
    found = scoring.load_scorer(tmp_path).scores([row["input_ids"].tolist() for row in ROWS])
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_loss_of_a_pair_is_what_the_scores_say():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0])
    losses = bradley_terry(chosen, rejected, torch.tensor([0.0, 1.0]))
    assert losses.tolist() == pytest.approx([0.474077, 3.048587], abs=1e-5)
    assert isinstance(score_head._linear(torch.ones(1, 4)), nn.Linear)
