"""APOLLO and the norm-growth limiter, against the paper's formulas computed a second time."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import pytest
import torch

from ftrun.worker.optim.adamw import AdamW
from ftrun.worker.optim.apollo import Apollo, gaussian
from ftrun.worker.optim.norm_growth import limit
from ftrun.worker.optim.ruled import Ruled

ADAM = AdamW(beta1=0.8, beta2=0.9, eps=1e-8)
WIDE, TALL, SQUARE, EXPERTS = (12, 20), (20, 12), (16, 16), (3, 12, 20)


def gradients(shape, steps, seed=0):
    """Gradients with rows, columns and steps of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(shape[-1], generator=generator) + 0.1
    return [
        torch.randn(shape, generator=generator) * lengths * 10 ** (torch.rand(1, generator=generator) * 2 - 3)
        for _ in range(steps)
    ]


def as_published(weight, grads, *, rank, left, interval, root, tensorwise, growth, lr, decay):
    """Algorithm 1 of the paper for one matrix, in the words of the paper: W is m x n and R = P G."""
    weight = weight.double() if left else weight.double().T
    rows, columns = weight.shape
    mean, square = torch.zeros(rank, columns).double(), torch.zeros(rank, columns).double()
    last, lengths = None, []
    for step, grad in enumerate(grads):
        grad = grad.double() if left else grad.double().T
        projection = gaussian(rows, rank, 5, step // interval, torch.device("cpu")).double().T
        small = projection @ grad
        mean = 0.8 * mean + 0.2 * small
        square = 0.9 * square + 0.1 * small**2
        count = step + 1
        direction = mean / (1 - 0.8**count) / ((square / (1 - 0.9**count)) ** 0.5 + 1e-8)
        if tensorwise:
            scaled = grad * (direction.norm() / small.norm())
        else:
            factors = [direction[:, one].norm() / small[:, one].norm() for one in range(columns)]
            scaled = grad @ torch.diag(torch.stack(factors))
        scaled = root * scaled
        if growth and last is not None and scaled.norm() / last > growth:
            scaled = scaled / scaled.norm() * growth * last
        last = scaled.norm()
        lengths.append(float(last))
        weight = weight - lr * scaled - lr * decay * weight
    return (weight if left else weight.T), lengths


def run(rule, weight, grads, lr=0.01, decay=0.0):
    weight = weight.clone()
    state = rule.start(weight)
    for grad in grads:
        rule.update([weight], [grad.clone().to(weight.dtype)], [state], lr=lr, weight_decay=decay)
    return weight, state


@pytest.mark.parametrize("tensorwise", [False, True], ids=["channel", "tensor"])
@pytest.mark.parametrize("side", [None, True, False], ids=["std", "left", "right"])
@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
def test_fifty_steps_are_those_of_the_paper(shape, side, tensorwise):
    rank, weight, grads = 1 if tensorwise else 4, torch.randn(shape), gradients(shape, 50)
    rule = Apollo(
        adam=ADAM, rank=rank, update_interval=7, scale=2.0, tensorwise=tensorwise, left=side, seed=5, growth=1.01
    )
    left = shape[0] < shape[1] if side is None else side
    ours, _ = run(rule, weight, grads, decay=0.1)
    theirs, _ = as_published(
        weight, grads, rank=rank, left=left, interval=7, root=math.sqrt(2.0), tensorwise=tensorwise, growth=1.01,
        lr=0.01, decay=0.1,
    )  # fmt: skip
    assert float((ours - theirs).abs().max()) < 1e-5


def test_several_matrices_are_each_their_own():
    weight, grads = torch.randn(EXPERTS), gradients(EXPERTS, 20)
    rule = Apollo(adam=ADAM, rank=4, update_interval=7)
    together, state = run(rule, weight, grads)
    for number in range(3):
        alone, _ = run(rule, weight[number], [grad[number] for grad in grads])
        assert torch.allclose(together[number], alone, atol=1e-6)
    assert state["last"].shape == (3, 1, 1)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_bfloat16_follows_float32(shape):
    """What differs is the rounding of the moments and of the weight to 8 bits, fifty times."""
    weight = torch.zeros(shape).bfloat16()
    grads = [grad.bfloat16() for grad in gradients(shape, 50)]
    rule = Apollo(adam=ADAM, rank=4, update_interval=7)
    ours, state = run(rule, weight, grads)
    theirs, _ = run(rule, weight.float(), grads)
    assert state["exp_avg"].dtype == torch.bfloat16
    assert float((ours.float() - theirs).norm()) < 0.1 * float(theirs.norm())


def test_a_leap_is_limited_and_a_fall_is_not():
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(WIDE, generator=generator) for _ in range(102)]
    grads = [*noise[:100], noise[100] * 1000, noise[101] * 1e-3, noise[101] * 0, noise[101]]
    lengths = {}
    for growth in (0.0, 1.01):
        rule, weight = Apollo(adam=AdamW(), rank=4, growth=growth), torch.zeros(WIDE)
        state, lengths[growth] = rule.start(weight), []
        for grad in grads:
            weight.zero_()
            rule.update([weight], [grad.clone()], [state], lr=1.0, weight_decay=0.0)
            lengths[growth].append(float(weight.norm()))
    free, limited = lengths[0.0], lengths[1.01]
    assert free[100] > 3 * free[99]
    assert limited[100] == pytest.approx(1.01 * limited[99], rel=1e-5)
    assert all(after <= 1.0101 * before for before, after in pairwise(limited[:102]))
    assert any(after < 0.9 * before for before, after in pairwise(limited[:100]))
    assert limited[102] == 0.0
    assert limited[103] == pytest.approx(free[103], rel=1e-5)  # From nothing, any growth is endless.


