"""Words: what may enter a boot script, a DHCP configuration or a URL, and how it is written there.

Pure.  Everything that ends in a script was read by one of these functions before.  They refuse
rather than escape: iPXE has no quoting at all (it expands `${...}` and splits at blanks), so what
it would read as its own language must not get in.  GRUB's words are quoted all the same.

Invariant: a word that passed is printable ASCII without blanks, quotes, `$`, backslash, backtick,
`#`, `|` or braces, whatever kind of word it is; a title may have blanks.

Secrets have no place on a kernel command line, which every user of the node and of the network
can read: an argument that by its name is one is refused.
"""

from __future__ import annotations

import re
import urllib.parse

from common.errors import Code, KaError

__all__ = [
    "check_argument",
    "check_interface",
    "check_label",
    "check_path",
    "check_title",
    "grub_quoted",
    "parse_mac",
    "printable",
    "url_path",
]

LABEL_SIZE_MAX = 63
ARGUMENT_SIZE_MAX = 512
PATH_SIZE_MAX = 512
TITLE_SIZE_MAX = 60

_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?", re.ASCII)
_ARGUMENT = re.compile(r"[A-Za-z0-9_.,:;=/@%+~*?&!()\[\]<>^-]+", re.ASCII)
_IPXE_OPERATORS = frozenset({";", "&&", "!", "-", "--"})
_PATH = re.compile(r"[A-Za-z0-9_.+~@-]+(?:/[A-Za-z0-9_.+~@-]+)*", re.ASCII)
_TITLE = re.compile(r"[A-Za-z0-9_.,:;=/@%+*?!()<> -]+", re.ASCII)
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{2}(?:([:-])[0-9a-f]{2}(?:\1[0-9a-f]{2}){4})", re.ASCII)
_SECRET = re.compile(
    r"(?:^|[._-])(?:pass(?:word|wd|phrase)?|secrets?|tokens?|credentials?"
    r"|(?:api|private|access|luks|cluster)[._-]?key)$",
    re.IGNORECASE,
)
_CREDENTIALS_IN_URL = re.compile(r"://[^/@]*:[^/@]*@")


def check_label(text: str, what: str) -> str:
    """Return a name of one DNS label, in lower case; raises USAGE."""
    if len(text) > LABEL_SIZE_MAX or _LABEL.fullmatch(text) is None:
        raise KaError(
            Code.USAGE, f"not {what}: {text[:80]!r} (letters, digits and dashes, at most 63)"
        )
    return text.lower()


def check_argument(text: str) -> str:
    """Return one kernel argument; raises USAGE if a script could misread it, or it is a secret."""
    shown = text[:80]
    if len(text) > ARGUMENT_SIZE_MAX or _ARGUMENT.fullmatch(text) is None:
        raise KaError(
            Code.USAGE,
            f"not a kernel argument: {shown!r} (one word, no quotes, $, #, |, braces or backslash)",
        )
    if text in _IPXE_OPERATORS:
        raise KaError(Code.USAGE, f"not a kernel argument: {shown!r} (iPXE takes it for its own)")
    name = text.partition("=")[0]
    if _SECRET.search(name) or _CREDENTIALS_IN_URL.search(text):
        # The value is not shown: the message may end in a log.
        raise KaError(
            Code.USAGE, f"a secret on a kernel command line: {name[:40]!r} (anybody can read it)"
        )
    return text


def check_path(text: str, what: str) -> str:
    """Return a path below the served directory; raises USAGE."""
    parts = text.split("/")
    if len(text) > PATH_SIZE_MAX or _PATH.fullmatch(text) is None or {".", ".."} & set(parts):
        raise KaError(
            Code.USAGE,
            f"{what}: not a path below the served directory: {text[:80]!r}"
            " (relative; letters, digits and _ . + ~ @ -)",
        )
    return text


def check_title(text: str) -> str:
    """Return a line for people to read in a menu; raises USAGE."""
    if len(text) > TITLE_SIZE_MAX or _TITLE.fullmatch(text) is None or text != text.strip():
        raise KaError(
            Code.USAGE,
            f"not a title: {text[:80]!r} (at most {TITLE_SIZE_MAX} plain characters, no quotes)",
        )
    return text


def check_interface(text: str) -> str:
    """Return the name of a network interface; raises USAGE."""
    if _INTERFACE.fullmatch(text) is None or text in (".", ".."):
        raise KaError(Code.USAGE, f"not a network interface: {text[:40]!r}")
    return text


def parse_mac(text: str) -> str:
    """Return an Ethernet address as `52:54:00:12:34:56`; raises USAGE.

    Takes colons or dashes, any case, and the type before it that PXELINUX writes (`01-52-54-...`).
    """
    lower = text.lower()
    if len(lower) == 20 and lower[:3] in ("01-", "01:"):
        lower = lower[3:]
    if _MAC.fullmatch(lower) is None:
        raise KaError(Code.USAGE, f"not a MAC address: {text[:40]!r} (such as 52:54:00:12:34:56)")
    mac = lower.replace("-", ":")
    if mac in ("00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff") or int(mac[:2], 16) & 1:
        raise KaError(Code.USAGE, f"not the MAC address of one machine: {mac}")
    return mac


def printable(text: str, size_max: int) -> str:
    """Return foreign text for a log or a table: printable ASCII, cut at a size."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:size_max]).strip()


def url_path(path: str) -> str:
    """Return a path as it stands in a URL."""
    return urllib.parse.quote(path, safe="/~+@")


def grub_quoted(word: str) -> str:
    """Return a word in GRUB's single quotes, inside which nothing has a meaning."""
    assert "'" not in word
    assert "\n" not in word
    return f"'{word}'"
