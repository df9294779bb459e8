"""What `ftrun preview` shows of the rows is what is trained on, and what `ftrun prepare` makes is what a run finds."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

TINY = "model=tiny"
CHAT = [
    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Marlow."}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is\n<|im_end|>?"},
            {"role": "assistant", "content": "The end of a turn."},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "The next."},
        ]
    },
]
PAIRS = [
    {"prompt": "Who are you?", "chosen": "I am Marlow.", "rejected": "Nobody."},
    {"prompt": "What for?", "chosen": "To help.", "rejected": "I do not know."},
]


@pytest.fixture
def ask(ftrun, tmp_path):
    """Do ``ftrun WORDS`` with a cache that nobody else uses."""

    def do(*words: str, **env: str):
        return ftrun(*words, **{"FTRUN_CACHE": str(tmp_path / "cache")} | env)

    return do


@functools.cache
def tokenizer() -> Any:
    from ftrun.worker import builtin

    return builtin.tokenizer()


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def labelled(*parts: tuple[str, bool]) -> tuple[list[int], list[int]]:
    """Return ids and labels of texts that are tokenised apart, each learned or not."""
    tokens = [(token, learned) for text, learned in parts for token in ids(text)]
    return [token for token, _ in tokens], [token if learned else -100 for token, learned in tokens]


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# --json


def test_json_has_one_object_a_row_with_its_ids_and_labels(ask, write):
    path = write("chat.jsonl", CHAT)
    first, second = lines(ask("preview", TINY, f"data.path={path}", "--json").sees(0).out)
    prompt = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    tokens, labels = labelled((prompt, False), ("I am Marlow.<|im_end|>", True), ("\n", False))
    assert first == {
        "index": 0,
        "source": f"{path}:1",
        "text": f"{prompt}I am Marlow.<|im_end|>\n",
        "input_ids": tokens,
        "labels": labels,
    }
    assert (second["index"], second["source"]) == (1, f"{path}:2")
    learned = [token for token in second["labels"] if token != -100]
    assert learned == ids("The end of a turn.<|im_end|>") + ids("The next.<|im_end|>")
    assert second["input_ids"].count(ids("<|im_end|>")[0]) == 5, "that in the row's own text is no such token"
    assert second["text"].count("<|im_end|>") == 6


def test_json_of_pairs_has_both_sides(ask, write):
    path = write("pairs.jsonl", PAIRS)
    first, second = lines(ask("preview", TINY, "stage=dpo", f"data.path={path}", "--json").sees(0).out)
    assert (first["source"], second["source"]) == (f"{path}:1", f"{path}:2")
    assert set(first) == {"index", "source", "chosen", "rejected"}
    prompt = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    for side, reply in (("chosen", "I am Marlow."), ("rejected", "Nobody.")):
        tokens, labels = labelled((prompt, False), (f"{reply}<|im_end|>", True), ("\n", False))
        assert first[side] == {"text": f"{prompt}{reply}<|im_end|>\n", "input_ids": tokens, "labels": labels}


def test_json_has_all_rows_or_as_many_as_are_asked_for(ask, write):
    path = write("text.jsonl", [{"text": f"Text number {number}."} for number in range(40)])
    words = ("preview", TINY, "stage=pt", f"data.path={path}", "--json")
    every = lines(ask(*words).sees(0).out)
    assert [row["index"] for row in every] == list(range(40))
    assert all(row["labels"] == row["input_ids"] for row in every)
    assert lines(ask(*words, "--rows", "7").sees(0).out) == every[:7]
    assert lines(ask(*words, "data.packing=best_fit").sees(0).out) == every, "rows stand as they are before packing"


STAGES = '''
from dataclasses import dataclass
from typing import ClassVar
from ftrun.plugin import Stage, register

@register
@dataclass(kw_only=True)
class Liked(Stage):
    """Trains on feedback."""
    rows: ClassVar[str] = "feedback"
    reads: ClassVar[tuple[str, ...]] = ("model.*", "template.*", "data.*", "train.*")
    name: str = "liked"

@register
@dataclass(kw_only=True)
class Asked(Stage):
    """Trains on questions."""
    rows: ClassVar[str] = "questions"
    default_reward: ClassVar[str] = "exact"
    reads: ClassVar[tuple[str, ...]] = ("model.*", "template.*", "data.*", "train.*")
    name: str = "asked"

@register
@dataclass(kw_only=True)
class Rowless(Stage):
    """Reads no rows."""
    reads: ClassVar[tuple[str, ...]] = ("model.*",)
    name: str = "rowless"
'''


def test_json_has_what_else_a_stage_reads_of_a_row(ask, write):
    plugins = f"plugins=[{write('stages.py', STAGES)}]"
    liked = write("liked.jsonl", [{"prompt": "Hi", "completion": "Ho", "label": good} for good in (True, False)])
    found = lines(ask("preview", TINY, plugins, "stage=liked", f"data.path={liked}", "--json").sees(0).out)
    assert [row["label"] for row in found] == [True, False]
    assert all(any(label != -100 for label in row["labels"]) for row in found)
    asked = write("asked.jsonl", [{"prompt": "2+2?", "answer": answer} for answer in ("4", "four")])
    found = lines(ask("preview", TINY, plugins, "stage=asked", f"data.path={asked}", "--json").sees(0).out)
    assert [row["answer"] for row in found] == ["4", "four"]
    assert all(set(row["labels"]) == {-100} for row in found)
    assert found[0]["text"] == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def test_json_into_head_is_no_error(ask, write, server, tmp_path):
    path = write("many.jsonl", CHAT * 400)
    ftrun = f"{sys.executable} -m ftrun preview {TINY} data.path={path} --json"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {ftrun} | head -1"],
        env=os.environ | {"FTRUN_FORK_SERVER": server, "FTRUN_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["index"] == 0


# on the terminal


def test_plain_text_brackets_what_is_trained(ask, write):
    path = write("chat.jsonl", CHAT)
    out = ask("preview", TINY, f"data.path={path}").sees(0).out
    trained = sum(len(ids(text)) for text in ("I am Marlow.<|im_end|>",))
    assert re.search(rf"chat\.jsonl:1 · \d+ tokens, {trained} trained\n", out)
    assert (
        "⟨<|im_start|>⟩user↵\nWho are you?⟨<|im_end|>⟩↵\n⟨<|im_start|>⟩assistant↵\n⟦I am Marlow.⟨<|im_end|>⟩⟧↵\n" in out
    )
    assert "What is↵\n<|im_end|>?⟨<|im_end|>⟩↵\n" in out, "the one that is text is no special token"


def test_pairs_show_their_prompt_once(ask, write):
    out = ask("preview", TINY, "stage=dpo", f"data.path={write('pairs.jsonl', PAIRS)}", "--rows", "1").sees(0).out
    assert out.count("Who are you?") == 1
    assert "What for?" not in out
    assert "chosen\n⟦I am Marlow.⟨<|im_end|>⟩⟧↵\n" in out
    assert "rejected\n⟦Nobody.⟨<|im_end|>⟩⟧↵\n" in out


def test_colours_stand_for_the_brackets_unless_they_are_not_wanted(ask, write):
    path = write("chat.jsonl", CHAT)
    words = ("preview", TINY, f"data.path={path}", "--rows", "1")
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    coloured = ask(*words, **terminal).sees(0).out
    assert "\x1b[35m<|im_start|>" in coloured
    assert "\x1b[1;35m<|im_end|>" in coloured, "trained"
    assert "⟦" not in coloured
    assert "⟦" in ask(*words, **terminal, NO_COLOR="1").sees(0).out


def test_a_row_cannot_move_the_cursor(ask, write):
    path = write("rows.jsonl", [{"prompt": "a\x1b[2Jb\x9b", "completion": "c\x07d"}])
    out = ask("preview", TINY, f"data.path={path}").sees(0).out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out)
    assert "a␛[2Jb\\x9b" in out


def test_the_report_counts_rows_tokens_and_lengths(ask, write):
    rows = [{"prompt": "Say it.", "completion": " ".join(["word"] * number)} for number in (1, 1, 1, 20)]
    path = write("rows.jsonl", rows)
    found = lines(ask("preview", TINY, f"data.path={path}", "--json").sees(0).out)
    lengths = [len(row["input_ids"]) for row in found]
    trained = sum(label != -100 for row in found for label in row["labels"])
    out = ask("preview", TINY, f"data.path={path}", "data.packing=best_fit", "data.max_length=64").sees(0).out
    assert re.search(r"^read +4 rows$", out, re.MULTILINE)
    share = f"{trained / sum(lengths):.1%}"
    assert re.search(rf"^tokens +{sum(lengths)}, of which {trained} \({share}\) are trained$", out, re.MULTILINE)
    assert re.search(rf"^length +shortest {min(lengths)}, .* longest {max(lengths)}$", out, re.MULTILINE)
    assert re.search(r"^truncated +0 rows \(0\.0%\)$", out, re.MULTILINE)
    full, sequences = re.search(r"^packed +into (\d+) sequences?, ([\d.]+)% full$", out, re.MULTILINE).groups()[::-1]
    assert float(full) == pytest.approx(100 * sum(lengths) / (int(sequences) * 64), abs=0.05)
    bars = [
        int(count) for count in re.findall(r"^ *\d+-?\d* .* (\d+)$", out.partition("Tokens of a row")[2], re.MULTILINE)
    ]
    assert sum(bars) == 4


def test_rows_that_are_skipped_are_counted_by_reason(ask, write):
    path = write("rows.jsonl", [*CHAT * 5, {"messages": [{"role": "user", "content": "Hello?"}]}])
    out = ask("preview", TINY, f"data.path={path}", "data.on_bad_row=skip").sees(0).out
    assert re.search(r"^read +11 rows$", out, re.MULTILINE)
    assert re.search(r"^skipped +1: .*reply", out, re.MULTILINE)
    assert re.search(r"^trained on +10 rows$", out, re.MULTILINE)


def test_several_sources_and_evaluation_sets_are_told_apart(ask, write):
    one, two = write("one.jsonl", CHAT[:1]), write("two.jsonl", CHAT)
    out = ask(
        "preview", TINY, f"data.sources=[{{path: {one}}},{{path: {two}}}]", f"data.eval_sets={{own: {two}}}"
    ).sees(0).out  # fmt: skip
    assert re.search(r"^source +one\.jsonl: 1 of 1 row, \d+ tokens", out, re.MULTILINE)
    assert re.search(r"^source +two\.jsonl: 2 of 2 rows, \d+ tokens", out, re.MULTILINE)
    assert re.search(r"^evaluation +eval_own: 2 rows", out, re.MULTILINE)


# warnings


def warnings(out: str) -> list[str]:
    return re.findall(r"^warning +(.*)$", out, re.MULTILINE)


def test_rows_as_they_should_be_give_no_warning(ask):
    assert not warnings(ask("preview", TINY).sees(0).out)
    assert not warnings(ask("preview", TINY, "stage=dpo").sees(0).out)
    assert not warnings(ask("preview", TINY, "stage=pt").sees(0).out)


def test_a_reply_without_an_end_is_warned_of(ask, write):
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    write("conf/template/endless.yaml", f"chat_template: {json.dumps(template)}\n")
    rows = write("chat.jsonl", CHAT[:1])
    end, other = warnings(ask("preview", TINY, "template=endless", f"data.path={rows}").sees(0).out)
    assert end.startswith("no end-of-turn token is trained in 1 of 1 sequences")
    assert "chat.jsonl:1" in end
    assert other.startswith("template=endless is not the model's own")


def test_a_named_template_is_compared_with_the_models_own(ask, write):
    rows = write("chat.jsonl", CHAT[:1])
    assert not warnings(ask("preview", TINY, "template=chatml", f"data.path={rows}").sees(0).out), "it is the same"
    (found,) = warnings(ask("preview", TINY, "template=alpaca", f"data.path={rows}").sees(0).out)
    assert found.startswith("template=alpaca is not the model's own")


def test_special_tokens_truncation_and_tiny_replies_are_warned_of(ask, write):
    rows = write("chat.jsonl", CHAT)
    special, cut = warnings(ask("preview", TINY, f"data.path={rows}", "data.max_length=24").sees(0).out)
    assert special.startswith("special tokens stand in the own text of 1 of the rows")
    assert cut.startswith("50% of the rows are longer than data.max_length=24")
    long = write("long.jsonl", [{"prompt": "word " * 400, "completion": "a"}])
    (few,) = warnings(ask("preview", TINY, f"data.path={long}").sees(0).out)
    assert re.match(r"only 0\.\d\d% of the tokens are trained", few)


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A model's folder without weights, whose text begins with a token that its template writes too."""
    made = tokenizer()
    folder = tmp_path / "weightless"
    made.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 1024}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["bos_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_no_weights_are_needed_and_a_double_bos_is_warned_of(ask, write, tokenizer_folder):
    rows = write("chat.jsonl", CHAT[:1])
    words = ("preview", f"model.path={tokenizer_folder}", f"data.path={rows}")
    assert not warnings(ask(*words).sees(0).out)
    template = tokenizer_folder / "chat_template.jinja"
    template.write_text("{{ bos_token }}{{ bos_token }}" + template.read_text())
    (found,) = warnings(ask(*words).sees(0).out)
    assert found.startswith("1 of 1 sequences looked at begin with <|endoftext|> twice (first: ")


# --html


def test_the_page_is_whole_escaped_and_reads_nothing_from_elsewhere(ask, write, tmp_path):
    reply = "<script>alert('x')</script> & \"more\""
    path = write("rows.jsonl", [{"prompt": "<b>bold</b>", "completion": reply}])
    done = ask("preview", TINY, f"data.path={path}", "--html", "page.html").sees(0)
    assert "written to page.html" in done.out
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<b>bold" not in page
    assert not re.search(r"""(src|href)=|url\(|@import|https?://""", page)
    tokens = re.findall(r'<span class="([^"]+)" title="ids? ([\d ]+), (\w+)">', page)
    found = lines(ask("preview", TINY, f"data.path={path}", "--json").sees(0).out)[0]
    assert [int(token) for _, numbers, _ in tokens for token in numbers.split()] == found["input_ids"]
    trained = [int(token) for _, numbers, state in tokens if state == "trained" for token in numbers.split()]
    assert trained == [label for label in found["labels"] if label != -100]
    assert [classes for classes, _, _ in tokens].count("s t") == 1
    assert "prefers-color-scheme: dark" in page


# the pieces that are shown


def test_pieces_make_up_the_text_and_hold_whole_characters():
    from ftrun.worker.preview import spans_of_text

    text = "Löwen 🦁 漢字 <|im_end|>\n\tend"
    tokens = ids(text)
    found = list(spans_of_text(tokens, tokenizer().decode))
    assert "".join(piece for *_, piece in found) == text
    assert [start for start, *_ in found] == [0, *(end for _, end, _ in found[:-1])]
    assert found[-1][1] == len(tokens)
    assert not any("\ufffd" in piece for *_, piece in found)
    assert len(found) < len(tokens), "the lion takes several tokens"


def test_bars_are_few_round_and_hold_every_row():
    from ftrun.preview import bars
    from ftrun.worker.preview import histogram

    for lengths in ([5], [244, 250, 252, 252], [1, 1000], list(range(3000, 4100))):
        found = histogram(lengths)
        shown = list(bars(found))
        assert len(shown) <= 12
        assert sum(count for _, count in shown) == len(lengths)
        for label, count in shown:
            first, _, last = label.partition("-")
            assert count == sum(int(first) <= length <= int(last or first) for length in lengths)


# what goes wrong


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--rows 0", "--rows: 0 is no whole number from 1 up"),
        ("--rows many", "--rows: many is no whole number from 1 up"),
        ("--wide", "unrecognized arguments: --wide"),
        ("--json --html a.html", "not allowed with argument"),
        ("model=tiny --html nowhere/page.html", "--html: there is no folder nowhere"),
        ("model=tiny --html .", "--html: . is a folder"),
        ("model=tiny stage=nope --html nowhere/page.html", "2 problems"),
        ("model=tiny data.streaming=true train.max_steps=1 --json", "--json: with data.streaming=true"),
        ("model=tiny plugins=[stages.py] stage=rowless", "stage: stage=rowless reads no rows"),
        ("model=tiny data.path=missing.jsonl", "missing.jsonl"),
    ],
)
def test_what_cannot_be_shown_ends_in_2(words, says, driver, write):
    write("stages.py", STAGES)
    done = driver("preview", *words.split()).sees(2)
    assert says in done.err
    assert done.out == ""


