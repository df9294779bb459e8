"""Losses and advantages by value, against formulas in numpy; and what stands between a run and TRL's trainers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ftrun import launch, record
from ftrun.config import Config
from ftrun.errors import ConfigError
from ftrun.worker import online

SMALL = ("model=tiny", "hardware=cpu", "adapter=full", "data.rows=8", "train.micro_batch_size=4")
PROMPT, LENGTH, LIMIT = 5, 6, 8


def made(folder, cls, *words):
    """Return a trainer as a run makes it, ready to compute a loss of one micro batch."""
    given = [*SMALL, f"stage.max_new_tokens={LIMIT}", *words, f"output_dir={folder / 'run'}"]
    cfg = Config.load(launch.freeze(launch.check(given), given) / record.RUN)
    trainer = online.build(cls, cfg)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


@pytest.fixture
def batch():
    """Four replies of different lengths, two to a question, to prompts of which two are padded."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([LENGTH, 3, 1, 4])
    prompt_mask = torch.ones(4, PROMPT, dtype=torch.long)
    prompt_mask[2:, :2] = 0
    drawn = torch.randint(3, 1000, (4, PROMPT + LENGTH), generator=generator)
    noise = [torch.randn(4, LENGTH, generator=generator) * 0.3 for _ in range(2)]
    completion_mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return {
        "prompt_ids": drawn[:, :PROMPT] * prompt_mask, "prompt_mask": prompt_mask,
        "completion_ids": drawn[:, PROMPT:] * completion_mask, "completion_mask": completion_mask,
        "advantages": torch.tensor([1.3, -0.8, -1.1, 0.6]), "num_items_in_batch": lengths.sum(),
        "old_per_token_logps": noise[0] - 6.9, "ref_per_token_logps": noise[1] - 6.9,
    }  # fmt: skip


def token_logps(trainer, batch, temperature=1.0):
    """Return the log-probability of each reply token, in float64, of each sequence by itself and without padding."""
    found = np.zeros((4, LENGTH))
    for row, count in enumerate(batch["completion_mask"].sum(1).tolist()):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row] > 0]
        reply = batch["completion_ids"][row, :count]
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.cat([prompt, reply])[None]).logits[0].double().numpy() / temperature
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found[row, :count] = logps[len(prompt) - 1 + np.arange(count), reply.numpy()]
    return found


def reply_mean(values, mask):
    return (values * mask).sum(1) / mask.sum(1)


LEVEL = "stage.importance_sampling_level=sequence"
LOSSES = [
    ("grpo",), ("bnpo",), ("dapo",), ("dr_grpo",), ("grpo", LEVEL), ("luspo", LEVEL), ("cispo", "stage.epsilon_high=3"),
    ("sapo",), ("vespo",), ("dapo", "stage.beta=0.2"), ("dapo", "stage.beta=0.2", "stage.use_bias_correction_kl=false"),
    ("grpo", "stage.epsilon=0.1", "stage.epsilon_high=0.3", "stage.delta=1.2"), ("dapo", "stage.temperature=0.7"),
]  # fmt: skip


@pytest.mark.parametrize("words", LOSSES, ids=" ".join)
def test_the_loss_of_a_micro_batch_is_its_formula(tmp_path, batch, words):
    name, *more = words
    trainer = made(tmp_path, online.GroupTrainer, "stage=grpo", f"stage.loss={name}", *more)
    stage = trainer.stage
    logps = token_logps(trainer, batch, stage.temperature)
    mask = batch["completion_mask"].double().numpy()
    old, reference = (batch[f"{key}_per_token_logps"].double().numpy() for key in ("old", "ref"))
    advantage = batch["advantages"].double().numpy()[:, None]
    ratio = np.exp(logps - old)
    if LEVEL in more:
        ratio = np.exp(reply_mean(logps - old, mask))[:, None]
    each = token_losses(stage, name, ratio, advantage, logps, ((logps - old) * mask).sum(1, keepdims=True))
    if stage.beta:
        kl = np.exp(reference - logps) - (reference - logps) - 1
        each = each + stage.beta * kl * (ratio if stage.use_bias_correction_kl else 1)
    total = (each * mask).sum(1)
    wanted = {
        "grpo": (total / mask.sum(1)).mean(), "sapo": (total / mask.sum(1)).mean(), "luspo": total.mean(),
        "bnpo": total.sum() / mask.sum(), "dr_grpo": total.sum() / (4 * LIMIT),
    }.get(name, total.sum() / mask.sum())  # fmt: skip
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def token_losses(stage, name, ratio, advantage, logps, log_ratio_of_reply):
    """Return what each token adds to the loss, before the divergence."""
    if name == "cispo":
        return -np.minimum(ratio, stage.epsilon_high) * advantage * logps
    if name == "sapo":
        steepness = np.where(advantage > 0, stage.sapo_temperature_pos, stage.sapo_temperature_neg)
        return -4 / steepness / (1 + np.exp(-steepness * (ratio - 1))) * advantage
    if name == "vespo":
        k = np.where(advantage >= 0, stage.vespo_k_pos, stage.vespo_k_neg)
        fall = np.where(advantage >= 0, stage.vespo_lambda_pos, stage.vespo_lambda_neg)
        weight = np.exp(log_ratio_of_reply)
        return -np.exp(fall) * weight**k * np.exp(-fall * weight) * advantage * logps
    high = stage.epsilon if stage.epsilon_high is None else stage.epsilon_high
    clipped = np.clip(ratio, 1 - stage.epsilon, 1 + high) * advantage
    return -np.minimum(np.minimum(ratio, stage.delta or np.inf) * advantage, clipped)


