"""``optimizer=muon``: what it refuses, which weights it is for, and a run."""

from __future__ import annotations

import pytest

from ftrun import config

SMALL = ["model=tiny", "hardware=cpu", "adapter=full", "optimizer=muon"]


def problems(*words):
    return [(problem.key, problem.message) for problem in config.examine([*SMALL, *words])[1]]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.ns_coefficients=[3,-4]", "has 2 values"),
        ("optimizer.ns_coefficients=[4,-1,2]", "to inf in 5 steps"),
        ("optimizer.ns_coefficients=[0.1,0,0]", "beyond 1e-05 in 5 steps"),
    ],
)
def test_coefficients_that_make_nothing_orthogonal_are_refused(word, message):
    ((key, found),) = problems(word)
    assert key == "optimizer.ns_coefficients"
    assert message in found


def test_other_coefficients_and_steps_are_taken():
    assert not problems("optimizer.ns_coefficients=[2,-1.5,0.5]", "optimizer.ns_steps=12")
    assert not problems("optimizer.ns_steps=7")
    assert problems("optimizer.ns_steps=100")


def test_a_run_lowers_the_loss_with_matrices_faster_than_the_rest(ftrun):
    words = ["optimizer.lr=5e-3", "optimizer.scale=4", "train.micro_batch_size=4", "train.max_steps=12"]
    done = ftrun(*SMALL, *words, "train.log_every=1").sees()
    assert done.losses[-1] < 0.9 * done.losses[0]
    assert max(line.get("learning_rate", 0) for line in done.metrics) <= 5e-3


def test_matrices_are_its_own_and_the_rest_is_adams(tmp_path):
    from ftrun.conformance import _small_model, _small_run

    run = _small_run(tmp_path, SMALL)
    model = _small_model(run)
    made = run.cfg.optimizer.build(model, run)
    by_rule = {rule: set() for rule in made.rules}
    names = {id(weight): name for name, weight in model.named_parameters()}
    for group in made.param_groups:
        by_rule[group["rule"]] |= {names[id(weight)] for weight in group["params"]}
    assert by_rule["muon"] == {name for name in names.values() if "_proj" in name}
    assert by_rule["adamw"] == {name for name in names.values() if "_proj" not in name}
