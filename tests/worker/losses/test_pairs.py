"""Losses of pairs: values against formulas written anew, gradients against differences, and against TRL's own code."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ftrun.worker.losses import pairs as losses
from ftrun.worker.losses.pairs import LOSSES, Pairs

Array = Any
LOGPROBS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
LENGTHS = np.array([[3.0, 5.0, 2.0, 7.0, 4.0], [4.0, 2.0, 6.0, 7.0, 3.0]])
SETTINGS = {"beta": 0.3, "label_smoothing": 0.1, "gamma": 0.6, "tau": 0.4, "delta": 0.25}


def numbers(seed: int = 0) -> Array:
    """Log-probabilities of five pairs, of shape (4, 5), whose two sides differ in either direction."""
    return -np.random.default_rng(seed).uniform(1.0, 9.0, (4, 5))


def pairs_of(values: Array, *, dtype: torch.dtype = torch.float64, **settings: Any) -> Pairs:
    tensors = {name: torch.tensor(row, dtype=dtype) for name, row in zip(LOGPROBS, values, strict=True)}
    chosen, rejected = torch.tensor(LENGTHS[:, : values.shape[1]], dtype=dtype)
    return Pairs(**tensors, chosen_length=chosen, rejected_length=rejected, **(SETTINGS | settings))


def log_sigmoid(x: Array) -> Array:
    return -np.logaddexp(0.0, -x)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


class Formulas:
    """Each loss as its paper writes it, in numpy; of log-probabilities of shape (4, B)."""

    def __init__(self, values: Array, **settings: float) -> None:
        self.chosen, self.rejected, self.ref_chosen, self.ref_rejected = values
        self.settings = SETTINGS | settings
        self.b, self.e = self.settings["beta"], self.settings["label_smoothing"]
        self.win, self.lose = self.chosen - self.ref_chosen, self.rejected - self.ref_rejected
        self.length_w, self.length_l = LENGTHS[:, : values.shape[1]]

    def _mixed(self, x: Array) -> Array:
        return -(1 - self.e) * log_sigmoid(x) - self.e * log_sigmoid(-x)

    def sigmoid(self) -> Array:
        return self._mixed(self.b * (self.win - self.lose))

    def robust(self) -> Array:
        x = self.b * (self.win - self.lose)
        return ((1 - self.e) * -log_sigmoid(x) - self.e * -log_sigmoid(-x)) / (1 - 2 * self.e)

    def hinge(self) -> Array:
        return np.maximum(0.0, 1 - self.b * (self.win - self.lose))

    def ipo(self) -> Array:
        return (self.win / self.length_w - self.lose / self.length_l - 0.5 / self.b) ** 2

    def exo(self) -> Array:
        p = sigmoid(self.b * (self.win - self.lose))
        return p * np.log(p / (1 - self.e)) + (1 - p) * np.log((1 - p) / self.e)

    def nca(self) -> Array:
        w, r = self.b * self.win, self.b * self.lose
        return -log_sigmoid(w) - 0.5 * log_sigmoid(-w) - 0.5 * log_sigmoid(-r)

    def bco(self) -> Array:
        w, r, d = self.b * self.win, self.b * self.lose, self.settings["delta"]
        return -np.log(sigmoid(w - d)) - np.log(sigmoid(-(r - d)))

    def sppo(self) -> Array:
        eta = 1 / self.b
        return (self.win - eta * (1 - 0.5)) ** 2 + (self.lose - eta * (0 - 0.5)) ** 2

    def aot(self) -> Array:
        policy, reference = self.chosen - self.rejected, self.ref_chosen - self.ref_rejected
        return self._of_ranks(policy, reference)

    def aot_unpaired(self) -> Array:
        return self._of_ranks(self.win, self.lose)

    def _of_ranks(self, better: Array, worse: Array) -> Array:
        found = np.zeros_like(better)
        for rank, place in enumerate(np.argsort(better)):
            found[place] = self._mixed(self.b * (better[place] - np.sort(worse)[rank]))
        return found

    def apo_zero(self) -> Array:
        return 1 - sigmoid(self.b * self.win) + sigmoid(self.b * self.lose)

    def apo_down(self) -> Array:
        return sigmoid(self.b * self.win) + 1 - sigmoid(self.b * (self.win - self.lose))

    def discopop(self) -> Array:
        x = self.b * (self.win - self.lose)
        share = sigmoid(x / self.settings["tau"])
        return (1 - share) * -log_sigmoid(x) + share * np.exp(-x)

    def kto_pair(self) -> Array:
        return self.kto_pair_beside(max(0.0, self.win.mean()), max(0.0, self.lose.mean()))

    def kto_pair_beside(self, kl_chosen: float, kl_rejected: float) -> Array:
        of_chosen = 1 - sigmoid(self.b * (self.win - kl_rejected))
        return (of_chosen + 1 - sigmoid(self.b * (kl_chosen - self.lose))) / 2

    def sigmoid_norm(self) -> Array:
        return -log_sigmoid(self.b * (self.win / self.length_w - self.lose / self.length_l))

    def orpo(self) -> Array:
        p, q = np.exp(self.chosen / self.length_w), np.exp(self.rejected / self.length_l)
        ratio = (p / (1 - p)) / (q / (1 - q))
        return -self.chosen / self.length_w + self.b * -np.log(sigmoid(np.log(ratio)))

    def simpo(self) -> Array:
        rewards = self.b * self.chosen / self.length_w, self.b * self.rejected / self.length_l
        return self._mixed(rewards[0] - rewards[1] - self.settings["gamma"])

    def cpo(self) -> Array:
        return self._mixed(self.b * (self.chosen - self.rejected))

    def cpo_hinge(self) -> Array:
        return np.maximum(0.0, 1 - self.b * (self.chosen - self.rejected))


def formula(name: str, values: Array, **settings: float) -> Array:
    return getattr(Formulas(values, **settings), name)()


def gradient(loss: Callable[[Pairs], torch.Tensor], values: Array, **settings: Any) -> Array:
    """The gradient of the summed loss with respect to the policy's log-probabilities, of shape (2, B)."""
    pairs = pairs_of(values, **settings)
    leaves = [pairs.policy_chosen.requires_grad_(), pairs.policy_rejected.requires_grad_()]
    loss(pairs).sum().backward()
    return np.stack([leaf.grad.numpy() if leaf.grad is not None else np.zeros(len(leaf)) for leaf in leaves])


