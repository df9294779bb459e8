"""GaLore's rule, against the package of its authors, and against the formulas of the papers."""

from __future__ import annotations

import io
import math
import warnings

import pytest
import torch
from torch import Tensor

from ftrun.worker.optim.adamw import AdamW
from ftrun.worker.optim.galore import Adafactor, AdamW8bit, GaLore
from ftrun.worker.optim.ruled import Ruled
from ftrun_plugins.optimizer._projected import Method
from ftrun_plugins.optimizer.galore import Projection

RANK, STEPS, INTERVAL = 4, 50, 7
SHAPES = [(12, 30), (30, 12), (16, 16)]
LR, DECAY, SCALE = 1e-2, 0.1, 0.5


def rule(**changed):
    settings = {
        "inner": AdamW(),
        "rank": RANK,
        "scale": SCALE,
        "update_interval": INTERVAL,
        "projection": Projection.std,
        "method": Method.svd,
        "spread": False,
        "seed": 0,
    }
    return GaLore(**settings | changed)


def start(shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(shape, dtype=torch.float32, steps=STEPS, seed=2):
    """What a training would have: a part that stays, and noise."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randn(shape, generator=generator)
    return [(kept + torch.randn(shape, generator=generator)).to(dtype) for _ in range(steps)]


def updated(rule, weight: Tensor, grads, state=None, lr=LR, decay=DECAY) -> Tensor:
    state = rule.start(weight) if state is None else state
    for grad in grads:
        rule.update([weight], [grad.clone()], [state], lr=lr, weight_decay=decay)
    return weight


def theirs(kind, weight: Tensor, grads, projection, **settings):
    """Let the package take the steps. Decay comes before each, where AdamW and we have it; it has it after them."""
    group = {"rank": RANK, "update_proj_gap": INTERVAL, "scale": SCALE, "proj_type": projection.value}
    parameter = torch.nn.Parameter(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        optimizer = kind([{"params": [parameter], **group}], lr=LR, weight_decay=0.0, **settings)
    for grad in grads:
        parameter.data.mul_(1 - LR * DECAY)
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.data


# With AdamW, full projection is compared with the formulas below: the first projected gradient is diagonal then, and
# what rounding leaves beside the diagonal makes steps of any sign.
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projection", [one for one in Projection if one is not Projection.full])
def test_takes_the_steps_of_the_package(shape, projection):
    galore_torch = pytest.importorskip("galore_torch")
    ours = updated(rule(projection=projection), start(shape), gradients(shape))
    expected = theirs(galore_torch.GaLoreAdamW, start(shape), gradients(shape), projection, eps=1e-8)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projection", Projection)
def test_takes_the_steps_of_the_package_with_adafactor(shape, projection):
    galore_torch = pytest.importorskip("galore_torch")
    ours = updated(rule(projection=projection, inner=Adafactor()), start(shape), gradients(shape))
    fixed = {"relative_step": False, "scale_parameter": False}
    expected = theirs(galore_torch.GaLoreAdafactor, start(shape), gradients(shape), projection, **fixed)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def by_the_formulas(weight: Tensor, grads, sides: str, eps: float) -> Tensor:
    """Algorithm 2 of the paper, with the sides named by L and R projected, in double precision."""
    weight, first, second = weight.double(), torch.tensor(0.0), torch.tensor(0.0)
    before = after = torch.tensor(0.0)
    for step, given in enumerate(grads):
        grad = given.double()
        if step % INTERVAL == 0:
            left, _, right = torch.linalg.svd(given.float(), full_matrices=False)
            before = left[:, :RANK].double() if "L" in sides else torch.eye(len(grad)).double()
            after = right[:RANK].double() if "R" in sides else torch.eye(grad.shape[1]).double()
        small = before.T @ grad @ after.T
        first = 0.9 * first + 0.1 * small
        second = 0.999 * second + 0.001 * small**2
        way = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + eps)
        weight = (1 - LR * DECAY) * weight - LR * SCALE * (before @ way @ after)
    return weight


SIDES = {"std": "RL", "reverse_std": "LR", "left": "LL", "right": "RR", "full": ("LR", "LR")}
"""The sides that are projected of a matrix that is tall or square, and of a wide one."""


def sides(projection, shape):
    return SIDES[projection][shape[0] < shape[1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projection", Projection)
def test_takes_the_steps_of_the_paper(shape, projection):
    ours = updated(rule(projection=projection, inner=AdamW(eps=1e-2)), start(shape), gradients(shape))
    expected = by_the_formulas(start(shape), gradients(shape), sides(projection, shape), 1e-2)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projection", Projection)
def test_takes_about_the_steps_of_the_paper_in_bfloat16(shape, projection):
    grads = gradients(shape, torch.bfloat16)
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    made = rule(projection=projection, inner=AdamW(eps=1e-2))
    state = made.start(weight)
    updated(made, weight, grads, state)
    assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq", "left", "right") if name in state} == {weight.dtype}
    expected = by_the_formulas(torch.zeros(shape), grads, sides(projection, shape), 1e-2)
    assert float((weight.double() - expected).norm()) < 0.1 * float(expected.norm())


@pytest.mark.parametrize("method", [Method.randomized, Method.subspace])
@pytest.mark.parametrize("shape", [(40, 120), (120, 40)])
def test_a_search_takes_the_steps_of_a_decomposition_where_the_spectrum_says_which(method, shape):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(shape[0], RANK, generator=generator), torch.randn(RANK, shape[1], generator=generator)
    wave = torch.tensor([8.0, 4.0, 2.0, 1.0])
    grads = [(left * (wave * (1.2 + math.sin(step)))) @ right for step in range(10)]
    found = updated(rule(method=method, update_interval=100), start(shape), grads) - start(shape)
    expected = updated(rule(update_interval=100), start(shape), grads) - start(shape)
    assert float((found - expected).norm()) < 1e-3 * float(expected.norm())


@pytest.mark.parametrize("projection", Projection)
@pytest.mark.parametrize("inner", [AdamW(), Adafactor()])
@pytest.mark.parametrize("method", Method)
def test_a_batch_of_matrices_is_as_good_as_each(projection, inner, method):
    shape = (2, 3, 12, 30)
    made = rule(projection=projection, inner=inner, method=method)
    whole = updated(made, start(shape), gradients(shape, steps=10))
    for place in ((0, 0), (1, 2)):
        alone = start(shape)[place].clone()
        updated(made, alone, [grad[place] for grad in gradients(shape, steps=10)])
        torch.testing.assert_close(whole[place], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("projection", "numbers"),
    [
        (Projection.std, lambda m, n, r: r * m + 2 * r * n),
        (Projection.reverse_std, lambda m, n, r: r * n + 2 * r * m),
        (Projection.full, lambda m, n, r: r * m + r * n + 2 * r * r),
    ],
)
@pytest.mark.parametrize("method", Method)
def test_the_state_has_the_size_that_the_paper_says(projection, numbers, method):
    m, n = 64, 96
    for shape in ((m, n), (n, m)):
        made = rule(projection=projection, method=method)
        state = made.start(start(shape))
        updated(made, start(shape), gradients(shape, steps=INTERVAL + 1), state)
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 4 * numbers(m, n, RANK) + 4
        outlined = made.start(start(shape).to("meta"))
        assert {name: getattr(value, "shape", None) for name, value in outlined.items()} == {
            name: getattr(value, "shape", None) for name, value in state.items()
        }
        assert set(state) - {"left", "right"} == {"exp_avg", "exp_avg_sq", "step", "count", "number"}


def test_eight_bits_are_those_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    shape = (8, 1000)
    inner = AdamW8bit(beta1=0.9, beta2=0.99, eps=1e-8)
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    state = inner.start(weight)
    for grad in gradients(shape, steps=20):
        weight.data.zero_()
        weight.grad = grad
        optimizer.step()
        torch.testing.assert_close(inner.direction(grad, state), weight.data, atol=1e-5, rtol=1e-5)
    assert sum(value.nbytes for value in state.values() if isinstance(value, Tensor)) == 2 * (8000 + 4 * 32)


def test_eight_bits_take_about_the_steps_of_thirty_two():
    pytest.importorskip("bitsandbytes")
    shape = (64, 300)
    eight = updated(rule(inner=AdamW8bit(0.9, 0.999, 1e-8)), start(shape), gradients(shape)) - start(shape)
    exact = updated(rule(), start(shape), gradients(shape)) - start(shape)
    assert float((eight - exact).norm()) < 0.1 * float(exact.norm())


def refreshes(made, weight, steps, number=0):
    """Return the steps in which the basis changes."""
    state, last, found = made.start(weight, number), None, []
    for step, grad in enumerate(gradients(weight.shape, steps=steps)):
        made.update([weight], [grad], [state], lr=LR, weight_decay=0.0)
        if last is not state["left"]:
            found.append(step)
        last = state["left"]
    return found


def test_searches_are_spread_over_the_interval():
    weights = [start((6, 8), seed=seed) for seed in range(14)]
    assert all(refreshes(rule(rank=2), weight, 15) == [0, 7, 14] for weight in weights[:3])
    made = rule(rank=2, spread=True)
    spread = [refreshes(made, weight.clone(), 21, number) for number, weight in enumerate(weights)]
    for steps in spread:
        later = [step for step in steps if step]
        assert len(later) in (2, 3)
        assert {step % INTERVAL for step in later} == {later[0] % INTERVAL}
    assert [steps[1] % INTERVAL for steps in spread] == [*range(INTERVAL)] * 2


@pytest.mark.parametrize("method", Method)
def test_the_order_of_the_weights_changes_nothing(method):
    made, ends = rule(method=method, spread=True), []
    for order in (1, -1):
        weights = [start((40, 60), seed=seed) for seed in range(3)]
        states: list = [{}, {}, {}]
        for step in range(10):
            for number in range(3)[::order]:
                states[number] = states[number] or made.start(weights[number], number)
                grad = gradients((40, 60), seed=number, steps=step + 1)[-1]
                made.update([weights[number]], [grad], [states[number]], lr=LR, weight_decay=DECAY)
        ends.append(weights)
    assert all(bool((one == other).all()) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("inner", [AdamW(), Adafactor(), AdamW8bit(0.9, 0.999, 1e-8)])
@pytest.mark.parametrize("projection", [Projection.std, Projection.full])
def test_goes_on_in_the_middle_of_an_interval(dtype, method, inner, projection):
    if isinstance(inner, AdamW8bit):
        pytest.importorskip("bitsandbytes")

    def made():
        weights = [torch.nn.Parameter(start(shape, dtype)) for shape in ((40, 60), (60, 40))]
        group = {"params": weights, "lr": LR, "weight_decay": DECAY, "rule": "projected"}
        rules = {"projected": rule(method=method, inner=inner, projection=projection, spread=True)}
        return weights, Ruled([group], rules)

    def steps(weights, optimizer, numbers):
        for step in numbers:
            for weight in weights:
                weight.grad = gradients(weight.shape, dtype, steps=step + 1)[-1]
            optimizer.step()

    weights, optimizer = made()
    steps(weights, optimizer, range(10))
    saved = io.BytesIO()
    torch.save([optimizer.state_dict(), *(weight.data for weight in weights)], saved)
    steps(weights, optimizer, range(10, 20))
    saved.seek(0)
    state, *data = torch.load(saved, weights_only=True)
    again, resumed = made()
    for weight, value in zip(again, data, strict=True):
        weight.data.copy_(value)
    resumed.load_state_dict(state)
    steps(again, resumed, range(10, 20))
    assert all(bool((one == other).all()) for one, other in zip(weights, again, strict=True))


def test_a_rate_of_zero_and_a_decay_alone():
    weight = updated(rule(), start((12, 30)), gradients((12, 30), steps=9), lr=0.0)
    assert bool((weight == start((12, 30))).all())
    weight = updated(rule(), start((12, 30)), [torch.zeros(12, 30)] * 9)
    torch.testing.assert_close(weight, start((12, 30)) * (1 - LR * DECAY) ** 9)
