"""Replies to the evaluation rows when training ends, beside those that the rows have, and how alike they are."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import regex
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from transformers import TrainerCallback

from ftrun import events, record
from ftrun.data import TrainOn, sources
from ftrun.data.rows import Row
from ftrun.data.tokens import IGNORED
from ftrun.errors import ConfigError, Problem
from ftrun.worker import generation
from ftrun.worker.encode import EncodedRow, RowEncoder, understood
from ftrun.worker.generation import Decoding, Generator

if TYPE_CHECKING:
    from ftrun.worker.dataset import Selected
    from ftrun.worker.training import Run, RunTrainer

_ROUGE = ("rouge1", "rouge2", "rougeL")
_UNSPACED = (
    r"\p{Han}\p{Script_Extensions=Hiragana}\p{Script_Extensions=Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
)
"""Scripts that put no space between words."""

_WORD = regex.compile(
    rf"[[\p{{L}}\p{{N}}]&&[{_UNSPACED}]]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{_UNSPACED}]]+", regex.VERSION1
)


class Words:
    """The words that ROUGE counts: runs of letters and digits in lower case, and each character of unspaced scripts.

    Of ASCII text they are those of rouge-score's own tokenizer, which leaves out every other letter.
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return _WORD.findall(text.lower())


def scores(predictions: Sequence[str], references: Sequence[str], bleu_tokenizer: str) -> dict[str, float]:
    """Compare predictions with references, of which there is at least one.

    Returns:
        ``rouge1``, ``rouge2`` and ``rougeL``: the mean over the rows of the F-measure, from 0 to 1; ``bleu`` and
        ``chrf``: of the whole corpus, from 0 to 100; ``exact_match``: the share of equal texts, from 0 to 1.
    """
    scorer = RougeScorer(list(_ROUGE), tokenizer=Words())
    each = [scorer.score(wanted, found) for found, wanted in zip(predictions, references, strict=True)]
    exact = [normalised(found) == normalised(wanted) for found, wanted in zip(predictions, references, strict=True)]
    return {
        **{name: sum(score[name].fmeasure for score in each) / len(each) for name in _ROUGE},
        "bleu": BLEU(tokenize=bleu_tokenizer).corpus_score(predictions, [references]).score,
        "chrf": CHRF().corpus_score(predictions, [references]).score,
        "exact_match": sum(exact) / len(exact),
    }