def differences(function: Callable[[Array], float], values: Array, step: float = 1e-5) -> Array:
    """The same by central differences of a function of the log-probabilities."""
    found = np.zeros((2, values.shape[1]))
    for side in range(2):
        for pair in range(values.shape[1]):
            moved = np.zeros_like(values)
            moved[side, pair] = step
            found[side, pair] = (function(values + moved) - function(values - moved)) / (2 * step)
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_its_formula(name, seed):
    values = numbers(seed)
    found = LOSSES[name].function(pairs_of(values))
    np.testing.assert_allclose(found.numpy(), formula(name, values), rtol=1e-12, atol=1e-15)
    single = LOSSES[name].function(pairs_of(values, dtype=torch.float32))
    assert single.dtype is torch.float32
    np.testing.assert_allclose(single.numpy(), formula(name, values), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"kto_pair"}))
def test_gradient_equals_differences_of_the_formula(name):
    values = numbers(2)
    expected = differences(lambda moved: float(formula(name, moved).sum()), values)
    np.testing.assert_allclose(gradient(LOSSES[name].function, values), expected, rtol=1e-6, atol=1e-8)


def test_no_gradient_goes_through_the_divergence_of_kto_pair():
    values = numbers(2) + np.array([[5.0], [5.0], [0.0], [0.0]])
    formulas = Formulas(values)
    means = (formulas.win.mean(), formulas.lose.mean())
    assert min(means) > 0
    expected = differences(lambda moved: float(Formulas(moved).kto_pair_beside(*means).sum()), values)
    np.testing.assert_allclose(gradient(losses.kto_pair, values), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_reads_what_it_says_and_nothing_else(name):
    values = numbers(3)
    before = LOSSES[name].function(pairs_of(values))
    read = set()
    for setting, value in SETTINGS.items():
        if not torch.equal(LOSSES[name].function(pairs_of(values, **{setting: value * 1.5})), before):
            read.add(setting)
    assert read == set(LOSSES[name].reads)
    no_reference = replace(pairs_of(values), reference_chosen=None, reference_rejected=None)
    if not LOSSES[name].needs_reference:
        assert torch.equal(LOSSES[name].function(no_reference), before)
    else:
        with pytest.raises(AssertionError, match="needs a reference"):
            LOSSES[name].function(no_reference)


@pytest.mark.parametrize("name", LOSSES)
def test_knows_whether_it_is_coupled_and_whether_lengths_count(name):
    values = numbers(4) + np.array([[4.0], [4.0], [0.0], [0.0]])
    whole = LOSSES[name].function(pairs_of(values))
    alone = torch.cat([LOSSES[name].function(_picked(values, [place])) for place in range(5)])
    assert torch.allclose(whole, alone) != LOSSES[name].coupled
    longer = replace(pairs_of(values), chosen_length=torch.full((5,), 9.0, dtype=torch.float64))
    assert torch.equal(LOSSES[name].function(longer), whole) != LOSSES[name].normalises_by_length


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].needs_reference])
def test_before_the_first_step_the_value_is_known(name):
    """The policy is the reference: every log-ratio is 0."""
    values = np.concatenate([numbers()[:2]] * 2)
    two = math.log(2)
    expected = {
        "sigmoid": two, "robust": two, "hinge": 1.0, "ipo": (0.5 / 0.3) ** 2, "nca": 2 * two, "apo_zero": 1.0,
        "apo_down": 1.0, "discopop": 0.5 * two + 0.5, "kto_pair": 0.5, "sigmoid_norm": two,
        "aot": two, "aot_unpaired": two,
        "sppo": 2 * (0.5 / 0.3) ** 2, "exo": -two - 0.5 * math.log(0.9 * 0.1),
        "bco": math.log1p(math.exp(0.25)) + math.log1p(math.exp(-0.25)),
    }  # fmt: skip
    found = LOSSES[name].function(pairs_of(values)).numpy()
    np.testing.assert_allclose(found, [expected[name]] * 5, rtol=1e-12)


