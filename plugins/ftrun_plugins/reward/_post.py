"""A request for scores: sent, sent again where that may help, and its answer read."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from ftrun import secrets
from ftrun.errors import RunFailed

if TYPE_CHECKING:
    from ftrun_plugins.reward.http import HTTP

SHOWN = 200
"""Characters of a server's answer that an error repeats."""


def scores(reward: HTTP, body: dict[str, Any], count: int) -> list[float | None]:
    """Return the scores that the server gives.

    Raises:
        RunFailed: It cannot be reached, refuses, or answers something else than that many scores.
    """
    answer = _answer(reward, json.dumps(body).encode())
    try:
        found = json.loads(answer)["scores"]
    except (ValueError, TypeError, KeyError):
        raise _failed(reward, f'answers no JSON with "scores": {_shown(answer)}') from None
    if not isinstance(found, list) or not all(_is_score(score) for score in found):
        raise _failed(reward, f"answers scores that are no numbers: {_shown(answer)}")
    if len(found) != count:
        raise _failed(reward, f"gives {len(found)} scores for {count} replies")
    return found


def _is_score(score: Any) -> bool:
    return score is None or (isinstance(score, int | float) and not isinstance(score, bool))


def _answer(reward: HTTP, body: bytes) -> bytes:
    """Return what the server answers, at the last of as many attempts as may be made."""
    for attempt in range(reward.retries + 1):
        if attempt:
            time.sleep(2.0 ** (attempt - 1))
        try:
            return _post(reward, body)
        except urllib.error.HTTPError as error:
            why = f"answers {error.code} {error.reason}: {_shown(error.read())}"
            if error.code != http.HTTPStatus.TOO_MANY_REQUESTS and error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR:
                raise _failed(reward, why) from None
        except TimeoutError:
            why = f"does not answer within {reward.timeout:g} seconds (reward.http.timeout)"
        except (OSError, http.client.HTTPException) as error:
            why = f"cannot be reached: {getattr(error, 'reason', None) or error or type(error).__name__}"
    raise _failed(reward, f"{why}; tried {reward.retries + 1} times")


def _post(reward: HTTP, body: bytes) -> bytes:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if reward.key_env:
        key = secrets.read(reward.key_env)
        if not key:
            raise _failed(reward, f"needs a key, and ${reward.key_env} is not set here: export {reward.key_env}=...")
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(reward.url, data=body, headers=headers, method="POST")  # noqa: S310 (checked)
    with urllib.request.urlopen(request, timeout=reward.timeout) as answer:  # noqa: S310
        content: bytes = answer.read()
    return content


def _shown(answer: bytes) -> str:
    text = " ".join(answer.decode(errors="replace").split())
    return f"{text[:SHOWN]}..." if len(text) > SHOWN else text or "(nothing)"


def _failed(reward: HTTP, why: str) -> RunFailed:
    return RunFailed(f"reward=http: {reward.url} {why}")
