"""Reward models to test with, and what they are asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ftrun as package
from ftrun import forkserver, launch, record
from ftrun.completions import Completion
from ftrun.config import Config

TRAIN = ("stage=rm", "model=tiny", "hardware=cpu", "data.rows=32", "train.max_steps=4", "optimizer.lr=1e-2")
POLICY = ("stage=ppo", "model=tiny", "hardware=cpu", "data.rows=8", "train.max_steps=2")


@pytest.fixture(scope="session")
def judged(server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of stage=rm, one for each adapter."""
    folder = tmp_path_factory.mktemp("judges")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(forkserver.VARIABLE, server)
        for adapter in ("full", "lora"):
            package.run([*TRAIN, f"adapter={adapter}", f"output_dir={folder / adapter}"])
    return {adapter: folder / adapter for adapter in ("full", "lora")}


@pytest.fixture
def replies_of() -> Callable[..., list[Completion]]:
    """Make replies of texts, with a policy's tokenizer."""

    def make(tokenizer: Any, *texts: str) -> list[Completion]:
        prompt = [{"role": "user", "content": "Name a fruit."}]
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
        return [
            Completion(
                prompt=prompt, answer=None, text=text, prompt_ids=prompt_ids, finished=True,
                ids=[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id],
            )
            for text in texts
        ]  # fmt: skip

    return make


@pytest.fixture
def policy_run(tmp_path: Path) -> Callable[..., Any]:
    """Freeze a run whose replies are judged, and return what its plugins are told of it, without rows."""
    from ftrun.worker import loading, training

    def make(*words: str) -> training.Run:
        overrides = [*POLICY, *words, f"output_dir={tmp_path / 'policy'}"]
        cfg = Config.load(launch.freeze(launch.check(overrides), overrides) / record.RUN)
        return training.Run(cfg, None, loading.tokenizer(cfg))  # type: ignore[arg-type]

    return make
