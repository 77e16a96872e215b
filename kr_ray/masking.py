"""Passwords and tokens in text that is shown or kept: one function hides them, wherever a message comes from.

Hidden are the user and password of any URI, the values of parameters and variables whose names speak of a
secret, bearer tokens, and every value that a variable of that kind has in this process's environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "…"
FEWEST_CHARACTERS = 6
"""A shorter value of the environment is not looked for in texts: `1` or `true` would be found everywhere."""
WORKING_DIRECTORIES = ("PWD", "OLDPWD")
"""A shell's variables, which only look like passwords."""

_SECRET_WORDS = (
    r"password|passwd|passphrase|pwd|secret|token(?!iz)|signature|credential|authorization|connection_string"
    r"|(?:api|access|account|storage|secret|private|shared|session|encryption)[_-]?key"
)
_NAME = re.compile(_SECRET_WORDS, re.IGNORECASE)
_ABOUT_A_SECRET = re.compile(
    r"_(?:PATH|FILE|MODE|URL|URI|DIR|(?<!KEY_)ID)$|^GOOGLE_APPLICATION_CREDENTIALS$", re.IGNORECASE
)
"""Names that say where a secret is, which is none itself. `AWS_ACCESS_KEY_ID` is hidden with its key: it
identifies an account."""

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
_USER = re.compile(rf"({_SCHEME})[^\s/?#\"'<>]*@")
_USER_WITH_SLASH = re.compile(rf"({_SCHEME})[^\s/?#\"'<>@:]*:(?!\d*(?:[/?#\s\"'<>]|$))[^\s\"'<>]*@")
"""A password that was not percent-encoded: what follows the colon is no port, and an @ comes later."""
_PARAMETER = re.compile(
    rf"(?P<name>(?<![A-Za-z0-9_-])[A-Za-z0-9_.-]*(?:{_SECRET_WORDS}|(?<![A-Za-z0-9])sig)[A-Za-z0-9_-]*)"
    r"(?P<is>=(?!=))(?P<value>[^\s&;#\"'<>,)\]}]+)",
    re.IGNORECASE,
)
_ENTRY = re.compile(
    rf"(?P<name>['\"][^'\"\s]*(?:{_SECRET_WORDS})[^'\"\s]*['\"]\s*:\s*)(?P<quote>['\"]).*?(?P=quote)",
    re.IGNORECASE,
)
"""Of JSON, or of a Python mapping in a message."""
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE)


def masked(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` without its secrets.

    Args:
        environment: whose secret values are hidden wherever they stand in the text; default: this process's.
    """
    text = _USER.sub(rf"\1{HIDDEN}@", text)
    text = _USER_WITH_SLASH.sub(rf"\1{HIDDEN}@", text)
    text = _PARAMETER.sub(_without_value, text)
    text = _ENTRY.sub(rf"\g<name>\g<quote>{HIDDEN}\g<quote>", text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    for value in sorted(
        _secret_values(os.environ if environment is None else environment), key=len, reverse=True
    ):
        text = text.replace(value, HIDDEN)
    return text


def holds_secret(text: str) -> bool:
    """Whether a location or another value of a configuration carries a user, a password or a token."""
    return masked(text, {}) != text


def is_secret_name(name: str) -> bool:
    """Whether a variable, key or parameter of this name holds a secret: `AWS_SECRET_ACCESS_KEY`, not
    `RAY_AUTH_TOKEN_PATH`."""
    return bool(_NAME.search(name)) and not _ABOUT_A_SECRET.search(name) and name not in WORKING_DIRECTORIES


def _without_value(found: re.Match[str]) -> str:
    return found[0] if _ABOUT_A_SECRET.search(found["name"]) else f"{found['name']}{found['is']}{HIDDEN}"


def _secret_values(environment: Mapping[str, str]) -> set[str]:
    return {
        value
        for name, value in environment.items()
        if is_secret_name(name) and len(value) >= FEWEST_CHARACTERS
    }
