"""Why a node could not be reached, in one line that a keeper of clusters understands.  Pure.

Ssh, rsh and their like say it in their own words, on standard error, among other things; here the
words are known.  What is not known is given as the last line that was said.
"""

from __future__ import annotations

import re

__all__ = ["explain", "may_pass", "refusal"]

LINE_SIZE_MAX = 200

# First match wins: the changed host key comes with a page of text that mentions everything.
_KNOWN = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "changed host key; if that is right, ssh-keygen -R"),
    ("Host key verification failed", "unknown host key; add it to known_hosts"),
    ("no matching host key type", "no host key type in common"),
    ("UNPROTECTED PRIVATE KEY FILE", "private key file is readable by others"),
    ("invalid format", "bad private key file"),
    ("error in libcrypto", "bad private key file"),
    ("Permission denied", "permission denied; no accepted key (or password needed)"),
    ("Too many authentication failures", "too many keys offered; name one with IdentityFile"),
    ("Could not resolve hostname", "unknown host name"),
    ("Name or service not known", "unknown host name"),
    ("Connection refused", "connection refused"),
    ("No route to host", "no route to host"),
    ("Network is unreachable", "network is unreachable"),
    ("Connection timed out", "no answer before the connect timeout"),
    ("Operation timed out", "no answer before the connect timeout"),
    ("banner exchange", "no ssh banner before the connect timeout"),
    ("No such identity", "the key file is not there"),
    ("Bad configuration option", "bad option in the ssh configuration"),
    ("Can't open user config file", "the ssh configuration cannot be read"),
)
_LASTING = (
    "REMOTE HOST IDENTIFICATION HAS CHANGED", "Host key verification failed",
    "no matching host key type", "UNPROTECTED PRIVATE KEY FILE", "invalid format",
    "error in libcrypto", "Permission denied (", "Too many authentication failures",
    "No such identity", "Bad configuration option", "Can't open user config file",
)  # fmt: skip
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\U0010ffff]+")


def explain(reason: str, words: bytes, exit_code: int | None) -> str:
    """Return one line: *reason* is "stage:what", *words* what the connector wrote last."""
    stage, _, what = reason.partition(":")
    text = words.decode("utf-8", "replace")
    if what == "no Python 3.10":
        return "no Python 3.10 on the node"
    if what == "timeout":
        return f"no answer before the {stage} timeout"
    known = next((meaning for sign, meaning in _KNOWN if sign in text), None)
    if known:
        return known
    lines = [line for line in map(_clean, text.splitlines()) if line]
    if lines:
        return lines[-1][:LINE_SIZE_MAX]
    if what == "connector ended" and exit_code is not None:
        return f"the connector ended with code {exit_code}"
    return _clean(what) or "failed"


def may_pass(reason: str, words: bytes) -> bool:
    """Return whether a node that could not be reached for this may be reached later."""
    text = words.decode("utf-8", "replace")
    return reason.startswith("connect:") and not any(sign in text for sign in _LASTING)


def refusal(words: str) -> str:
    """Return why sudo did not do it, if that is what these words, the last that came, are about."""
    if words.endswith("sudo: command not found"):
        return "no sudo on the node: install it, or log in as root"
    if not words.startswith("sudo: "):
        return ""
    if "password is required" in words:
        return "sudo asks for a password: allow it without one (NOPASSWD), or log in as root"
    return words[:LINE_SIZE_MAX]


def _clean(line: str) -> str:
    return _UNPRINTABLE.sub(" ", line).strip()
