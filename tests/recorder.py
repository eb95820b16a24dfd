"""Records what a command makes durable, and says where the order of its changes would lose or invent something.

The rules, which hold for everything that fastcache writes:

1. What is renamed was flushed after its last write: the file, or each file and folder of a tree.
2. The next change of whoever renamed something is to flush the folder that it now stands in.
3. When something gets its name, or a part its line in `parts.jsonl`, everything that the same output holds already is
   durable: a file never speaks of another one that a crash may take away.
4. At the end all that was written is durable.

Names that begin with a dot are temporary, and `status.json` is of the moment: these may be lost.
"""

import hashlib
import os
import threading
from pathlib import Path

from disk_changes import Changes

LOG = "parts.jsonl"
OF_THE_MOMENT = ("status.json",)


def is_kept(name):
    return not name.startswith(".") and name not in OF_THE_MOMENT


def state_of(path):
    """What a flush makes durable: the bytes of a file, or the names in a folder with what they stand for."""
    if path.is_dir():
        return frozenset((entry.name, entry.inode()) for entry in os.scandir(path) if is_kept(entry.name))
    return hashlib.sha256(path.read_bytes()).digest()


class Recorder:
    """Follows all changes below `root`, which is durable as it stands at the beginning."""

    def __init__(self, root):
        self.root = Path(os.path.realpath(root))
        self.faults, self.changes = [], []
        self._flushed = {}
        """State at the last flush, by device and inode."""
        self._held = []
        """Open descriptors, so that the system gives no inode to another file."""
        self._owed = {}
        """The folder that a thread has to flush next."""
        self._lock = threading.RLock()
        for path in self._below(self.root):
            self._note(path)
        self._watch = Changes(self.root, self._see)

    def __enter__(self):
        self._watch.__enter__()
        return self

    def __exit__(self, *error):
        self._watch.__exit__(*error)
        if error[0] is None:
            self._check_all(self.root, "the command ended")
            self.faults += [f"{folder}: renamed into, and not flushed" for folder in self._owed.values()]
        for descriptor in self._held:
            os.close(descriptor)

    def _below(self, folder):
        """`folder` and all that is kept below it."""
        yield folder
        for place, folders, names in os.walk(folder):
            folders[:] = filter(is_kept, folders)
            yield from (Path(place, name) for name in (*folders, *filter(is_kept, names)))

    def _note(self, path):
        status = path.stat()
        key = status.st_dev, status.st_ino
        if key not in self._flushed:
            self._held.append(os.open(path, os.O_RDONLY))
        self._flushed[key] = state_of(path)

    def _is_durable(self, path):
        try:
            status, state = path.stat(), state_of(path)
        except FileNotFoundError:  # another thread's
            return True
        flushed = self._flushed.get((status.st_dev, status.st_ino))
        if path.is_dir():  # what was removed from a folder may come back in a crash, and harms nobody
            return state <= (flushed or frozenset())
        return state == flushed

    def _check_all(self, folder, moment):
        for path in self._below(folder):
            if not self._is_durable(path):
                self.faults.append(f"{path.relative_to(self.root)}: not flushed when {moment}")

    def _output_of(self, path):
        """The output directory that `path` is in."""
        return next((folder for folder in path.parents if (folder / "run.json").is_file()), path.parent)

    def _see(self, kind, path, source):
        with self._lock:
            path, thread = Path(path), threading.get_ident()
            name = str(path.relative_to(self.root))
            owed = self._owed.pop(thread, None)
            if owed is not None and (kind, path) != ("flush", owed):
                self.faults.append(
                    f"{owed.relative_to(self.root)}: renamed into, and then not flushed but {kind} {name}"
                )
            if kind == "flush":
                self._note(path)
            elif kind == "rename" and is_kept(path.name):
                self._check_source(Path(source), name)
                for folder in {self._output_of(path), path.parent}:  # the latter may lie in a temporary one
                    self._check_all(folder, f"{name} got its name")
                self._owed[thread] = path.parent
            elif kind == "open" and path.name == LOG:
                self._check_all(path.parent, f"a line of {name} was written")
            self.changes.append((kind, name))

    def _check_source(self, source, name):
        paths = [source, *source.rglob("*")] if source.is_dir() else [source]
        for path in paths:
            if not self._is_durable(path):
                self.faults.append(f"{name}: {path.relative_to(source.parent)} not flushed when it got its name")