def test_rloo_takes_the_ratio_of_whole_replies(tmp_path, batch):
    trainer = made(tmp_path, online.LeaveOneOutTrainer, "stage=rloo")
    logps, mask = token_logps(trainer, batch), batch["completion_mask"].double().numpy()
    old = (batch["old_per_token_logps"].double().numpy() * mask).sum(1)
    ratio, advantage = np.exp((logps * mask).sum(1) - old), batch["advantages"].double().numpy()
    wanted = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage).mean()
    given = batch | {"old_logps": torch.tensor(old, dtype=torch.float32)}
    assert trainer._compute_loss(trainer.model, given).item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_online_dpo_is_dpo_where_one_reply_is_better(tmp_path, batch, loss):
    trainer = made(tmp_path, online.PairTrainer, "stage=online_dpo", f"stage.loss={loss}", "stage.beta=0.3")
    mask = batch["completion_mask"].double().numpy()
    gained = (token_logps(trainer, batch) - batch["ref_per_token_logps"].double().numpy()) * mask
    chosen, rejected = gained.sum(1).reshape(2, 2).T
    margin = chosen - rejected
    losses = np.log1p(np.exp(-0.3 * margin)) if loss == "sigmoid" else (margin - 1 / 0.6) ** 2
    pairs = {name: value.view(2, 2, -1) for name, value in batch.items() if value.ndim == 2}
    found = trainer._compute_loss(trainer.model, pairs | {"decided": torch.tensor([1.0, 0.0])})
    assert found.item() == pytest.approx(losses[0] / 2, rel=1e-4)


REWARD = """
from dataclasses import dataclass
from ftrun.plugin import Reward, register

@register
@dataclass(kw_only=True)
class {name}(Reward):
    \"\"\"Worth as the reply's first token says.\"\"\"

    name: str = "{name}"

    def score(self, completions):
        return [{value} for one in completions]
"""
VALUES = np.array([3.0, 1.0, 4.0, 2.0, 9.0, 2.0, 6.0, 5.0])
SQUARES = VALUES**2


def advantages(folder, write, cls, *words):
    """Return the advantages of eight replies, four to each of two questions, that are worth `VALUES`."""
    files = [
        str(write(f"{name}.py", REWARD.format(name=name, value=value)))
        for name, value in (("first", "float(one.ids[0])"), ("square", "float(one.ids[0] ** 2)"))
    ]
    rewards = "reward=[first,square]" if any("square" in word for word in words) else "reward=first"
    given = ("train.micro_batch_size=8", f"plugins=[{','.join(files)}]", rewards, *words)
    trainer = made(folder, cls, *given)
    replies = [[int(value), 7, 2] for value in VALUES]
    trainer._generate_single_turn = lambda *_: (replies, None) if cls is online.GroupTrainer else replies
    rows = [trainer.train_dataset[n // 4] for n in range(8)]
    if trainer.beta:
        trainer.ref_model = online.Live(trainer)
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1.5)
    return trainer, trainer._generate_and_score_completions(trainer.collate(rows))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_an_advantage_is_a_rewards_distance_from_the_mean_of_its_group(tmp_path, write, scale):
    _, found = advantages(tmp_path, write, online.GroupTrainer, "stage=grpo", f"stage.scale_rewards={scale}")
    groups = VALUES.reshape(2, 4)
    spread = {"group": groups.std(1, ddof=1, keepdims=True), "batch": VALUES.std(ddof=1), "none": 1 - 1e-4}[scale]
    wanted = (groups - groups.mean(1, keepdims=True)) / (spread + 1e-4)
    assert found["advantages"].tolist() == pytest.approx(wanted.ravel().tolist(), rel=1e-5)


def test_rewards_are_summed_by_weight_or_normalised_one_by_one(tmp_path, write):
    weights = ("stage=grpo", "reward.square.weight=-0.5")
    _, found = advantages(tmp_path / "a", write, online.GroupTrainer, *weights, "stage.scale_rewards=none")
    groups = (VALUES - 0.5 * SQUARES).reshape(2, 4)
    assert found["advantages"].tolist() == pytest.approx((groups - groups.mean(1, keepdims=True)).ravel().tolist())
    apart = "stage.aggregation=normalize_then_sum"
    _, found = advantages(tmp_path / "b", write, online.GroupTrainer, *weights, apart)
    each = [values.reshape(2, 4) for values in (VALUES, SQUARES)]
    first, square = ((one - one.mean(1, keepdims=True)) / (one.std(1, ddof=1, keepdims=True) + 1e-4) for one in each)
    summed = (first - 0.5 * square).ravel()
    wanted = (summed - summed.mean()) / (summed.std(ddof=1) + 1e-4)
    assert found["advantages"].tolist() == pytest.approx(wanted.tolist(), rel=1e-4, abs=1e-5)


def test_rloo_leaves_one_out_and_takes_the_divergence_off_the_reward(tmp_path, write):
    words = ("stage=rloo", "stage.beta=0.5", "stage.reward_clip_range=[2,6]")
    trainer, found = advantages(tmp_path, write, online.LeaveOneOutTrainer, *words)
    batch = {name: value for name, value in found.items() if value.ndim == 2}
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3)
        before, _, _ = trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, mask, 3)
    divergence = (now - before).sum(1).double().numpy()
    assert np.abs(divergence).max() > 1e-3
    worth = (np.clip(VALUES, 2, 6) - 0.5 * divergence).reshape(2, 4)
    wanted = worth - (worth.sum(1, keepdims=True) - worth) / 3
    assert found["advantages"].tolist() == pytest.approx(wanted.ravel().tolist(), rel=1e-4, abs=1e-5)