def test_the_limit_does_not_depend_on_the_unit():
    """So it is one whether updates are multiplied by the scale before it or after it."""
    factors = []
    for unit in (1.0, 64.0):
        last = torch.zeros(1, 1)
        factors.append([float(limit(torch.tensor([[unit * norm]]), last, 1.01)) for norm in (1.0, 3.0, 0.5, 2.0)])
    assert factors[0] == pytest.approx(factors[1])
    assert factors[0] == pytest.approx([1.0, 1.01 / 3, 1.0, 0.505 / 2])


@pytest.mark.parametrize("method", [None, "svd"])
def test_resumes_within_an_interval(method):
    """From a checkpoint, by a rule with another seed, and without a draw from the common generator."""
    grads = gradients(WIDE, 12)

    def made(seed, weight):
        groups = [{"params": [weight], "lr": 0.01, "weight_decay": 0.1, "rule": "projected"}]
        return Ruled(groups, {"projected": Apollo(adam=ADAM, rank=4, update_interval=5, method=method, seed=seed)})

    def steps(optimizer, weight, some):
        for grad in some:
            weight.grad = grad.clone()
            optimizer.step()

    weight = torch.nn.Parameter(torch.randn(WIDE))
    before, common = weight.detach().clone(), torch.get_rng_state()
    optimizer = made(7, weight)
    steps(optimizer, weight, grads[:7])
    saved = io.BytesIO()
    torch.save((weight.detach(), optimizer.state_dict()), saved)
    steps(optimizer, weight, grads[7:])
    saved.seek(0)
    values, state = torch.load(saved, weights_only=True)
    again = torch.nn.Parameter(values)
    resumed = made(8, again)
    resumed.load_state_dict(state)
    steps(resumed, again, grads[7:])
    assert torch.equal(weight, again)
    assert torch.equal(torch.get_rng_state(), common)
    other = torch.nn.Parameter(before)
    steps(made(8, other), other, grads)
    assert torch.equal(weight, other) is (method is not None)


