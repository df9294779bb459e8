"""A server that scores, asked in batches, asked again where that helps, and quoted where it does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from ftrun import config
from ftrun.completions import Completion
from ftrun.conformance import RewardSuite
from ftrun.errors import ConfigError, RunFailed
from ftrun.worker import builtin
from ftrun_plugins.reward import _post
from ftrun_plugins.reward.http import HTTP, Send

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


class Server:
    """A server in this process, which keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.answer: Answer = lambda body: (200, {"scores": [float(len(message)) for message in body["messages"]]})
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append((body, dict(self.headers)))
                code, found = server.answer(body)
                content = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        class Quiet(HTTPServer):
            def handle_error(self, *args: Any) -> None:
                """Say nothing of a client that has gone."""

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1/score"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def scoring() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


class TestHTTP(RewardSuite):
    option = "http"

    @pytest.fixture(autouse=True)
    def _url(self, scoring):
        type(self).overrides = (f"reward.http.url={scoring.url}",)


class Told:
    """What a run tells a reward, as far as this one asks."""

    tokenizer = builtin.tokenizer()


def replies(*texts: str) -> list[Completion]:
    encode = Told.tokenizer.encode
    return [
        Completion(prompt=[{"role": "user", "content": "Hi?"}], answer=None, text=text, prompt_ids=encode("Hi?"),
                   ids=encode(text, add_special_tokens=False), finished=True)
        for text in texts
    ]  # fmt: skip


def reward(url: str, **keys: Any) -> HTTP:
    made = HTTP(url=url, **keys)
    made.prepare(Told(), None)  # type: ignore[arg-type]
    return made


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited between attempts."""
    found: list[float] = []
    monkeypatch.setattr(_post.time, "sleep", found.append)
    return found


def test_texts_are_sent_in_batches_in_their_order(scoring):
    found = reward(scoring.url, batch_size=2, model="judge").score(replies("a", "bb", "ccc"))
    assert found == [4.0, 5.0, 6.0]
    assert [body for body, _ in scoring.asked] == [
        {"model": "judge", "messages": ["Hi?a", "Hi?bb"]}, {"model": "judge", "messages": ["Hi?ccc"]},
    ]  # fmt: skip
    assert "Authorization" not in scoring.asked[0][1]


def test_conversations_are_sent_as_messages(scoring):
    reward(scoring.url, send=Send.conversations).score(replies("a"))
    assert scoring.asked[0][0]["messages"] == [
        [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "a"}]
    ]


def test_a_key_is_read_from_its_variable(scoring, monkeypatch):
    monkeypatch.setenv("MY_KEY", "hunter2")
    reward(scoring.url, key_env="MY_KEY").score(replies("a"))
    assert scoring.asked[0][1]["Authorization"] == "Bearer hunter2"
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(RunFailed, match=r"needs a key, and \$MY_KEY is not set here"):
        reward(scoring.url, key_env="MY_KEY").score(replies("a"))


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_server_in_trouble_is_asked_again(scoring, waits, code):
    answers = iter([(code, b"later"), (code, b"later"), (200, {"scores": [0.5]})])
    scoring.answer = lambda _: next(answers)
    assert reward(scoring.url).score(replies("a")) == [0.5]
    assert waits == [1.0, 2.0]


def test_a_server_that_stays_in_trouble_ends_the_run(scoring, waits):
    scoring.answer = lambda _: (503, b"no  room\n")
    with pytest.raises(RunFailed, match=r"reward=http: http://127\S+ answers 503 .*: no room; tried 3 times"):
        reward(scoring.url, retries=2).score(replies("a"))
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize(
    ("code", "answer", "why"),
    [
        (404, b"no such path", r"answers 404 Not Found: no such path$"),
        (200, b"<html>", r'answers no JSON with "scores": <html>$'),
        (200, [1.0], r'answers no JSON with "scores"'),
        (200, {"score": [1.0]}, r'answers no JSON with "scores"'),
        (200, {"scores": ["high"]}, r"answers scores that are no numbers"),
        (200, {"scores": 1.0}, r"answers scores that are no numbers"),
        (200, {"scores": [1.0, 2.0]}, r"gives 2 scores for 1 replies"),
        (200, b"x" * 999, r"x{200}\.\.\.$"),
    ],
)
def test_a_server_that_answers_nonsense_is_quoted_and_not_asked_again(scoring, waits, code, answer, why):
    scoring.answer = lambda _: (code, answer)
    with pytest.raises(RunFailed, match=why):
        reward(scoring.url).score(replies("a"))
    assert (waits, len(scoring.asked)) == ([], 1)


def test_no_opinion_is_none(scoring):
    scoring.answer = lambda _: (200, {"scores": [None, 1]})
    assert reward(scoring.url).score(replies("a", "b")) == [None, 1]


def test_no_server_ends_the_run(waits):
    with pytest.raises(RunFailed, match=r"reward=http: http://127\.0\.0\.1:9/ cannot be reached: .*; tried 2 times"):
        reward("http://127.0.0.1:9/", retries=1).score(replies("a"))
    assert waits == [1.0]


def test_a_server_that_is_silent_ends_the_run(scoring, waits):
    silence = threading.Event()
    scoring.answer = lambda _: (silence.wait(5), (200, {"scores": [1.0]}))[1]
    with pytest.raises(RunFailed, match=r"does not answer within 0\.2 seconds \(reward\.http\.timeout\); tried 1"):
        reward(scoring.url, timeout=0.2, retries=0).score(replies("a"))
    silence.set()


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("url=localhost:8000", r"reward\.http\.url: localhost:8000 is no address of the web"),
        ("url=ftp://host/x", r"reward\.http\.url: ftp://host/x is no address of the web"),
        ("url=http://me:hunter2@host/x", r"reward\.http\.url: holds a name or a password"),
        ("key_env=sk-hunter2", r"reward\.http\.key_env: takes the name of an environment variable"),
    ],
)
def test_addresses_and_secrets_are_checked(word, problem):
    words = ["stage=grpo", "model=tiny", "reward=http", "reward.http.url=http://host/x", f"reward.http.{word}"]
    with pytest.raises(ConfigError, match=problem) as error:
        config.compose(words)
    assert "hunter2" not in str(error.value)