def test_bad_rows_that_the_worker_finds_end_in_2(ask, write):
    path = write("rows.jsonl", [*CHAT * 600, {"messages": [{"role": "user", "content": "Hello?"}]}])
    for words in (("preview",), ("preview", "--json"), ("prepare",)):
        done = ask(*words, TINY, f"data.path={path}").sees(2)
        assert re.search(r"rows\.jsonl:1201: ", done.err)
        assert done.out == ""


DEADLY = """
import os, sys
if "ftrun.worker.main" in sys.modules:
    from ftrun.worker import loading
    def tokenizer(cfg):
        {}
    loading.tokenizer = tokenizer
"""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("os.kill(os.getpid(), 9)", "preview failed: its process was killed with signal 9"),
        ("raise MemoryError('no room')", "no room"),
    ],
)
def test_a_worker_that_dies_ends_in_1_with_its_reason(line, says, ask, write, tmp_path):
    plugin = write("deadly.py", STAGES + DEADLY.format(line))
    done = ask("preview", TINY, f"plugins=[{plugin}]", TMPDIR=str(tmp_path)).sees(1)
    assert says in done.err
    assert not list(tmp_path.glob("ftrun-*")), "nothing is left"


def test_ctrl_c_ends_in_130(start, tmp_path):
    process = start("preview", TINY, FTRUN_CACHE=str(tmp_path / "cache"), TMPDIR=str(tmp_path))
    while not list(tmp_path.glob("ftrun-*/log.txt")):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not list(tmp_path.glob("ftrun-*"))


