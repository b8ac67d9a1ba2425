"""Keeps whole the sqlite file in which MLflow holds the runs of a job that has no server; no MLflow in here."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from pipeline import storage

SCHEME = "sqlite:///"


def path_of(store: str) -> Path:
    return Path(store.removeprefix(SCHEME))


def address(store: str) -> str:
    """The store as MLflow opens it: SQLAlchemy takes `?` and `%41` in a path for more than letters, and MLflow makes
    the folder of a plain sqlite:/// literally."""
    path = store.removeprefix(SCHEME)
    return f"sqlite+pysqlite:///{quote(path)}" if "?" in path or "%" in path else store


def create(path: Path, make: Callable[[Path], None]) -> None:
    """Put the file that `make` writes at `path` in one step; one that another process put there first stays."""
    folder = path.with_name(f".tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}-mlflow")
    folder.mkdir(parents=True)
    try:
        made = folder / path.name
        make(made)
        with made.open("rb+") as file:
            os.fsync(file.fileno())
        try:
            os.link(made, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            if not path.exists():
                made.replace(path)
        storage.sync_folder(str(path.parent))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def damage(path: Path) -> str:
    """What is wrong with the file, "" for nothing. sqlite3.OperationalError: it cannot be looked at now (locked)."""
    try:
        with contextlib.closing(_open(path)) as store:
            found = store.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                return str(found)
            tables = store.execute("SELECT count(*) FROM sqlite_master WHERE name IN ('runs', 'metrics')").fetchone()[0]
            return "" if tables == 2 else "it has no tables of runs"
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        return str(error)


def is_empty(path: Path) -> bool:
    """Whether the store holds no run, so that nothing is lost with it."""
    with contextlib.closing(_open(path)) as store:
        return store.execute("SELECT count(*) FROM runs").fetchone()[0] == 0


def holds(path: Path, run_id: str) -> bool:
    """Whether the store has a run, deleted ones included: somebody did that on purpose."""
    with contextlib.closing(_open(path)) as store:
        return store.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run_id,)).fetchone() is not None


def experiment_of(path: Path, run_id: str) -> str | None:
    """The id of a run's experiment."""
    with contextlib.closing(_open(path)) as store:
        found = store.execute("SELECT experiment_id FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()
    return str(found[0]) if found else None


def set_aside(path: Path) -> Path:
    """Rename a store, with what sqlite keeps beside it, and return its new name."""
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}")
    for suffix in ("", "-journal", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
    return aside


def _open(path: Path) -> sqlite3.Connection:
    # Never created here; and not `mode=ro`, which cannot undo what a killed writer left.
    return sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=20.0)
