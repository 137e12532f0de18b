"""Scores of a test, appended to a file as they come, so that a test that was stopped goes on where it was.

Each line of scores.*.jsonl is one image under one seed:
{"of": digest of what was tested, "id": image, "seed": 0, "seconds": 1.5, "scores": {"GED16": 0.3, ...}}
"""

import hashlib
import json
import time
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

Scores = dict[str, float]
Key = tuple[str, int]  # id of an image, seed


class Record:
    """What the files of a folder hold, and a file of this process's own to append to.

    Processes and parts of a test each have their own file and read those of all."""

    def __init__(self, folder: Path, name: str) -> None:
        """name: of this process's file, scores.<name>.jsonl. A last line that was cut short is left out."""
        self.path = folder / f"scores.{name}.jsonl"
        self._lines: dict[str, dict[Key, tuple[Scores, float]]] = {}
        for path in sorted(folder.glob("scores.*.jsonl")):
            whole, newline, _ = path.read_bytes().rpartition(b"\n")
            for line in whole.decode().splitlines():
                one = json.loads(line)
                of = self._lines.setdefault(one["of"], {})
                of[one["id"], one["seed"]] = one["scores"], one["seconds"]
            if path == self.path:
                with open(path, "r+b") as file:
                    file.truncate(len(whole + newline))

    def of(self, *what: Any) -> "Memory":
        """The scores of one system; what: its label, and all that they depend on, such as its weights.

        Not settings of sampling, such as steps: a test with others has another folder, see `free_folder`."""
        name = hashlib.blake2b("\n".join(map(str, what)).encode(), digest_size=8).hexdigest()
        return Memory(self.path, name, self._lines.setdefault(name, {}))


class Memory(MutableMapping[Key, Scores]):
    """Scores of one system by image and seed; what is set is appended to the file at once."""

    def __init__(self, path: Path, name: str, lines: dict[Key, tuple[Scores, float]]) -> None:
        self._path, self._name, self._lines = path, name, lines
        self._since = time.perf_counter()

    def __getitem__(self, key: Key) -> Scores:
        return self._lines[key][0]

    def __setitem__(self, key: Key, scores: Scores) -> None:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._lines[key] = scores, seconds
        line = {"of": self._name, "id": key[0], "seed": key[1], "seconds": seconds, "scores": scores}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def __delitem__(self, key: Key) -> None:
        raise TypeError("scores are appended, never deleted")

    def __iter__(self) -> Iterator[Key]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def seconds(self, ids: Sequence[str]) -> float:
        """Of sampling and scoring these images."""
        wanted = set(ids)
        return sum(seconds for (name, _), (_, seconds) in self._lines.items() if name in wanted)

    def require(self, ids: Sequence[str], seeds: Sequence[int], label: str) -> None:
        """Raises ValueError if an image lacks the scores of a seed; label: of the system."""
        missing = [name for name in ids if any((name, seed) not in self._lines for seed in seeds)]
        if missing:
            raise ValueError(f"{self._path.parent}: {len(missing)} of {len(ids)} images have not been "
                             f"tested with {label}, such as {missing[0]}; test all parts, or drop --merge")
