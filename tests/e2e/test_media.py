"""Multimodal models through the command line: trained, resumed, chained, and refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ftrun import record
from tests import vision_models
from tests.ended import comparable, weights

Image = pytest.importorskip("PIL.Image")

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
RUN = (
    "stage=sft", "hardware=cpu", "adapter=full", "optimizer.lr=2e-2", "train.max_steps=12", "train.log_every=1",
    "train.micro_batch_size=4", "data.max_length=128", "data.path=rows/rows.jsonl",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny Qwen2-VL."""
    folder = tmp_path_factory.mktemp("qwen2_vl")
    vision_models.qwen(folder)
    return f"model.path={folder}"


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows that ask for the colour of an image, one in four of them without an image."""

    def write(images: Sequence[str] = tuple(f"{name}.png" for name in COLOURS)) -> Path:
        folder = tmp_path / "rows"
        folder.mkdir(exist_ok=True)
        for number, (name, colour) in enumerate(COLOURS.items()):
            Image.new("RGB", (32 + 8 * number, 32), colour).save(folder / f"{name}.png")
        found: list[dict[str, Any]] = []
        for _ in range(4):
            for name, image in zip(COLOURS, images, strict=True):
                asked = [{"role": "user", "content": "<image>what colour is it"}]
                found.append({"messages": [*asked, {"role": "assistant", "content": name}], "images": [image]})
            plain = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a square"}]
            found.append({"messages": plain})
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        return folder

    return write


def test_the_loss_falls_and_the_next_run_starts_where_it_ended(ftrun, model, rows):
    rows()
    first = ftrun(*RUN, model, "data.eval_size=2").sees(0)
    assert first.losses[-1] < 0.6 * first.losses[0]
    assert first.manifest["data"]["train"]["media"] == {"image": 12}
    assert {"processor_config.json", "chat_template.jinja"} <= {
        file.name for file in (first.folder / "model").iterdir()
    }
    second = ftrun(*RUN, f"model.path={first.folder}", "adapter=lora", "train.max_steps=2").sees(0)
    assert second.losses[0] < 0.7 * first.losses[0]
    adapter = json.loads((second.folder / "model" / "adapter_config.json").read_text())
    assert any(".visual." in name for name in adapter["exclude_modules"])
    third = ftrun(*RUN, f"model.path={second.folder}", "adapter=freeze", "adapter.layers=1", "train.max_steps=1").sees(
        0
    )
    assert third.losses[0] < 0.7 * first.losses[0]


@pytest.mark.parametrize("family", ["llava", "gemma3", "idefics3", "qwen3_vl"])
@pytest.mark.slow
def test_other_families_learn_too(ftrun, rows, tmp_path, family):
    rows()
    vision_models.IMAGES[family](tmp_path / "model")
    done = ftrun(*RUN, f"model.path={tmp_path / 'model'}", "data.max_length=256").sees(0)
    assert done.losses[-1] < 0.6 * done.losses[0]


def test_resumed_with_images_equals_uninterrupted(ftrun, model, rows):
    rows()
    whole = ftrun(*RUN, model, "train.save_every=3", "train.keep_checkpoints=9").sees(0)
    with_worker = ftrun(*RUN, model, "hardware.data_workers=1").sees(0)
    assert comparable(with_worker.folder) == comparable(whole.folder)
    for step in (3, 6):
        copy = whole.folder.with_name(f"from{step}")
        shutil.copytree(whole.folder, copy)
        for checkpoint in record.checkpoints(copy):
            if record.step_of(checkpoint) > step:
                shutil.rmtree(checkpoint)
        shutil.rmtree(copy / "model")
        result = json.loads((copy / "result.json").read_text())
        gone = {"host": os.uname().nodename, "pid": 2**22 + 1, "started": 1.0}
        (copy / "result.json").write_text(json.dumps(result | {"status": "running", "holder": gone}))
        ftrun("resume", copy.name).sees(0)
        assert comparable(copy) == comparable(whole.folder), step
        assert weights(copy) == weights(whole.folder) == weights(with_worker.folder), step


def test_pairs_with_images(ftrun, model, rows):
    folder = rows()
    found = [
        {
            "prompt": [{"role": "user", "content": "<image>what colour"}],
            "chosen": name,
            "rejected": "a square",
            "images": [f"{name}.png"],
        }
        for name in COLOURS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    done = ftrun(*RUN, "stage=dpo", model, "train.max_steps=4").sees(0)
    assert done.metrics[-1]["rewards_margins"] > 0


def test_streamed_rows_with_images(ftrun, model, rows):
    rows()
    done = ftrun(*RUN, model, "data.streaming=true", "data.shuffle_buffer=8").sees(0)
    assert done.losses[-1] < 0.6 * done.losses[0]


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("gone.png", "names an image that is not there"),
        ("rows.jsonl", "has an image that cannot be read"),
        ("../red.png", "names an image outside data.media_folder"),
        ("https://example.invalid/a.png", "names an image by an address, which is not fetched unasked"),
    ],
)
def test_an_image_that_cannot_be_used_ends_the_run_with_its_place(ftrun, model, rows, image, says):
    rows(["red.png", image, "blue.png"])
    done = ftrun(*RUN, model).sees(2)
    assert "rows.jsonl:2: " in done.err
    assert says in done.err
    assert "rows.jsonl:6: " in done.err
    skipped = ftrun(*RUN, model, "data.on_bad_row=skip", "data.max_bad_share=0.5", "train.max_steps=1").sees(0)
    assert sum(skipped.manifest["data"]["train"]["skipped"].values()) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_missing_or_is_torn_ends_the_run_with_its_place(ftrun, model, rows, workers):
    folder = rows()
    ftrun("prepare", *RUN, model).sees(0)
    (folder / "green.png").write_bytes((folder / "green.png").read_bytes()[:-40])
    done = ftrun(*RUN, model, f"hardware.data_workers={workers}").sees(2)
    assert "rows.jsonl:" in done.err
    assert "has a image that cannot be read" not in done.err
    assert "has an image that cannot be read" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("word", ["data.packing=best_fit", "train.padding_free=true"])
def test_packing_is_refused(ftrun, model, rows, word):
    rows()
    done = ftrun(*RUN, model, word).sees(2)
    assert "rows with media (12 image) cannot share a sequence" in done.err


def test_packing_rows_without_media(ftrun, model, rows, tmp_path):
    folder = rows()
    plain = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a square"}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": plain}) + "\n") * 12)
    vision_models.llava(tmp_path / "llava")
    one_step = (*RUN, "train.max_steps=1", f"model.path={tmp_path / 'llava'}")
    packed = ftrun(*one_step, "data.packing=best_fit", "data.max_length=80").sees(0)
    alone = ftrun(*one_step, "train.micro_batch_size=12").sees(0)
    assert packed.losses[0] == pytest.approx(alone.losses[0], abs=1e-5)
    refused = ftrun(*RUN, model, "data.packing=best_fit").sees(2)  # its positions are of three dimensions
    assert "does not keep rows that share a sequence apart" in refused.err


def test_the_same_rows_elsewhere_mean_other_images(ftrun, model, rows, tmp_path):
    folder = rows()
    here = ftrun(*RUN, model, "train.max_steps=1", "train.shuffle=false").sees(0)
    shutil.copytree(folder, tmp_path / "moved")
    for name in COLOURS:
        Image.new("RGB", (48, 48), "white").save(tmp_path / "moved" / f"{name}.png")
    there = ftrun(*RUN, model, "train.max_steps=1", "train.shuffle=false", "data.path=moved/rows.jsonl").sees(0)
    assert there.losses != here.losses
    again = ftrun(*RUN, model, "train.max_steps=1", "train.shuffle=false", "data.path=moved/rows.jsonl").sees(0)
    assert again.losses == there.losses
