"""Checks of `tracking.uri`: a store that MLflow supports, and no secret in the address."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote

from keel_megatron.config.run import RunConfig

_STORES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks")
_DATABASES = ("postgresql", "mysql", "mssql")
_OPTIONS = re.compile(
    "application_name|charset|connect_timeout|driver|encrypt|host|port|read_timeout|service|ssl_ca|"
    "ssl_cert|ssl_key|sslcert|sslkey|sslmode|sslrootcert|target_session_attrs|"
    "trustservercertificate|trusted_connection|user|write_timeout|"
    # sqlite's
    "cache|cached_statements|check_same_thread|immutable|isolation_level|mode|nolock|timeout|uri|"
    "vfs"
)
"""Options of a database URI that hold no secret."""


def credentials(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Refuse secrets in the URI: the configuration is saved, logged and shown."""
    uri = config.tracking.uri
    if uri is None:
        return
    scheme, _, rest = uri.partition("://")
    kind = scheme.lower().partition("+")[0]
    is_database = kind in _DATABASES
    if _has_user(kind, rest) or not _is_harmless(kind, rest):
        instead = (
            "the database's own, such as PGPASSWORD or MYSQL_PWD"
            if is_database
            else "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
        yield (
            "tracking.uri",
            "contains a user, a password, an option or a fragment that may be a secret; use "
            f"environment variables: {instead}",
        )


def _has_user(kind: str, rest: str) -> bool:
    """Whether a URI has a user part; in a database URI, a user without a password is allowed."""
    if kind in ("sqlite", "file"):
        return "@" in rest.partition("/")[0]  # after that it is a path
    if kind in _DATABASES:  # a password may have a slash in it
        user, at, _host = rest.partition("?")[0].rpartition("@")
        return bool(at) and ":" in user
    return "@" in rest


def _is_harmless(kind: str, rest: str) -> bool:
    """Whether the URI's query and fragment are known to hold no secret."""
    if kind not in (*_DATABASES, "sqlite"):
        return "?" not in rest and "#" not in rest
    query = rest.partition("?")[2]
    if "#" in (query if kind == "sqlite" else rest):
        return False
    names = [option.partition("=")[0] for option in re.split("[&;]", query) if option]
    return all(_OPTIONS.fullmatch(unquote(name).lower()) for name in names)


def known_store(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Refuse an unknown scheme: MLflow would read it as a folder or as a server that is down."""
    uri = config.tracking.uri
    if uri is None or uri == "databricks":
        return
    scheme, separator, _rest = uri.partition("://")
    if not separator or scheme.partition("+")[0] not in _STORES:
        is_word = re.fullmatch(
            r"[A-Za-z][\w+.-]{0,20}", scheme
        )  # otherwise it may contain a password
        named = repr(scheme) if is_word else "it"
        yield (
            "tracking.uri",
            f"{named} is not a store type of MLflow; use one of "
            f"{', '.join(name + '://...' for name in _STORES)}, databricks, or null",
        )
