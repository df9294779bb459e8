"""Replies to prompts: the same in any batch, ended where they should be, drawn as often as they are likely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ftrun.worker import builtin, generation
from ftrun.worker.generation import Decoding, Generator
from ftrun.worker.sampling import Budget

PROMPTS = [
    {"input_ids": np.array(ids, np.int32)}
    for ids in ([5, 9], [7, 8, 9, 10, 11, 12, 13], [6], [20, 21, 22, 23], [7, 8, 9], [31, 30, 29, 28, 27, 26])
]


@pytest.fixture(scope="module")
def net() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def made(rows: int | None = None, tokens: int | None = None, ends: Sequence[int] = (), **decoding: Any) -> Generator:
    chosen = Decoding(**{"max_new_tokens": 6} | decoding)
    return Generator(decoding=chosen, budget=Budget(rows or 64, tokens, padded=True), ends=tuple(ends), pad_id=0)


def likeliest(net: Any, ids: Sequence[int], count: int) -> list[int]:
    """The likeliest next tokens, one by one, without padding and without a cache."""
    out = list(map(int, ids))
    for _ in range(count):
        with torch.no_grad():
            out.append(int(net(torch.tensor([out]), use_cache=False).logits[0, -1].argmax()))
    return out[len(ids) :]


@pytest.mark.parametrize("size", [{"rows": 1}, {"rows": 2}, {"rows": 6}, {"tokens": 24}, {"tokens": 1}])
def test_batches_do_not_change_replies(net, size):
    expected = [likeliest(net, prompt["input_ids"], 6) for prompt in PROMPTS]
    assert made(**size).replies(net, PROMPTS) == expected
    assert len({tuple(reply) for reply in expected}) == len(PROMPTS)


def test_the_longest_prompts_come_first_and_a_budget_of_tokens_counts_the_reply_too(net, monkeypatch):
    shapes = []
    generate = net.generate
    monkeypatch.setattr(net, "generate", lambda **given: shapes.append(given["input_ids"].shape) or generate(**given))
    made(tokens=26).replies(net, PROMPTS)
    assert [tuple(shape) for shape in shapes] == [(2, 7), (2, 4), (2, 2)]  # 2 x (7 + 6), 2 x (4 + 6), 2 x (2 + 6)
    shapes.clear()
    made(tokens=26, num_beams=2).replies(net, PROMPTS)
    assert [tuple(shape) for shape in shapes] == [(1, 7), (1, 6), (1, 4), (1, 3), (1, 2), (1, 1)]


def test_a_reply_ends_with_its_end(net):
    whole = made().replies(net, PROMPTS)
    end = whole[1][2]
    cut = made(ends=[end]).replies(net, PROMPTS)
    assert cut[1] == whole[1][: whole[1].index(end) + 1]
    for found, reply in zip(cut, whole, strict=True):
        assert found == (reply[: reply.index(end) + 1] if end in reply else reply)


def test_what_a_model_was_published_with_is_left_out(net, monkeypatch):
    from transformers import GenerationConfig

    before = made().replies(net, PROMPTS)
    own = GenerationConfig(repetition_penalty=9.0, temperature=0.1, do_sample=True, no_repeat_ngram_size=1, num_beams=3)
    monkeypatch.setattr(net, "generation_config", own)
    assert made().replies(net, PROMPTS) == before


def test_a_model_that_trains_goes_on_training_and_its_random_numbers_are_left_alone(net):
    net.train()
    before = torch.get_rng_state()
    made(temperature=1.0).replies(net, PROMPTS)
    assert net.training
    assert torch.equal(torch.get_rng_state(), before)
    net.eval()


def test_draws_depend_on_the_seed_and_not_on_the_batch(net):
    one = made(rows=1, temperature=1.0, top_p=0.9, seed=3).replies(net, PROMPTS)
    assert made(rows=4, temperature=1.0, top_p=0.9, seed=3).replies(net, PROMPTS) == one
    assert made(rows=4, temperature=1.0, top_p=0.9, seed=4).replies(net, PROMPTS) != one
    assert one != made().replies(net, PROMPTS)


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.6},
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(net, how):
    count = 3000
    drawn = Counter(reply[0] for reply in made(rows=500, max_new_tokens=1, **how).replies(net, PROMPTS[:1] * count))
    with torch.no_grad():
        logits = net(torch.tensor([[5, 9]])).logits[0, -1].double() / how["temperature"]
    likely = logits.softmax(-1).numpy()
    order = np.argsort(-likely)
    kept = order[: how.get("top_k", 64)]
    kept = kept[: int(np.searchsorted(np.cumsum(likely[order]), how.get("top_p", 2.0))) + 1]
    expected = {int(token): likely[token] / likely[kept].sum() for token in kept}
    assert set(drawn) <= set(expected)
    assert len(expected) > 1
    for token, share in expected.items():
        assert drawn[token] / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5 + 1e-3)


def test_beams_find_replies_that_are_no_less_likely(net):
    def likelihood(prompt: Any, reply: list[int]) -> float:
        ids = [*map(int, prompt["input_ids"]), *reply]
        with torch.no_grad():
            each = net(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(ids) - len(reply)
        return float(sum(each[at - 1, ids[at]] for at in range(start, len(ids))))

    greedy, searched = made().replies(net, PROMPTS), made(num_beams=8).replies(net, PROMPTS)
    gains = [likelihood(p, b) - likelihood(p, g) for p, g, b in zip(PROMPTS, greedy, searched, strict=True)]
    assert min(gains) > -1e-4
    assert max(gains) > 0.1
    assert made(num_beams=8, rows=1).replies(net, PROMPTS) == searched


def test_processes_share_the_prompts_and_each_has_all_replies(net, monkeypatch):
    how = {"rows": 2, "temperature": 1.0}
    alone = made(**how).replies(net, PROMPTS)
    shares: list[list[Any]] = []
    monkeypatch.setattr(generation, "gather_object", lambda mine: shares.append(mine) or mine)
    for rank in range(4):
        with pytest.raises(KeyError):  # the replies of the others, which nobody hands over here
            made(**how).replies(net, PROMPTS, rank=rank, world_size=4)
    assert sorted(number for share in shares for number, _ in share) == list(range(len(PROMPTS)))
    everything = [pair for share in shares for pair in share]
    monkeypatch.setattr(generation, "gather_object", lambda _: everything)
    assert made(**how).replies(net, PROMPTS, rank=3, world_size=4) == alone
    assert made(**how).replies(net, PROMPTS[:1], rank=3, world_size=4) == alone[:1]  # a share of nothing


def test_the_text_of_a_reply_is_without_its_end():
    tokenizer = builtin.tokenizer()
    ids = tokenizer(" Ahoy there. ")["input_ids"]
    end = tokenizer("!")["input_ids"]
    generator = made(ends=[*end, tokenizer.eos_token_id])
    assert generator.text(tokenizer, ids) == "Ahoy there."
    assert generator.text(tokenizer, [*ids, tokenizer.eos_token_id]) == "Ahoy there."
    assert generator.text(tokenizer, [*ids, *end]) == "Ahoy there."
    assert generator.text(tokenizer, []) == ""


@pytest.mark.parametrize("template", [(), ("template=chatml",), ("template=llama3",)])
def test_a_base_models_template_ends_its_replies_with_another_token_than_the_tokenizer(net, template):
    """As Qwen's base models: a text ends with <|endoftext|>, and a reply with <|im_end|>."""
    from ftrun import config
    from ftrun.model import Source
    from ftrun.worker import loading

    cfg = config.compose(["model=tiny", "data.train_on=roles", "data.train_roles=[user]", *template])
    cfg.model.source = Source.builtin
    tokenizer = loading.tokenizer(cfg)
    tokenizer.eos_token = "<|endoftext|>"
    ends = generation.end_ids(cfg, tokenizer, net)
    names = tokenizer.convert_ids_to_tokens(list(ends))
    assert names[0] == "<|endoftext|>"
    assert ("<|eot_id|>" if "template=llama3" in template else "<|im_end|>") in names
