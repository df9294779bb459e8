"""Predictions of supervised fine-tuning, through the command line."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import pytest

from ftrun import record
from ftrun.worker.predictions import scores

RUN = (
    "model=tiny", "adapter=full", "hardware=cpu", "stage.num_samples=0", "stage.predict=true", "stage.max_new_tokens=8",
    "train.max_steps=2", "train.micro_batch_size=4", "data.rows=16", "data.eval_size=3",
)  # fmt: skip


def predicted(done: Any) -> list[dict[str, Any]]:
    return record.read_lines(done.folder / record.PREDICTIONS)


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def messages(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


ROWS = [
    messages(said("user", "One?"), said("assistant", "First.")),
    messages(
        said("user", "One?"), said("assistant", "First."), said("user", "And two, then?"), said("assistant", "Second.")
    ),
    messages(said("user", "三?"), said("assistant", "第三。"), said("user", "Thanks.")),
    messages(said("system", "Be brief."), said("user", "One?"), said("assistant", "First.")),
]


def test_a_learned_row_is_predicted_and_the_scores_are_of_what_is_written(ftrun, write):
    write("rows.jsonl", ROWS[:1] * 8)
    done = ftrun(
        *RUN, "data.path=rows.jsonl", "data.eval_size=0", "data.eval_path=rows.jsonl", "train.max_steps=20",
        "optimizer.lr=1e-2", "objective=predict_exact_match", "objective_mode=max",
    ).sees(0)  # fmt: skip
    lines = predicted(done)
    assert [line["index"] for line in lines] == list(range(8))
    assert lines[2] == {
        "index": 2,
        "source": f"{done.folder.parent}/rows.jsonl:3",
        "prompt": "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n",
        "prediction": "First.",
        "reference": "First.",
    }
    assert done.result.objective == done.result.metrics["predict_exact_match"] == 1.0
    assert done.metrics[-1]["step"] == 20
    assert done.metrics[-1]["predict_rouge1"] == 1.0


def test_the_metrics_are_the_scores_of_the_file(ftrun):
    done = ftrun(*RUN, "stage.bleu_tokenizer=v13a").sees(0)
    lines = predicted(done)
    assert len(lines) == 3
    found = scores([line["prediction"] for line in lines], [line["reference"] for line in lines], "13a")
    assert {name: done.result.metrics[f"predict_{name}"] for name in found} == pytest.approx(found)
    assert found["chrf"] > 0


@pytest.mark.parametrize(
    ("learned", "held_out"),
    [
        ("completions", True),
        ("last", False),
        ("all", True),
        ("roles data.train_roles=[user]", False),
        ("roles data.train_roles=[user,assistant]", False),
    ],
)
def test_it_is_the_last_reply_whatever_is_learned(ftrun, write, learned, held_out):
    write("rows.jsonl", ROWS)
    write("others.jsonl", ROWS[:1])
    paths = ("data.path=others.jsonl", "data.eval_path=rows.jsonl", "data.eval_size=0")
    if held_out:
        write("twice.jsonl", ROWS * 2)
        paths = ("data.path=twice.jsonl", "data.eval_size=7")
    done = ftrun(*RUN, *paths, *f"data.train_on={learned}".split(), "train.max_steps=1").sees(0)
    opening = "<|im_start|>assistant\n"
    first = f"<|im_start|>user\nOne?<|im_end|>\n{opening}"
    expected = {
        (first, "First."),
        (f"{first}First.<|im_end|>\n<|im_start|>user\nAnd two, then?<|im_end|>\n{opening}", "Second."),
        (f"<|im_start|>user\n三?<|im_end|>\n{opening}", "第三。"),
        (f"<|im_start|>system\nBe brief.<|im_end|>\n{first}", "First."),
    }
    assert {(line["prompt"], line["reference"]) for line in predicted(done)} == expected
    assert len(predicted(done)) == (7 if held_out else 4)
    for line in predicted(done):
        row = (ROWS * 2)[int(line["source"].rpartition(":")[2]) - 1]
        assert [m["content"] for m in row["messages"] if m["role"] == "assistant"][-1] == line["reference"]


def test_rows_that_were_tokenised_under_another_name_are_found_again(ftrun, write):
    words = (*RUN, "data.train_on=all", "data.eval_size=0", "train.max_steps=1", "data.path=demo:identity")
    for name in ("a", "b"):
        write(f"{name}/{name}.jsonl", ROWS)
        done = ftrun(*words, f"data.eval_path={name}/{name}.jsonl").sees(0)
        assert [line["reference"] for line in predicted(done)] == ["First.", "Second.", "第三。", "First."]


def test_each_set_has_its_own_scores_and_no_more_rows_than_asked_for(ftrun, write):
    write("more.jsonl", ROWS)
    done = ftrun(*RUN, "data.eval_sets={more: more.jsonl}", "stage.predict_rows=2").sees(0)
    assert [(line.get("set"), line["index"]) for line in predicted(done)] == [
        ("more", 0), ("more", 1), (None, 0), (None, 1),
    ]  # fmt: skip
    assert {"predict_rouge1", "predict_more_rouge1"} <= set(done.result.metrics)


def test_draws_are_the_same_for_the_same_seed_and_any_batch(ftrun):
    drawn = (*RUN, "stage.temperature=1", "stage.top_k=50", "stage.top_p=0.95")
    one = ftrun(*drawn).sees(0)
    other = ftrun(*drawn, "train.micro_batch_size=2", "train.grad_accumulation=2").sees(0)
    assert predicted(one) == predicted(other)
    assert predicted(one) != predicted(ftrun(*RUN).sees(0))


def test_a_run_that_goes_on_predicts_the_same(ftrun):
    whole = ftrun(*RUN, "train.max_steps=4", "train.save_every=2").sees(0)
    copy = whole.folder.with_name("copy")
    shutil.copytree(whole.folder, copy)
    shutil.rmtree(copy / "model")
    result = json.loads((copy / "result.json").read_text())
    gone = {"host": os.uname().nodename, "pid": 2**22 + 1, "started": 1.0}
    (copy / "result.json").write_text(json.dumps(result | {"status": "running", "holder": gone}))
    done = ftrun("resume", "copy").sees(0)
    assert predicted(done) == predicted(whole)
    (bleu,) = (line["predict_bleu"] for line in done.metrics if "predict_bleu" in line)
    assert bleu == whole.result.metrics["predict_bleu"]


def test_the_best_weights_predict_where_those_are_kept(ftrun, write):
    write("rows.jsonl", ROWS[:1] * 4)
    write("others.jsonl", [messages(said("user", "One?"), said("assistant", "No!"))] * 8)
    words = (
        "train.max_steps=12", "train.eval_every=2", "train.save_every=2", "optimizer.lr=1e-2", "data.eval_size=0",
        "data.path=others.jsonl", "data.eval_path=rows.jsonl", "stage.temperature=1", "train.scheduler=constant",
    )  # fmt: skip
    best, last = ftrun(*RUN, *words, "train.keep_best=true").sees(0), ftrun(*RUN, *words).sees(0)
    assert best.result.metrics["best_step"] < 10
    at_best = ftrun(*RUN, *words, f"model.path={best.folder}", "train.max_steps=1", "optimizer.lr=1e-12").sees(0)
    assert predicted(at_best) == predicted(best) != predicted(last)


@pytest.mark.slow
def test_several_processes_predict_as_one(ftrun):
    one = ftrun(*RUN).sees(0)
    two = ftrun(*RUN, "train.micro_batch_size=2", "hardware.num_processes=2").sees(0)
    assert predicted(two) == predicted(one)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("stage.max_new_tokens=9",), "stage.max_new_tokens"),
        (("stage.predict_rows=1",), "stage.predict_rows"),
        (("stage.temperature=1",), "stage.temperature"),
        (("stage.num_beams=2",), "stage.num_beams"),
        (("stage.bleu_tokenizer=char",), "stage.bleu_tokenizer"),
        (("objective=predict_bleu",), "objective"),
        (("stage.predict=true", "stage.top_p=0.5"), "stage.top_p"),
        (("stage.predict=true", "stage.top_k=5"), "stage.top_k"),
        (("stage.predict=true", "stage.num_beams=2", "stage.temperature=1"), "stage.num_beams"),
        (("stage.predict=true", "objective=predict_bleu", "train.keep_best=true", "train.eval_every=1"), "objective"),
    ],
)
def test_what_nothing_would_read_is_refused(driver, words, key):
    done = driver("check", "model=tiny", *words)
    assert done.code == 2
    assert f"{key}:" in done.out + done.err


def test_nothing_to_predict_is_an_error_before_training(ftrun, write):
    write("rows.jsonl", ROWS)
    none = ftrun(*RUN, "data.eval_size=0", "data.path=rows.jsonl").sees(2)
    assert "no evaluation rows" in none.err
    write("ids.jsonl", [{"input_ids": [5, 6, 7, 8]}] * 4)  # all is learned: nobody can tell where a reply begins
    flat = ftrun(*RUN, "data.path=ids.jsonl", "data.eval_size=1").sees(2)
    assert "with a prompt before it" in flat.err
    assert not flat.losses


def test_images_are_part_of_a_prompt(ftrun, tmp_path):
    image = pytest.importorskip("PIL.Image")
    from tests import vision_models

    vision_models.qwen(tmp_path / "model")
    found = []
    for number, colour in enumerate(("red", "green", "blue", "white")):
        image.new("RGB", (32 + 8 * number, 32), colour).save(tmp_path / f"{colour}.png")
        asked = said("user", "<image>what colour is it" + " please" * number)
        found.append(messages(asked, said("assistant", colour)) | {"images": [f"{colour}.png"]})
    found.append(messages(said("user", "what is it"), said("assistant", "a square")))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    words = (
        "hardware=cpu", f"model.path={tmp_path / 'model'}", "adapter=full", "stage.predict=true",
        "stage.max_new_tokens=5", "data.path=rows.jsonl", "data.eval_path=rows.jsonl", "optimizer.lr=2e-2",
        "train.max_steps=40", "stage.num_samples=0", "data.max_length=128",
    )  # fmt: skip
    many = ftrun(*words, "train.micro_batch_size=6").sees(0)
    one = ftrun(*words, "train.micro_batch_size=1", "train.grad_accumulation=6").sees(0)
    assert predicted(many) == predicted(one)
    assert "<|image_pad|>" in predicted(many)[0]["prompt"]
    assert sum(line["prediction"] == line["reference"] for line in predicted(many)) >= 3
