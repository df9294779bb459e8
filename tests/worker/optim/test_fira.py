"""Fira, against the paper's formulas computed a second time."""

from __future__ import annotations

import io

import pytest
import torch

from ftrun.worker.optim.adamw import AdamW
from ftrun.worker.optim.fira import Fira
from ftrun.worker.optim.galore import GaLore
from ftrun.worker.optim.ruled import Ruled
from ftrun.worker.optim.subspace import leading

ADAM = AdamW(beta1=0.8, beta2=0.9, eps=1e-8)
WIDE, TALL, SQUARE, EXPERTS = (12, 20), (20, 12), (16, 16), (3, 12, 20)
PLAIN = {"inner": ADAM, "rank": 4, "scale": 2.0, "update_interval": 7, "method": "svd", "spread": False, "seed": 0}


def fira(projection="std", tensorwise=False, growth=1.01, **changed):
    return Fira(**PLAIN | changed, projection=projection, tensorwise=tensorwise, growth=growth)


def gradients(shape, steps, seed=0):
    """Gradients with columns and steps of different lengths, some of which leap."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(shape[-1], generator=generator) + 0.1
    return [
        torch.randn(shape, generator=generator) * lengths * 10 ** (torch.rand(1, generator=generator) * 2 - 3)
        for _ in range(steps)
    ]


def run(rule, weight, grads, lr=0.01, decay=0.0):
    weight = weight.clone()
    state = rule.start(weight)
    for grad in grads:
        rule.update([weight], [grad.clone().to(weight.dtype)], [state], lr=lr, weight_decay=decay)
    return weight, state


def as_published(weight, grads, *, left, tensorwise, growth, scale, lr, decay):
    """The paper's algorithm for one matrix: R = P^T G, S = phi(R) (G - P R), W - lr (P psi(R) + limited S)."""
    weight = weight.double() if left else weight.double().T
    mean = square = torch.zeros(4, weight.shape[1]).double()
    basis, last = None, None
    for step, grad in enumerate(grads):
        if step % 7 == 0:
            basis = leading(grad if left else grad.T, 4, "svd", None if basis is None else basis.float()).double()
        grad = grad.double() if left else grad.double().T
        small = basis.T @ grad
        mean, square = 0.8 * mean + 0.2 * small, 0.9 * square + 0.1 * small**2
        count = step + 1
        direction = mean / (1 - 0.8**count) / ((square / (1 - 0.9**count)) ** 0.5 + 1e-8)
        factor = direction.norm() / small.norm() if tensorwise else direction.norm(dim=0) / small.norm(dim=0)
        rest = (grad - basis @ small) * factor
        if growth and last is not None and rest.norm() / last > growth:
            rest = rest / rest.norm() * growth * last
        last = rest.norm()
        weight = weight - lr * scale * (basis @ direction + rest) - lr * decay * weight
    return weight if left else weight.T