def normalised(text: str) -> str:
    """Return a text as exact match compares it: composed characters (NFC), each run of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


@dataclass(frozen=True)
class Question:
    """An evaluation row: a prompt, and the reply that the row has to it."""

    of_set: str
    """The name of its evaluation set, or ""."""

    index: int
    """Where it stands in the set."""

    source: str
    """The file and line that it comes from."""

    prompt: dict[str, Any]
    """As `Generator.replies` takes it."""

    reference: list[int]


class Span(NamedTuple):
    """Where a reply stands in the tokens of a row."""

    start: int
    end: int


def questions(run: Run, most: int | None) -> list[Question]:
    """Return the evaluation rows of a run as prompts and replies, of each set no more than the first ``most``.

    Rows without a reply, or without anything before it, are left out, which is said.

    Raises:
        ConfigError: No row is left of a set, or there is none.
    """
    if not run.rows.evals:
        message = "there are no evaluation rows to reply to"
        raise ConfigError([Problem("stage.predict", message, "data.eval_path=FILE, or data.eval_size=100")])
    found: list[Question] = []
    for name, rows in run.rows.evals.items():
        count = min(most or len(rows), len(rows))
        read = _last_replies(run, name, rows, count)
        made = [_question(run, name, rows, index, read) for index in range(count)]
        kept = [question for question in made if question is not None]
        if not kept:
            message = f"no row of the evaluation set{f' {name}' if name else ''} has a reply with a prompt before it"
            raise ConfigError([Problem("stage.predict", message, "rows of conversations, or stage.predict=false")])
        if count > len(kept) and run.is_main:
            text = f"{count - len(kept)} evaluation rows have no reply with a prompt before it: they are not predicted"
            events.send("note", text=text)
        found += kept
    return found


Read = dict[tuple[str, bytes], Span]
"""Where the last reply of a row is, by the line and the tokens of the row."""


def _question(run: Run, name: str, rows: Selected, index: int, read: Read | None) -> Question | None:
    row, source = rows[index], rows.place_of(index)
    key = _line(source), row["input_ids"].tobytes()
    span = last_labelled(row["labels"]) if read is None else read.get(key)
    if span is None or span.start == 0:
        return None
    prompt: dict[str, Any] = {"input_ids": row["input_ids"][: span.start]}
    if row.get("media") and run.media:
        count = int(np.isin(prompt["input_ids"], list(run.media.kinds)).sum())
        prompt |= {"media": row["media"][:count], "place": row["place"]} if count else {}
    learned = row["labels"][span.start : span.end] if read is None else row["input_ids"][span.start : span.end]
    return Question(name, index, source, prompt, learned.tolist())


def last_labelled(labels: Any) -> Span | None:
    """Return where the last run of labelled tokens is: where replies are learned, the last one that is."""
    learned = np.flatnonzero(np.asarray(labels) != IGNORED)
    if not len(learned):
        return None
    gaps = np.flatnonzero(np.diff(learned) > 1)
    return Span(int(learned[gaps[-1] + 1] if len(gaps) else learned[0]), int(learned[-1]) + 1)


def _last_replies(run: Run, name: str, rows: Selected, count: int) -> Read | None:
    """Find the last replies of a set's first rows where the labels do not tell them, by reading the rows again.

    That is so where prompts are learned too (``data.train_on=all`` or ``roles``). The rows are known again by their
    line and their tokens; their files may have been tokenised under other names.
    """
    data = run.cfg.data
    if data.train_on in (TrainOn.completions, TrainOn.last):
        return None
    encoder = RowEncoder(run.cfg, run.tokenizer)
    resolved = sources.resolve(data, run.cfg.stage.rows)
    held_out = not name and bool(data.eval_size)
    found: Read = {}
    for number, opened in enumerate(resolved.train if held_out else resolved.eval[name]):
        lines = {_line(rows.place_of(index)) for index in range(count) if rows.which[index] == number}
        wanted = (row for row in sources.read(opened) if isinstance(row, Row) and str(row.line) in lines)
        items, _, _ = understood(((opened, row) for row in wanted), run.cfg.stage.rows)
        for encoded in encoder.encode(items):
            if isinstance(encoded, EncodedRow) and (span := _last_reply(encoded)):
                key = (str(encoded.row.line), np.array(encoded.sequences[0].ids, np.int32).tobytes())
                found[key] = span
    return found


def _last_reply(encoded: EncodedRow) -> Span | None:
    """Return where the last reply of a row is; of a row that came tokenised, only its labels tell."""
    sequence = encoded.sequences[0]
    if sequence.replies:
        return Span(*sequence.replies[-1])
    return last_labelled(sequence.labels) if sequence.labels is not None else None


def _line(place: str) -> str:
    return place.rpartition(":")[2]


class Predictions(TrainerCallback):
    """Replies to evaluation rows once training has ended, writes the replies down, and logs their scores."""

    def __init__(
        self, trainer: RunTrainer, asked: Sequence[Question], generator: Generator, bleu_tokenizer: str
    ) -> None:
        self._trainer, self._asked, self._generator = trainer, asked, generator
        self._bleu_tokenizer = bleu_tokenizer

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Do it, unless training was told to stop before its end."""
        trainer = self._trainer
        if not trainer.stopped_early and state.global_step < state.max_steps:
            return
        if trainer.run.cfg.train.keep_best:
            trainer.load_best()  # the weights that the run is about to end with
        texts = self._texts(model)
        if trainer.run.is_main:
            self._write(texts)
        trainer.log(self._metrics(texts))

    def _texts(self, model: Any) -> list[str]:
        run, total = self._trainer.run, len(self._asked)

        def say(count: int) -> None:
            if run.is_main:
                done = min(total, count * run.world_size)
                events.send("phase", text=f"predicting: {done} of {total} rows")

        say(0)
        prompts = [question.prompt for question in self._asked]
        written = self._generator.replies(model, prompts, rank=run.rank, world_size=run.world_size, progress=say)
        return [self._generator.text(run.tokenizer, ids) for ids in written]

    def _reference(self, question: Question) -> str:
        return self._generator.text(self._trainer.run.tokenizer, question.reference)

    def _write(self, texts: Iterable[str]) -> None:
        run = self._trainer.run
        lines = [
            {
                **({"set": question.of_set} if question.of_set else {}),
                "index": question.index,
                "source": question.source,
                "prompt": run.tokenizer.decode(question.prompt["input_ids"].tolist()),
                "prediction": text,
                "reference": self._reference(question),
            }
            for question, text in zip(self._asked, texts, strict=True)
        ]
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        record.write_whole(run.folder / record.PREDICTIONS, content)

    def _metrics(self, texts: Sequence[str]) -> dict[str, float]:
        """Return the scores of each evaluation set, under its name."""
        metrics: dict[str, float] = {}
        for name in dict.fromkeys(question.of_set for question in self._asked):
            pairs = [
                (text, self._reference(question))
                for question, text in zip(self._asked, texts, strict=True)
                if question.of_set == name
            ]
            found = scores([text for text, _ in pairs], [wanted for _, wanted in pairs], self._bleu_tokenizer)
            prefix = f"predict_{name}_" if name else "predict_"
            metrics |= {f"{prefix}{metric}": value for metric, value in found.items()}
        return metrics


def at_the_end_of(trainer: RunTrainer, decoding: Decoding, *, rows: int | None, bleu_tokenizer: str) -> None:
    """Have a trainer predict when it ends.

    Raises:
        ConfigError: There is nothing to predict.
    """
    run = trainer.run
    generator = Generator(
        decoding=decoding,
        budget=run.budget(padded=True),
        ends=generation.end_ids(run.cfg, run.tokenizer, trainer.model),
        pad_id=run.pad_id,
        media=run.media,
    )
    callback = Predictions(trainer, questions(run, rows), generator, bleu_tokenizer)
    trainer.callback_handler.callbacks.insert(0, callback)  # before the trackers, which say farewell at the end
