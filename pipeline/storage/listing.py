"""Lists folders wherever they live, and deletes what killed writers left in local ones."""

from __future__ import annotations

import contextlib
import os
import re

from pipeline.storage.files import ask, filesystem, is_temporary, is_url, remove

# As `files.writing`, checkpoints and notes between workers name them.
TEMPORARY = re.compile(r"\.tmp-(\d+-[0-9a-f]{8}(-.*)?|[0-9a-f]{12}\.json)")
BY_PREFIX = {"s3", "gs"}  # file systems whose drivers leave the choice to the server


def listdir(path: str, prefix: str = "") -> list[str]:
    """Sorted names directly inside a folder, without temporary files; [] where there is no such folder. With `prefix`
    those that begin so, which object stores find without looking at the others."""
    if is_url(path):
        try:
            names = list(_remote_names(path, prefix))
        except FileNotFoundError:
            return []
    else:
        try:
            names = os.listdir(path)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(name for name in names if name.startswith(prefix) and not is_temporary(name))


def _remote_names(path: str, prefix: str) -> set[str]:
    fs, inner = filesystem(path)
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if prefix and protocols & BY_PREFIX:
        root = fs._strip_protocol(inner).rstrip("/")
        found = ask(path, lambda fs, inner: fs.find(root, prefix=prefix))
        return {entry[len(root) + 1 :].split("/", 1)[0] for entry in found}
    found = ask(path, lambda fs, inner: fs.ls(inner, detail=False))
    return {entry.rstrip("/").rsplit("/", 1)[-1] for entry in found}


def walk(path: str) -> dict[str, int]:
    """{path relative to the folder: bytes} of every file below it, without temporary files."""
    if is_url(path):
        fs, inner = filesystem(path)
        root = fs._strip_protocol(inner).rstrip("/")
        found = ask(path, lambda fs, inner: fs.find(root, detail=True))
        sizes = {name[len(root) + 1 :]: int(info["size"] or 0) for name, info in found.items()}
        return {name: size for name, size in sorted(sizes.items()) if not is_temporary(name.rsplit("/", 1)[-1])}
    sizes = {}
    folders = [("", path)]
    while folders:
        before, folder = folders.pop()
        # What vanished while we looked, and what we may not look into.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append((f"{before}{entry.name}/", entry.path))
                elif not is_temporary(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        if entry.is_file():
                            sizes[before + entry.name] = entry.stat().st_size
    return dict(sorted(sizes.items()))


def sweep(folder: str, within: str = "") -> None:
    """Delete the temporary files that killed writers left in a local folder, and in folders in it whose names match the
    regular expression `within` with all below them (only while holding its lock). Other people's files stay."""
    if is_url(folder) or not os.path.isdir(folder):
        return
    for parent, folders, names in os.walk(folder):
        for name in [*names, *folders]:
            if TEMPORARY.fullmatch(name):
                remove(os.path.join(parent, name))
        if parent == folder:
            folders[:] = [name for name in folders if within and re.fullmatch(within, name)]
