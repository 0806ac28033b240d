"""URLs as they are shown: without what may be a secret."""

from __future__ import annotations

import re

_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*)://(\S*)")
_RELATIVE = re.compile(r"(\burl: /[^\s?#]*)[?#](\S*)")
"""How urllib3 names what it asked of a server."""
_FILES = ("sqlite", "file")
_CLOSING = re.compile(r"""['")\]},.:;>]*\Z""")
_HIDDEN = "***"


def without_credentials(text: str) -> str:
    """A text in which every URL has `***` for its user part, its query and its fragment.

    Where a password has such characters that it is not certain where it ends, more is hidden.
    """
    return _RELATIVE.sub(_relative, _URL.sub(_shown, text))


def _shown(match: re.Match[str]) -> str:
    scheme, rest = match.groups()
    if scheme.lower().partition("+")[0] in _FILES and rest.startswith("/"):
        path, mark, query = rest.partition("?")  # a path may have `@` and `#` in it
        return f"{scheme}://{path}{_hidden(mark, query)}"
    user, at, rest = rest.rpartition("@")
    if re.search(r"[?#]", user):  # a password with such a character, or a query with an `@`
        return f"{scheme}://{_hidden('', rest)}"
    host = re.match(r"[^/?#]*", rest)
    assert host is not None
    if not at and _is_cut_short(host[0]):
        return f"{scheme}://{_HIDDEN}{rest[host.end() :]}"
    place = re.match(r"[^?#]*", rest)
    assert place is not None
    end = _hidden(rest[place.end() : place.end() + 1], rest[place.end() + 1 :])
    return f"{scheme}://{_HIDDEN + at if at else ''}{place[0]}{end}"


def _relative(match: re.Match[str]) -> str:
    return match[1] + _hidden("?", match[2])


def _is_cut_short(host: str) -> bool:
    """Whether this is a user and a part of a password: what follows the colon is no port."""
    _name, colon, port = _CLOSING.sub("", host).rpartition(":")
    return bool(colon) and not port.isdecimal() and not host.startswith("[")


def _hidden(mark: str, text: str) -> str:
    """A query or fragment, hidden but for what closes the text that it stands in."""
    closing = _CLOSING.search(text)
    assert closing is not None
    return mark + (_HIDDEN if closing.start() else "") + closing[0]