@pytest.mark.parametrize("growth", [0.0, 1.01])
@pytest.mark.parametrize("tensorwise", [False, True], ids=["channel", "tensor"])
@pytest.mark.parametrize("projection", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
def test_fifty_steps_are_those_of_the_paper(shape, projection, tensorwise, growth):
    weight, grads = torch.randn(shape), gradients(shape, 50)
    tall = shape[0] >= shape[1]
    left = {"std": not tall, "reverse_std": tall, "left": True, "right": False}[projection]
    ours, _ = run(fira(projection, tensorwise, growth), weight, grads, decay=0.1)
    theirs = as_published(weight, grads, left=left, tensorwise=tensorwise, growth=growth, scale=2.0, lr=0.01, decay=0.1)
    assert float((ours - theirs).abs().max()) < 1e-5


def test_several_matrices_are_each_their_own():
    weight, grads = torch.randn(EXPERTS), gradients(EXPERTS, 20)
    together, _ = run(fira(), weight, grads)
    for number in range(3):
        alone, _ = run(fira(), weight[number], [grad[number] for grad in grads])
        assert torch.allclose(together[number], alone, atol=1e-5)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_bfloat16_follows_float32(shape):
    """What differs is the rounding of moments, basis and weight to 8 bits, fifty times."""
    weight = torch.zeros(shape).bfloat16()
    grads = [grad.bfloat16() for grad in gradients(shape, 50)]
    ours, _ = run(fira(), weight, grads)
    theirs, _ = run(fira(), weight.float(), grads)
    assert float((ours.float() - theirs).norm()) < 0.1 * float(theirs.norm())


def test_a_leap_of_the_rest_is_limited():
    """What is outside the subspace grows a thousandfold at once, and its step by a hundredth."""
    usual = torch.zeros(WIDE)
    usual[:4, :4] = torch.eye(4)
    beside = torch.zeros(WIDE)
    beside[5, 5:] = 0.1
    lengths = {}
    for growth in (0.0, 1.01):
        rule, weight = fira(growth=growth, tensorwise=True, scale=1.0, update_interval=100), torch.zeros(WIDE)
        state, lengths[growth] = rule.start(weight), []
        for grad in [usual + beside] * 5 + [usual + 1000 * beside] * 2 + [usual + beside]:
            weight.zero_()
            rule.update([weight], [grad.clone()], [state], lr=1.0, weight_decay=0.0)
            rest = weight - state["left"] @ (state["left"].T @ weight)
            lengths[growth].append(float(rest.norm()))
    free, limited = lengths[0.0], lengths[1.01]
    assert free[5] == pytest.approx(1000 * free[4], rel=1e-3)
    assert limited[5:7] == pytest.approx([1.01 * limited[4], 1.01**2 * limited[4]], rel=1e-4)
    assert limited[7] <= 1.01 * limited[6]


def test_a_rest_of_nothing_does_not_choke_the_next():
    """The first gradient lies within its own subspace; the second has a rest, which counts in full."""
    usual, after = torch.zeros(WIDE), torch.randn(WIDE)
    usual[:4, :4] = torch.eye(4)
    lengths = []
    for growth in (0.0, 1.01):
        before, _ = run(fira(growth=growth), torch.zeros(WIDE), [usual])
        both, _ = run(fira(growth=growth), torch.zeros(WIDE), [usual, after])
        lengths.append(float((both - before).norm()))
    assert lengths[1] == pytest.approx(lengths[0])


def test_the_state_is_galores_and_one_number():
    """m r + 2 n r + 1 numbers for a matrix of m x n with m <= n, as the paper's table says."""
    for shape in (WIDE, TALL):
        _, state = run(fira(), torch.randn(shape), gradients(shape, 3))
        large = [value.numel() for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 1]
        assert sum(large) == 12 * 4 + 2 * 20 * 4
        galore = GaLore(**PLAIN, projection="std")
        assert set(state) - set(run(galore, torch.randn(shape), gradients(shape, 3))[1]) == {"last"}
        assert state["last"].numel() == 1


@pytest.mark.parametrize("method", ["svd", "randomized", "subspace"])
@pytest.mark.parametrize("spread", [False, True])
def test_resumes_within_an_interval(method, spread):
    grads = gradients((40, 60), 12)

    def made(weight):
        groups = [{"params": [weight], "lr": 0.01, "weight_decay": 0.1, "rule": "projected"}]
        return Ruled(groups, {"projected": fira(method=method, spread=spread, update_interval=5)})

    def steps(optimizer, weight, some):
        for grad in some:
            weight.grad = grad.clone()
            optimizer.step()

    weight = torch.nn.Parameter(torch.randn(40, 60))
    common, optimizer = torch.get_rng_state(), made(weight)
    steps(optimizer, weight, grads[:7])
    saved = io.BytesIO()
    torch.save((weight.detach(), optimizer.state_dict()), saved)
    steps(optimizer, weight, grads[7:])
    saved.seek(0)
    values, state = torch.load(saved, weights_only=True)
    again = torch.nn.Parameter(values)
    resumed = made(again)
    resumed.load_state_dict(state)
    steps(resumed, again, grads[7:])
    assert torch.equal(weight, again)
    assert torch.equal(torch.get_rng_state(), common)


def test_a_rate_of_zero_moves_nothing_and_no_gradient_only_decays():
    weight = torch.randn(WIDE)
    after, _ = run(fira(), weight, gradients(WIDE, 3), lr=0.0, decay=0.1)
    assert torch.equal(weight, after)
    after, _ = run(fira(), weight, [torch.zeros(WIDE)], lr=0.1, decay=0.5)
    assert torch.allclose(after, 0.95 * weight)
