"""LoRA: what is trained beside the factors is saved with them."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

SMALL = (
    "stage=sft",
    "model=tiny",
    "data.rows=16",
    "train.max_steps=3",
    "train.log_every=1",
    "optimizer.lr=1e-2",
    "stage.num_samples=0",
)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_module_that_trains_whole_is_saved_with_a_converted_adapter(ftrun, init):
    words = ("adapter=lora", f"adapter.init={init}", "adapter.modules_to_save=[lm_head]")
    done = ftrun(*SMALL, *words).sees(0)
    saved = load_file(done.folder / "model/adapter_model.safetensors")
    assert saved["base_model.model.lm_head.weight"].shape == (1024, 64)
    again = ftrun(*SMALL, f"model.path={done.folder}", "train.max_steps=1").sees(0)
    ended, begins = done.metrics[-1]["eval_loss"], again.metrics[0]["eval_loss"]
    assert begins == pytest.approx(ended, abs=1e-5)