def test_neither_a_run_nor_its_folder_appears(ask, write, tmp_path):
    write("taken/run.yaml", "seed: 1\n")
    ask("preview", TINY, f"output_dir={tmp_path / 'taken'}", TMPDIR=str(tmp_path)).sees(0)
    ask("prepare", TINY, f"output_dir={tmp_path / 'taken'}", TMPDIR=str(tmp_path)).sees(0)
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "cache"}
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["run.yaml"]


# prepare


def entries(tmp_path) -> dict[str, float]:
    return {str(meta.parent): meta.stat().st_ctime for meta in (tmp_path / "cache" / "tokens").glob("*/meta.json")}


def test_a_run_starts_from_what_prepare_made(ask, tmp_path):
    words = (TINY, "adapter=full", "train.max_steps=1", "stage.num_samples=0")
    first = ask("prepare", *words).sees(0)
    assert re.search(r"^rows +demo:identity: 132 rows, [\d,]+ tokens, .*, tokenised, ", first.out, re.MULTILINE)
    assert f"ftrun {' '.join(words)}" in first.out
    made = set(entries(tmp_path))
    assert len(made) == 2, "rows to train on, and to evaluate on"
    again = ask("prepare", *words).sees(0)
    assert again.out.count("was there already") == 2
    assert "tokenised" not in again.out
    run = ask(*words).sees(0)
    assert "tokenising" not in run.out
    assert set(entries(tmp_path)) == made


def test_a_preview_leaves_its_tokens_for_the_run(ask, tmp_path):
    ask("preview", TINY).sees(0)
    made = set(entries(tmp_path))
    assert ask("prepare", TINY).sees(0).out.count("was there already") == len(made) == 2


def test_prepare_needs_no_accelerator(ask):
    out = ask("prepare", TINY, "hardware.device=cuda", "hardware.num_processes=2").sees(0).out
    assert "model  builtin:tiny is on this machine" in out


def test_prepare_wants_the_weights_of_a_hub_model(ask, write, tokenizer_folder):
    """Of a folder it wants nothing: what is there is all there is."""
    rows = write("chat.jsonl", CHAT[:1])
    out = ask("prepare", f"model.path={tokenizer_folder}", f"data.path={rows}").sees(0).out
    assert f"model  {tokenizer_folder} is on this machine" in out
    assert "model.path" in ask("prepare", "model.path=nobody/nothing").sees(2).err