def test_a_pair_by_hand():
    """Log-ratios 1 and -1, so a margin of 2; beta 0.5, so a scaled one of 1."""
    values = np.array([[-2.0], [-5.0], [-3.0], [-4.0]])
    by_hand = {"beta": 0.5, "label_smoothing": 0.2, "gamma": 0.5, "tau": 1.0, "delta": 0.0}
    e = math.e
    expected = {
        "sigmoid": 0.8 * math.log(1 + 1 / e) + 0.2 * math.log(1 + e),
        "hinge": 0.0,
        "ipo": (1 / 3 + 1 / 4 - 1) ** 2,
        "sppo": 0.0,
        "simpo": 0.8 * math.log(1 + math.exp(-(0.5 * (-2 / 3 + 5 / 4) - 0.5)))
        + 0.2 * math.log(1 + math.exp(0.5 * (-2 / 3 + 5 / 4) - 0.5)),
        "cpo": 0.8 * math.log(1 + math.exp(-1.5)) + 0.2 * math.log(1 + math.exp(1.5)),
        "cpo_hinge": 0.0,
        "apo_zero": 2 / (1 + math.exp(0.5)),
    }
    for name, value in expected.items():
        found = float(LOSSES[name].function(pairs_of(values, **by_hand)))
        assert found == pytest.approx(value, abs=1e-12), name
    assert float(losses.chosen_nll(pairs_of(values))) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [0.0, 400.0])
def test_stays_finite(name, size):
    """Replies of probability near 1, and log-ratios as large as a bad step makes them."""
    values = np.array([[-1e-7 - size, -1e-9], [-1e-7, -1e-9 - size], [-1e-7, -1e-7], [-1e-7, -1e-7]])
    found = LOSSES[name].function(pairs_of(values, dtype=torch.float32))
    assert found.isfinite().all()
    single = pairs_of(values, dtype=torch.float32)
    leaf = single.policy_chosen.requires_grad_()
    LOSSES[name].function(single).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].coupled])
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4]], [[0, 3], [1, 2, 4]], [[2], [0], [4], [1], [3]]])
def test_parts_of_a_coupled_batch_add_up_to_the_whole(name, parts):
    loss, values = LOSSES[name].function, numbers(5)
    whole, of_whole = loss(pairs_of(values)).detach().numpy(), gradient(loss, values)
    for part in parts:
        rest = [place for place in range(5) if place not in part]
        mine, others = _picked(values, part), _picked(values, rest) if rest else None
        leaves = [mine.policy_chosen.requires_grad_(), mine.policy_rejected.requires_grad_()]
        found = losses.among(loss, mine, others)
        found.sum().backward()
        np.testing.assert_allclose(found.detach().sum(), whole[part].sum(), rtol=1e-12)
        np.testing.assert_allclose(np.stack([leaf.grad for leaf in leaves]), of_whole[:, part], rtol=1e-10, atol=1e-14)