@pytest.mark.parametrize(("shape", "rank", "method", "basis"), [
    (WIDE, 4, None, 0), (TALL, 4, None, 0), (WIDE, 1, None, 0), (WIDE, 4, "svd", 12 * 4),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_two_moments_of_the_projection(shape, rank, method, basis, dtype):
    """2 n r numbers for a matrix of m x n with m <= n, as the paper's table says, and a few numbers."""
    weight = torch.randn(shape).to(dtype)
    _, state = run(Apollo(adam=ADAM, rank=rank, method=method, update_interval=2), weight, gradients(shape, 5))
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    large = [value for value in tensors if value.numel() > 1]
    assert sum(value.numel() for value in large) == 2 * 20 * rank + basis
    assert all(value.dtype == dtype for value in large)
    assert len(state) - len(large) == 4


def test_a_projection_is_drawn_once_an_interval_for_all_of_its_size():
    rule = Apollo(adam=ADAM, rank=4, update_interval=3)
    weights = [torch.randn(WIDE), torch.randn(TALL), torch.randn(16, 30)]
    states = [rule.start(weight) for weight in weights]
    seen = []
    for _ in range(6):
        rule.update(weights, [torch.randn_like(weight) for weight in weights], states, lr=0.0, weight_decay=0.0)
        seen.append({size: projection for (size, *_), (_, projection) in rule._drawn.items()})
    assert [set(one) for one in seen] == [{12, 16}] * 6
    assert [seen[0][12] is one[12] for one in seen] == [True] * 3 + [False] * 3
    assert not torch.allclose(seen[0][12], seen[5][12])


def test_a_projection_keeps_lengths_on_average():
    device, vector = torch.device("cpu"), torch.randn(64)
    squares = [float((vector @ gaussian(64, 4, 0, number, device)).square().sum()) for number in range(2000)]
    assert sum(squares) / 2000 == pytest.approx(float(vector.square().sum()), rel=0.06)


@pytest.mark.parametrize(("rank", "tensorwise"), [(16, False), (1, True)])
def test_by_default_a_step_is_as_long_as_adams(rank, tensorwise):
    """After steps of noise, in which Adam's moments have settled."""
    shape = (64, 256)
    grads = [torch.randn(shape, generator=torch.Generator().manual_seed(number)) for number in range(60)]
    lengths = []
    for rule in (Apollo(adam=ADAM, rank=rank, tensorwise=tensorwise), ADAM):
        weight, _ = run(rule, torch.zeros(shape), grads[:-1])
        after, _ = run(rule, torch.zeros(shape), grads)
        lengths.append(float((after - weight).norm()))
    assert lengths[0] == pytest.approx(lengths[1], rel=0.25)


def test_a_channel_without_a_gradient_stays():
    grads = gradients(WIDE, 5)
    for grad in grads[2:]:
        grad[:, 3] = 0.0
    before, _ = run(Apollo(adam=ADAM, rank=4), torch.ones(WIDE), grads[:2])
    after, _ = run(Apollo(adam=ADAM, rank=4), torch.ones(WIDE), grads)
    assert torch.equal(before[:, 3], after[:, 3])
    assert bool(after.isfinite().all())


def test_a_rate_of_zero_moves_nothing():
    weight = torch.randn(WIDE)
    after, _ = run(Apollo(adam=ADAM, rank=4), weight, gradients(WIDE, 3), lr=0.0, decay=0.1)
    assert torch.equal(weight, after)


@pytest.mark.parametrize("growth", [0, 1.01])
def test_a_channel_whose_gradient_all_but_vanishes_makes_no_long_step(growth):
    rule, weight = Apollo(adam=ADAM, rank=4, growth=growth, seed=5), torch.zeros(16, 32)
    state, grads = rule.start(weight), gradients((16, 32), 4)
    for grad in grads[:3]:
        rule.update([weight], [grad.clone()], [state], lr=1.0, weight_decay=0.0)
    before, usual = weight.clone(), float(weight.norm())
    grads[3] = grads[2].clone()
    grads[3][:, 7] *= 1e-25
    rule.update([weight], [grads[3]], [state], lr=1.0, weight_decay=0.0)
    step = weight - before
    assert float(step.norm()) < usual
    assert float(step[:, 7].norm()) < float(step.norm()) / 2