def test_padding_before_a_prompt_moves_no_position():
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    add_fused_lm_head(model)
    model.register_forward_pre_hook(online._with_positions, with_kwargs=True)
    ids = torch.tensor([[4, 9, 7, 3, 8]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    alone, shifted = (
        model(input_ids=given, attention_mask=mask, labels=given.masked_fill(mask == 0, -100), fused_lm_head=True)
        for given, mask in ((ids, torch.ones_like(ids)), (padded, (torch.arange(8) >= 3).long()[None]))
    )
    assert shifted.log_probs[0, 3:].tolist() == pytest.approx(alone.log_probs[0].tolist(), abs=1e-5)


def config(*words):
    return launch.check([*SMALL, "stage=grpo", *words])


def test_questions_are_drawn_in_whole_groups_by_all_processes():
    cfg = config("train.micro_batch_size=2", "train.grad_accumulation=2", "stage.num_iterations=2")
    drawn = [online.GroupBatches(np.ones(5), cfg, rank=rank, world_size=2) for rank in range(2)]
    first, second = (list(batches) for batches in drawn)
    assert len(first) == len(drawn[0]) == 3 * 2 * 2
    together = [a + b for a, b in zip(first, second, strict=True)]
    assert all(rows == together[number // 4 * 4] for number, rows in enumerate(together))
    assert all(rows == [row for row in rows[::4] for _ in range(4)] for rows in together)
    asked = [rows[::4] for rows in together[::4]]
    flat = list(itertools.chain.from_iterable(asked))
    assert sorted(flat[:5]) == [0, 1, 2, 3, 4]
    assert flat[5:] == flat[:1]  # two questions a batch: the last one is filled up
    drawn[0].epoch = 1
    assert list(drawn[0]) != first


def test_steps_are_counted_in_micro_batches_of_replies():
    cfg = config("train.epochs=2", "train.grad_accumulation=2", "stage.num_iterations=3")
    batches = online.GroupBatches(np.ones(7), cfg, rank=0, world_size=1)
    assert (len(batches), batches.total_steps) == (4 * 6, 2 * 12)
    assert online.GroupBatches(np.ones(7), config("train.max_steps=5"), rank=0, world_size=1).total_steps == 5


def test_a_reply_ends_where_the_model_or_the_template_ends_it(tmp_path):
    trainer = made(tmp_path, online.GroupTrainer, "stage=grpo", "template=chatml")
    tokenizer = trainer.run.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in trainer.eos_token_ids
    assert trainer.generation_config.eos_token_id == trainer.eos_token_ids
    (row,) = trainer.collate([trainer.train_dataset[0]])
    ids = tokenizer("Four.")["input_ids"]
    whole = online.completion(trainer.run, row, [*ids, end], trainer.eos_token_ids)
    cut = online.completion(trainer.run, row, ids, trainer.eos_token_ids)
    assert (whole.text, whole.finished, whole.ids) == ("Four.", True, [*ids, end])
    assert (cut.text, cut.finished) == ("Four.", False)
    assert whole.prompt_ids == trainer.train_dataset[0]["input_ids"].tolist()
    assert whole.prompt[-1]["role"] == "user"
    assert whole.answer == trainer.train_dataset[0]["extra"]["answer"]


def test_a_question_with_media_is_refused():
    with pytest.raises(ConfigError) as refused:
        online._questions([{"input_ids": np.array([1]), "media": ["a.png"], "extra": {"prompt": [], "answer": None}}])
    assert "stage=ppo" in refused.value.problems[0].fix