def _picked(values: Array, places: list[int]) -> Pairs:
    chosen, rejected = (torch.tensor(row[places]) for row in LENGTHS)
    return replace(pairs_of(values[:, places]), chosen_length=chosen, rejected_length=rejected)


def test_a_running_mean_is_exact_however_it_is_fed_and_saved():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    at_once, one_by_one = losses.RunningMean(), losses.RunningMean()
    assert at_once.value == 0.0
    at_once.update(values)
    for value in values:
        one_by_one.update(value)
        saved = json.loads(json.dumps(one_by_one.state_dict()))
        one_by_one = losses.RunningMean()
        one_by_one.load_state_dict(saved)
    assert one_by_one.value == pytest.approx(values.double().mean().item(), abs=1e-12)
    assert at_once.value == pytest.approx(one_by_one.value, abs=1e-12)


DPO_OF_TRL = {
    "hinge": "hinge", "ipo": "ipo", "exo": "exo_pair", "nca": "nca_pair", "robust": "robust", "bco": "bco_pair",
    "sppo": "sppo_hard", "aot": "aot", "aot_unpaired": "aot_unpaired", "apo_zero": "apo_zero", "apo_down": "apo_down",
    "discopop": "discopop", "sigmoid_norm": "sigmoid_norm", "sigmoid": "sigmoid",
}  # fmt: skip


@pytest.mark.parametrize("name", DPO_OF_TRL)
def test_equals_trls_dpo(name):
    """TRL's own code, on a model that says the log-probabilities; two things of the paper are missing in it."""
    missing = {"sigmoid": {"label_smoothing": 0.0}, "bco": {"delta": 0.0}}.get(name, {})
    values = numbers(6)
    found = LOSSES[name].function(pairs_of(values, dtype=torch.float32, **missing)).mean()
    assert float(found) == pytest.approx(_loss_of_trls_dpo(DPO_OF_TRL[name], values), rel=1e-5)


def _loss_of_trls_dpo(kind: str, values: Array) -> float:
    from trl import DPOTrainer

    longest = int(LENGTHS.max())
    mask = torch.zeros(10, longest + 1, dtype=torch.long)
    logprobs = torch.zeros(10, longest)
    for row, (length, total) in enumerate(zip(LENGTHS.flatten(), values[:2].flatten(), strict=True)):
        mask[row, 1 : int(length) + 1] = 1
        logprobs[row, : int(length)] = total / length
    output = SimpleNamespace(
        log_probs=logprobs, entropy=logprobs, mean_logits=logprobs, is_top1=torch.zeros_like(logprobs, dtype=torch.bool)
    )
    unchanged = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=unchanged, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0],
        beta=SETTINGS["beta"], label_smoothing=SETTINGS["label_smoothing"], use_weighting=False,
        args=SimpleNamespace(discopop_tau=SETTINGS["tau"]), _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )  # fmt: skip
    reference = torch.tensor(values[2:], dtype=torch.float32)
    inputs = {
        "input_ids": mask, "completion_mask": mask, "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]
    }  # fmt: skip
    return float(DPOTrainer._compute_loss(trainer, lambda **_: output, inputs, False))


@pytest.mark.parametrize(("name", "kind"), [("cpo", "sigmoid"), ("cpo_hinge", "hinge"), ("simpo", "simpo")])
def test_equals_trls_cpo(name, kind, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    pairs = pairs_of(numbers(7))
    trainer: Any = SimpleNamespace(
        alpha=0.0, beta=pairs.beta, label_smoothing=pairs.label_smoothing, simpo_gamma=pairs.gamma, loss_type=kind,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    averaged = kind == "simpo"
    given = (pairs.chosen_mean, pairs.rejected_mean) if averaged else (pairs.policy_chosen, pairs.policy_rejected)
    expected, _, _ = CPOTrainer.cpo_loss(trainer, *given)
    torch.testing.assert_close(LOSSES[name].function(pairs), expected)


def test_equals_trls_orpo(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    pairs = pairs_of(numbers(8), dtype=torch.float32)
    trainer: Any = SimpleNamespace(beta=pairs.beta, accelerator=SimpleNamespace(device="cpu"))
    ratio, *_ = ORPOTrainer.odds_ratio_loss(trainer, pairs.chosen_mean, pairs.rejected_mean)
    torch.testing.assert_close(losses.orpo(pairs), losses.chosen_nll(pairs) - ratio)
