"""Low-rank adapters, by peft."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.errors import ConfigError, Problem, did_you_mean
from ftrun.fields import ranged
from ftrun.plugin import Adapter, ModelHead, register

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from ftrun.config import Config
    from ftrun.worker.training import Run


class Init(StrEnum):
    """How the two factors start."""

    default = "default"
    gaussian = "gaussian"
    orthogonal = "orthogonal"
    pissa = "pissa"
    pissa_niter_4 = "pissa_niter_4"
    pissa_niter_16 = "pissa_niter_16"
    olora = "olora"
    eva = "eva"
    lora_ga = "lora_ga"

    @property
    def changes_base(self) -> bool:
        """Whether it takes the start of the factors out of the frozen weights."""
        return self.value.startswith("pissa") or self in (Init.olora, Init.lora_ga)


@register
@dataclass(kw_only=True)
class LoRA(Adapter):
    """Train a low-rank update of linear layers (https://arxiv.org/abs/2106.09685)."""

    # "LoRA Without Regret" (https://thinkingmachines.ai/blog/lora/) finds the best rate at about ten times that of
    # full fine-tuning, over many models and data sets.
    lr_scale: ClassVar[float] = 10.0
    two_factors: ClassVar[bool] = True
    name: str = "lora"

    rank: int = ranged(16, ge=1)
    """Rank of the update: more learns more, and takes more memory."""

    alpha: float = ranged(32.0, gt=0)
    """The update is scaled by ``alpha / rank``."""

    dropout: float = ranged(0.0, ge=0, lt=1)
    """Share of the update's inputs that is zeroed in training."""

    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """The linear layers that get an update: names (``[q_proj,v_proj]``), or all but the head. Of a multimodal model,
    those of its language model."""

    media_encoders: bool = False
    """Put updates also into what turns media into embeddings in a multimodal model: vision tower, projector."""

    exclude: list[str] = field(default_factory=list)
    """Layers to leave alone among the targets."""

    modules_to_save: list[str] = field(default_factory=list)
    """Modules to train and save whole beside the update (``[lm_head,embed_tokens]``)."""

    use_rslora: bool = False
    """Scale by ``alpha / sqrt(rank)``, which keeps high ranks learning (https://arxiv.org/abs/2312.03732)."""

    use_dora: bool = False
    """Train magnitude and direction apart (https://arxiv.org/abs/2402.09353): better at low rank, slower."""

    init: Init = Init.default
    """Start of the factors: peft's default, gaussian or orthogonal; from the weights by singular vectors
    (pissa, https://arxiv.org/abs/2404.02948, exact or in so many iterations) or QR (olora,
    https://arxiv.org/abs/2406.01775); from activations on the data (eva, https://arxiv.org/abs/2410.07170) or from its
    gradient (lora_ga, https://arxiv.org/abs/2407.05000)."""

    init_batches: int = ranged(8, ge=1)
    """Batches of the training rows that ``init=eva`` and ``init=lora_ga`` look at."""

    @property
    def off_is_start(self) -> bool:
        """Whether the frozen weights are left as they were."""
        return not self.init.changes_base

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield the combinations that peft computes wrongly or not at all."""
        if self.use_dora and self.init is not Init.default:
            why = "DoRA's magnitudes would be left out when the adapter is converted for saving"
            yield Problem(
                "adapter.init",
                f"{self.init} does not go with DoRA: {why}",
                "adapter.init=default, or adapter.use_dora=false",
            )
        if self.init is Init.orthogonal and self.rank % 2:
            yield Problem(
                "adapter.rank",
                "the orthogonal start splits the rank in halves, so it must be even",
                f"adapter.rank={self.rank + 1}",
            )
        if self.init not in (Init.eva, Init.lora_ga) and self.init_batches != type(self).init_batches:
            yield Problem(
                "adapter.init_batches",
                f"adapter.init={self.init} does not look at data",
                "adapter.init=eva, or lora_ga",
            )
        if self.init is Init.lora_ga and cfg.stage.head is not ModelHead.causal:
            message = f"lora_ga starts from the gradient of predicting tokens, which stage={cfg.stage.name} does not do"
            yield Problem("adapter.init", message, "adapter.init=eva, pissa or default")

    def apply(self, model: nn.Module, run: Run) -> nn.Module:
        """Freeze the weights and put an update beside each target layer.

        Raises:
            ConfigError: The model has no layers of the given names.
        """
        from peft import get_peft_model

        from ftrun.worker.media import encoders

        self._check_names(model)
        config = self._config(run.cfg.stage.head)
        of_media = encoders.linear_layers(model, wanted=self.media_encoders)
        if of_media and not self.media_encoders:
            config.exclude_modules = [*self.exclude, *of_media]
        if self.init is Init.lora_ga:
            if self.targets == ["all-linear"]:  # which only get_peft_model understands
                config.target_modules = _linear_layers(model) - set(config.exclude_modules or ())
            from peft.tuners.lora.loraga import preprocess_loraga

            preprocess_loraga(model, config, train_step=lambda: _accumulate_gradients(model, run, self.init_batches))
        adapted = get_peft_model(model, config)
        if self.init is Init.eva:
            from peft import initialize_lora_eva_weights

            initialize_lora_eva_weights(adapted, _seen(run, self.init_batches))
        if self.init.changes_base and run.is_main:
            self._keep_start(adapted, run)
        return adapted

    def outline(self, model: nn.Module, run: Run) -> nn.Module:
        """Put the updates beside the layers, whatever they would start as."""
        return replace(self, init=Init.default).apply(model, run)

    def save(self, model: PreTrainedModel, folder: Path, run: Run) -> None:
        """Write the adapter; one whose start was taken out of the base is converted to fit the base as it was."""
        start = _start_folder(run) if self.init.changes_base else None
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(start) if start else None)
        if start:
            _add_whole_modules(model, folder)
            shutil.rmtree(start)

    def _config(self, head: ModelHead) -> LoraConfig:
        from peft import LoraConfig

        whole = [*self.modules_to_save, *(name for name in head.modules if name not in self.modules_to_save)]
        more: dict[str, Any] = {"modules_to_save": whole} if whole else {}
        if self.init is Init.lora_ga:
            from peft import LoraGAConfig

            more["lora_ga_config"] = LoraGAConfig()
        if self.init is Init.eva:
            from peft import EvaConfig

            more["eva_config"] = EvaConfig(rho=1.0)  # no redistribution of rank: every layer has the rank asked for
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="all-linear" if self.targets == ["all-linear"] else list(self.targets),
            exclude_modules=list(self.exclude) or None,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=True if self.init is Init.default else self.init.value,
            task_type=head.value,
            **more,
        )

    def _check_names(self, model: nn.Module) -> None:
        modules = [name for name, _ in model.named_modules() if name]
        last_names = sorted(
            {name.rpartition(".")[2] for name, module in model.named_modules() if not list(module.children())}
        )
        problems = []
        for key in ("targets", "exclude", "modules_to_save"):
            for wanted in getattr(self, key):
                if wanted != "all-linear" and not any(
                    name == wanted or name.endswith(f".{wanted}") for name in modules
                ):
                    near = did_you_mean(wanted, last_names)
                    problems.append(
                        Problem(
                            f"adapter.{key}",
                            f"the model has no module {wanted}{near}",
                            f"names among {', '.join(last_names)}",
                        )
                    )
        if problems:
            raise ConfigError(problems)

    def _keep_start(self, model: PeftModel, run: Run) -> None:
        """Keep the adapter as it starts: the trained one is saved as the difference from it."""
        name = model.active_adapter
        asked_for = model.peft_config[name].init_lora_weights
        model.peft_config[name].init_lora_weights = True
        model.save_pretrained(str(_start_folder(run)))
        model.peft_config[name].init_lora_weights = asked_for


def _linear_layers(model: nn.Module) -> set[str]:
    """Return the names of the linear layers that peft calls all-linear: all but the output head."""
    from torch import nn

    head = model.get_output_embeddings()  # type: ignore[operator]
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


def _seen(run: Run, count: int) -> list[dict[str, torch.Tensor]]:
    """Return the batches that eva looks at: their learned tokens, or all of them where no token is predicted."""
    batches = run.batches(count)
    if run.cfg.stage.head is ModelHead.causal:
        return batches
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]


def _add_whole_modules(model: PreTrainedModel, folder: Path) -> None:
    """Write the modules that train whole into a converted adapter: peft converts the factors, and drops all else."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    trained = get_peft_model_state_dict(model, save_embedding_layers=False)
    whole = {name: weight.detach().cpu().clone() for name, weight in trained.items() if ".lora_" not in name}
    if whole:
        save_file(load_file(file) | whole, file, metadata={"format": "pt"})


def _start_folder(run: Run) -> Path:
    return run.folder / "adapter_start"


def _accumulate_gradients(model: nn.Module, run: Run, count: int) -> None:
    for batch in run.batches(count):
        model(**batch).loss.backward()
