"""distill through the command: a student comes nearer its teacher, on rows and on replies of its own."""

from __future__ import annotations

import json
import shutil

import pytest

from ftrun import record

SMALL = ("model=tiny", "hardware=cpu", "train.log_every=1", "train.warmup=0", "data.rows=16")


@pytest.fixture
def teacher(ftrun) -> str:
    words = ("stage=sft", *SMALL, "adapter=full", "optimizer.lr=1e-2", "train.max_steps=12", "stage.num_samples=0")
    return str(ftrun(*words, "output_dir=teacher").sees(0).folder)


def test_a_student_learns_what_its_teacher_says(ftrun, teacher):
    learn = ("adapter=full", "optimizer.lr=5e-3", "stage.alpha=1", f"stage.teacher_path={teacher}")
    done = ftrun("stage=distill", *SMALL, *learn, "train.max_steps=20", "stage.beta=0.5").sees(0)
    assert done.losses[-1] < 0.5 * done.losses[0]
    same = ftrun("stage=distill", *SMALL, *learn, f"model.path={teacher}", "train.max_steps=1").sees(0)
    assert same.losses[0] == pytest.approx(0, abs=1e-6)


def test_replies_of_its_own_resume_exactly_and_do_not_depend_on_the_split(ftrun, teacher):
    words = ("stage=distill", *SMALL, "stage.on_policy=0.6", "stage.max_new_tokens=5", f"stage.teacher_path={teacher}")
    learn = ("optimizer.lr=1e-2", "train.max_steps=6", "train.save_every=1", "train.keep_checkpoints=9")
    whole = ftrun(*words, *learn, "train.micro_batch_size=4").sees(0)
    split = ftrun(*words, *learn, "train.micro_batch_size=2", "train.grad_accumulation=2").sees(0)
    assert split.losses == pytest.approx(whole.losses, abs=1e-5)
    rows = ftrun(*words, *learn, "train.micro_batch_size=4", "stage.on_policy=0", "stage.max_new_tokens=128").sees(0)
    assert rows.losses != whole.losses
    copy = whole.folder.with_name("copy")
    shutil.copytree(whole.folder, copy)
    for checkpoint in record.checkpoints(copy):
        if record.step_of(checkpoint) > 3:
            shutil.rmtree(checkpoint)
    shutil.rmtree(copy / "model")
    result = copy / "result.json"
    result.write_text(result.read_text().replace('"completed"', '"interrupted"'))
    assert ftrun("resume", "copy").sees(0).losses == whole.losses


def test_a_teacher_of_other_tokens_is_refused(ftrun, teacher, tmp_path):
    shutil.copytree(f"{teacher}/model", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    saved = json.loads(file.read_text())
    one, other, *_ = saved["model"]["vocab"]
    vocab = saved["model"]["vocab"]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    file.write_text(json.dumps(saved))
    done = ftrun("stage=distill", *SMALL, f"stage.teacher_path={tmp_path / 'other'}").sees(2)
    assert "tokenizer is another one" in done.err


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("stage.alpha=1",), "stage.alpha"),
        (("stage.teacher_dtype=bfloat16",), "stage.teacher_dtype"),
        (("stage.max_new_tokens=9",), "stage.max_new_tokens"),
        (("stage.on_policy=0.5", "train.padding_free=true"), "stage.on_policy"),
        (("stage.teacher_path=/nowhere/at/all",), "stage.teacher_path"),
    ],
)
def test_what_would_do_nothing_is_refused(driver, words, key):
    done = driver("check", "stage=distill", *SMALL, *words).sees(2)
    assert key in done.out + done.err
