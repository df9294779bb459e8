"""Secrets are never config values: a key names the environment variable that holds one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ftrun.errors import Problem


def check_name(key: str, name: str) -> Iterator[Problem]:
    """Yield a problem if ``name`` looks like a secret instead of a variable's name. Does not repeat it."""
    if not re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", name):
        message = "takes the name of an environment variable; a secret typed here would end up in run.yaml"
        yield Problem(key, message, f"export MY_KEY=..., and {key}=MY_KEY")


def read(name: str) -> str | None:
    """Return the secret in the environment variable ``name``, if it is set."""
    return os.environ.get(name)
