"""Direct preference optimization, and the losses that followed it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from ftrun.anchor import Anchored
from ftrun.errors import Problem
from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.stage._pairs import PairStage

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.record import Result


class Loss(StrEnum):
    """What is made of how much likelier the policy makes both replies than the reference does."""

    sigmoid = "sigmoid"
    robust = "robust"
    hinge = "hinge"
    ipo = "ipo"
    exo = "exo"
    nca = "nca"
    bco = "bco"
    sppo = "sppo"
    aot = "aot"
    aot_unpaired = "aot_unpaired"
    apo_zero = "apo_zero"
    apo_down = "apo_down"
    discopop = "discopop"
    kto_pair = "kto_pair"
    sigmoid_norm = "sigmoid_norm"

    @property
    def reads_label_smoothing(self) -> bool:
        """Whether ``label_smoothing`` changes it."""
        return self in (Loss.sigmoid, Loss.robust, Loss.exo, Loss.aot, Loss.aot_unpaired)


@register
@dataclass(kw_only=True)
class DPO(Anchored, PairStage):
    """Train on pairs of a better and a worse reply (https://arxiv.org/abs/2305.18290)."""

    name: str = "dpo"

    loss: Loss = Loss.sigmoid
    """The loss of a pair: sigmoid (DPO; cDPO with ``label_smoothing``), robust, hinge (SLiC), ipo, exo, nca, bco, sppo,
    aot, aot_unpaired, apo_zero, apo_down, discopop, kto_pair, or sigmoid_norm (means over tokens in place of sums)."""

    loss_weight: float = ranged(1.0, gt=0)
    """Weight of ``loss``, where other terms stand beside it."""

    mix: list[Loss] = field(default_factory=list)
    """Further losses that are added to it (``stage.mix=[bco]``)."""

    mix_weights: list[float] = field(default_factory=list)
    """The weight of each of them."""

    ftx: float = ranged(0.0, ge=0)
    """Weight of the better reply's mean negative log-likelihood, as in supervised fine-tuning."""

    beta: float = ranged(0.1, gt=0)
    """How closely the policy stays to the reference: higher is closer."""

    label_smoothing: float = ranged(0.0, ge=0, lt=0.5)
    """Probability that a preference is the wrong way round: of sigmoid, robust, exo (above 0), aot and aot_unpaired."""

    discopop_tau: float = ranged(0.05, gt=0)
    """Temperature of discopop: lower passes more suddenly from its logistic to its exponential form."""

    ld_alpha: float = ranged(1.0, ge=0, le=1)
    """How much the tokens of a reply count that are beyond the length of the other one (LD-DPO,
    https://arxiv.org/abs/2409.06411): below 1, long replies are no longer preferred for their length."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield keys that the chosen losses do not read, or lack."""
        losses = [self.loss, *self.mix]
        if len(self.mix) != len(self.mix_weights):
            message = f"{len(self.mix)} losses in stage.mix have {len(self.mix_weights)} weights"
            yield Problem("stage.mix_weights", message, "one weight for each: stage.mix=[bco] stage.mix_weights=[0.2]")
        if self.label_smoothing and not any(loss.reads_label_smoothing for loss in losses):
            message = f"stage.loss={self.loss} does not read it"
            yield Problem("stage.label_smoothing", message, "stage.loss=sigmoid, robust, exo or aot, or without it")
        if Loss.exo in losses and not self.label_smoothing:
            message = "exo measures a divergence from the smoothed label, which is infinite without smoothing"
            yield Problem("stage.label_smoothing", message, "stage.label_smoothing=1e-3")
        if Loss.discopop not in losses and self.discopop_tau != type(self).discopop_tau:
            yield Problem("stage.discopop_tau", f"stage.loss={self.loss} does not read it", "stage.loss=discopop")
        yield from self.check_reference(cfg, can_precompute=True)

    def run(self, cfg: Config) -> Result:
        """Load, encode, note what the reference thinks, train, and say how it went."""
        from ftrun.worker import preference

        objective = preference.Objective(
            losses=[(self.loss, self.loss_weight), *zip(self.mix, self.mix_weights, strict=True)],
            settings={"beta": self.beta, "label_smoothing": self.label_smoothing, "tau": self.discopop_tau},
            nll_weight=self.ftx,
            tail_weight=None if self.ld_alpha == 1 else self.ld_alpha,
        )
        return preference.train(cfg, objective)
