"""Where torch keeps what it compiles: a folder of this user's alone.

torch executes the contents of its cache: pickles, Python, libraries. So the cache is neither in a
run's folder, which is untrusted, nor in torch's default, a predictable name in the shared temporary
folder, but in `KEEL_CACHE`/compiled (by default
~/.cache/keel-megatron/compiled). Its entries are named after their contents: all runs share it.

On several nodes that folder is usually on a network file system, where hundreds of ranks would read
and write small files at once. There each node compiles into a folder of its own disk, which starts
as a copy of the cache; what is new in it is copied back when the run ends.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from keel_megatron.compat.patch_table import patch
from keel_megatron.errors import UserError

INDUCTOR, TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
CACHE = "KEEL_CACHE"
_NAME = "compiled"


@patch(
    changes="the environment variables TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR, unless they "
    "are set; `torch._inductor.config.cpp_cache_precompile_headers`",
    why="torch executes the contents of its cache, which by default has a predictable name in the "
    "shared temporary folder; its precompiled headers are there in any case",
    needed_by="torch 2.9 to 2.13",
    test="tests/compat/test_compile_cache.py::test_the_cache_is_the_users_alone",
)
def use() -> Path:
    """Let torch compile with the cache from now on; to be called before anything is compiled.

    A `TORCHINDUCTOR_CACHE_DIR` or `TRITON_CACHE_DIR` of the user's goes first. Where no folder can
    be made, a temporary one serves this process.

    Returns:
        Inductor's cache.

    Raises:
        UserError: another user may write the cache.
    """
    chosen = os.environ.get(INDUCTOR)
    if chosen is None or Path(chosen).name.startswith("torchinductor_"):  # torch sets its own
        cache = private_folder()
        os.environ[INDUCTOR] = chosen = str(_on_this_node(cache) if _several_nodes() else cache)
    os.environ.setdefault(TRITON, str(Path(chosen) / "triton"))
    _no_shared_headers()
    return Path(chosen)


def private_folder() -> Path:
    """The cache, which only this user can enter; made if it is not there.

    Raises:
        UserError: it is a link, belongs to another user, or others may write it.
    """
    try:
        root = _root()
        root.parent.mkdir(parents=True, exist_ok=True)
        for folder in (root, root / _NAME):
            folder.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        pass  # something that is no folder: refused below
    except (OSError, RuntimeError):  # a user without a home
        return _temporary()
    for folder in (*reversed(root.parents), root, root / _NAME):
        _check(folder, ours=folder in (root, root / _NAME))
    return root / _NAME


def _root() -> Path:
    home = os.environ.get(CACHE)
    if not home:
        base = os.environ.get("XDG_CACHE_HOME", "")
        parent = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
        home = str(parent / "keel-megatron")
    # Links on the way are the user's own, or an administrator's: ~/.cache is often on another disk.
    root = Path(os.path.abspath(home))
    return root.parent.resolve() / root.name


def _check(folder: Path, *, ours: bool) -> None:
    """Refuse a folder in which another user may create or replace files."""
    found = os.lstat(folder)
    own = found.st_uid == os.geteuid()
    problem = None
    if not stat.S_ISDIR(found.st_mode):
        problem = "is a link" if stat.S_ISLNK(found.st_mode) else "is no folder"
    elif ours and not own:
        problem = f"belongs to another user (id {found.st_uid})"
    elif ours and stat.S_IMODE(found.st_mode) & 0o077:
        problem = "can be entered by others"
    elif found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        problem = "can be written by everybody"
    elif found.st_mode & stat.S_IWGRP and not (own or found.st_mode & stat.S_ISVTX):
        problem = "can be written by its group"
    if problem is not None:
        raise UserError(
            f"{CACHE}: {folder} {problem}. torch executes the compiled code in it, so nobody else "
            "may have access: remove it, `chmod 700` it if everything in it is yours, or set the "
            f"environment variable {CACHE} to another folder"
        )


def _several_nodes() -> bool:
    of_node = _number("LOCAL_WORLD_SIZE", _number("LOCAL_SIZE", 1))  # DeepSpeed's launcher's name
    return _number("WORLD_SIZE", 1) > of_node


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


def _on_this_node(cache: Path) -> Path:
    """This node's copy of the cache; the node's first rank fills it, and copies back at the end."""
    local = Path(tempfile.gettempdir()) / f"keel-compiled-{os.geteuid()}"
    try:
        local.mkdir(mode=0o700, exist_ok=True)
        _check(local, ours=True)
    except (OSError, UserError):  # somebody else has taken the name
        local = _temporary()
    if _number("LOCAL_RANK", 0) == 0:
        _copy_new(cache, local)
        atexit.register(_copy_new, local, cache)
    return local


def _copy_new(source: Path, target: Path) -> None:
    """Copy the files that the target has not; each appears whole. A cache may be incomplete."""
    with suppress(OSError):
        for path in source.rglob("*"):
            copy = target / path.relative_to(source)
            if copy.exists() or path.is_symlink() or not path.is_file():
                continue
            copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            whole = copy.with_name(f".{copy.name}.{os.getpid()}")
            shutil.copyfile(path, whole)
            whole.chmod(path.stat().st_mode)
            whole.replace(copy)


def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="keel-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@patch(
    changes="`torch._dynamo.config.recompile_limit`",
    why="torch gives up on a function after 8 graphs; a block has one for each of its structures",
    needed_by="torch 2.9 to 2.13",
    test="tests/compat/test_compile_cache.py::test_more_graphs_are_allowed_and_never_fewer",
)
def allow_graphs(count: int) -> None:
    """Let torch compile a function at least so many times."""
    import torch

    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, count)


def _no_shared_headers() -> None:
    """Inductor's precompiled C++ headers are always in the shared temporary folder."""
    from torch._inductor import config

    if hasattr(config, "cpp_cache_precompile_headers"):
        config.cpp_cache_precompile_headers = False
