"""Scores of predictions: by hand, and against the packages; where the last reply of a row is."""

from __future__ import annotations

import random

import pytest

from ftrun.worker import predictions
from ftrun.worker.predictions import Span, Words, last_labelled, normalised, scores

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "it's", "3.5", "metres", "foo_bar;", "Why?", "e-mail", "ALL")


def texts(seed: int, count: int = 20) -> list[str]:
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=drawn.randint(4, 15))) for _ in range(count)]


def test_scores_by_hand():
    found = scores(["the cat sat on the mat"], ["The cat sat on a mat."], "char")
    # 5 of 6 words either way (sat, cat, on, mat, the); 3 of 5 pairs of words; in order: the cat sat on ... mat
    assert found["rouge1"] == pytest.approx(5 / 6)
    assert found["rouge2"] == pytest.approx(3 / 5)
    assert found["rougeL"] == pytest.approx(5 / 6)
    shorter = scores(["the cat sat"], ["the cat sat down"], "13a")
    # precision 1 and recall 3/4; of pairs 1 and 2/3
    assert shorter["rouge1"] == shorter["rougeL"] == pytest.approx(6 / 7)
    assert shorter["rouge2"] == pytest.approx(4 / 5)


def test_bleu_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; of equal length
    found = scores(["the cat sat on the mat"], ["the cat sat on a mat"], "zh")["bleu"]
    assert found == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # of the corpus, not the mean over its rows: 9 of 10, 6 of 8, 4 of 6, 2 of 4
    both = scores(["the cat sat on the mat", "a b c d"], ["the cat sat on a mat", "a b c d"], "zh")["bleu"]
    assert both == pytest.approx(100 * (9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25)


@pytest.mark.parametrize("tokenizer", ["zh", "13a", "intl", "char"])
def test_scores_are_those_of_the_packages(tokenizer):
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    found, wanted = texts(0), texts(1)
    result = scores(found, wanted, tokenizer)
    assert result["bleu"] == pytest.approx(sacrebleu.corpus_bleu(found, [wanted], tokenize=tokenizer).score)
    assert result["chrf"] == pytest.approx(sacrebleu.corpus_chrf(found, [wanted]).score)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        each = [scorer.score(w, f)[name].fmeasure for f, w in zip(found, wanted, strict=True)]
        assert result[name] == pytest.approx(sum(each) / len(each))
        assert result[name] > 0.05


def test_of_ascii_text_zh_is_13a():
    found, wanted = texts(2), texts(3)
    assert scores(found, wanted, "zh")["bleu"] == pytest.approx(scores(found, wanted, "13a")["bleu"])


def test_chinese_is_compared_by_characters():
    found = scores(["我喜欢猫。"], ["我喜欢狗。"], "zh")
    assert found["rouge1"] == found["rougeL"] == pytest.approx(3 / 4)  # rouge-score's own tokenizer finds no word: 0
    assert found["rouge2"] == pytest.approx(2 / 3)
    same = scores(["我喜欢猫。"], ["我喜欢猫。"], "zh")
    assert (same["rouge2"], same["bleu"], same["exact_match"]) == pytest.approx((1.0, 100.0, 1.0))
    assert scores(["我喜欢猫。"], ["我喜欢猫。"], "13a")["bleu"] == pytest.approx(0.0)  # one word is no quadruple


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's GPT-4, foo_bar!", ["it", "s", "gpt", "4", "foo", "bar"]),
        ("我用GPT4写的。", ["我", "用", "gpt4", "写", "的"]),
        ("コーヒーを", ["コ", "ー", "ヒ", "ー", "を"]),
        ("안녕 하세요", ["안녕", "하세요"]),
        ("naïve Ärger", ["naïve", "ärger"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("มี น้ำ", ["มี", "น้", "ำ"]),
        ("?! …", []),
    ],
)
def test_words(text, words):
    assert Words().tokenize(text) == words


def test_words_of_ascii_are_those_of_rouge_score():
    from rouge_score.tokenize import tokenize

    everything = "".join(map(chr, range(128)))
    for text in [*texts(4), everything, everything[::-1]]:
        assert Words().tokenize(text) == tokenize(text, None)


def test_exact_match_minds_letters_and_nothing_of_white_space():
    assert normalised(" one\n  two\t") == "one two"
    assert normalised("e\u0301") == "\u00e9"
    found = ["42", "a  b\n", "Yes", "no."]
    assert scores(found, ["42", "a b", "yes", "no"], "zh")["exact_match"] == 2 / 4


def test_replies_of_nothing_score_nothing():
    assert set(scores(["", ""], ["one two three four", "five"], "zh").values()) == {0.0}
    assert scores([""], [""], "zh")["exact_match"] == 1.0


@pytest.mark.parametrize(
    ("labels", "span"),
    [
        ([-100, -100, 5, 6], Span(2, 4)),
        ([-100, 5, 6, -100, 7, 8, -100], Span(4, 6)),
        ([5, 6], Span(0, 2)),
        ([-100, -100, 9], Span(2, 3)),
        ([-100, -100], None),
        ([], None),
    ],
)
def test_the_last_labelled_run(labels, span):
    assert last_labelled(labels) == span


def test_metrics_that_are_declared_are_those_there_are():
    from ftrun_plugins.stage.sft import SFT

    declared = set(SFT(predict=True).metrics) - set(SFT.metrics)
    assert declared == {f"predict_{name}" for name in predictions.scores(["a"], ["a"], "zh")}
    assert SFT().metrics == SFT.metrics
