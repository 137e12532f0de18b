"""Scores of a test, appended to a file as they come, so that a test that was stopped goes on where it was.

Each line of scores.*.jsonl is one image under one seed:
{"of": digest of what was tested, "id": image, "seed": 0, "seconds": 1.5, "scores": {"GED16": 0.3, ...}}
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from metrics.files import locked

Scores = dict[str, float]
Lines = dict[tuple[str, int], tuple[Scores, float]]  # name of an image, seed -> scores, seconds


class SystemRecord:
    """The scores of one system by image and seed, and the seconds of each; written to a file, if given."""

    def __init__(self, file: BinaryIO | None = None, digest: str = "", lines: Lines | None = None) -> None:
        """digest: of what is tested, in each line of the file. lines: what is known already."""
        self._file, self._digest, self._lines = file, digest, {} if lines is None else lines

    def __len__(self) -> int:
        return len(self._lines)

    def has(self, image: str, seed: int, columns: Collection[str] = ()) -> bool:
        """Whether an image has these scores under a seed; an earlier version may have recorded fewer."""
        line = self._lines.get((image, seed))
        return line is not None and all(column in line[0] for column in columns)

    def scores(self, image: str, seed: int) -> Scores:
        """The scores of an image under a seed, by name."""
        return self._lines[image, seed][0]

    def add(self, image: str, seed: int, scores: Scores, seconds: float) -> None:
        """Appends the scores of an image under a seed; seconds: what sampling and scoring took."""
        self._lines[image, seed] = scores, seconds
        if self._file is not None:
            line = {"of": self._digest, "id": image, "seed": seed, "seconds": seconds, "scores": scores}
            self._file.write(json.dumps(line).encode() + b"\n")
            # After each image, so that a killed process loses none that is done.
            self._file.flush()

    def seconds(self, images: Collection[str] | None = None) -> list[float]:
        """The recorded seconds of each set of samples, of these images or of all."""
        wanted = None if images is None else set(images)
        return [seconds for (image, _), (_, seconds) in self._lines.items()
                if wanted is None or image in wanted]


class Record:
    """What the files of a folder hold, and this process's file, locked, to append to; a context manager.

    Processes and parts of a test each have a file, scores.<part>of<parts>.<process>.jsonl, and read those of
    all. Lines that are damaged are left out with a message, so that their images are tested again."""

    def __init__(self, folder: Path, part: int = 1, parts: int = 1, process: int = 0) -> None:
        """Raises ValueError if another process has this file locked, OSError if it cannot be written."""
        self.folder, self.path = folder, folder / f"scores.{part}of{parts}.{process}.jsonl"
        self._systems: dict[str, Lines] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab")
        lock = locked(self._file)
        if lock is False:
            self._file.close()
            raise ValueError(f"{self.path}: another test writes here; wait for it, or use another "
                             "--output_path")
        if lock is None:
            print(f"warning: {self.path} cannot be locked on this file system: start no second test there")
        # Only with the lock held: an unfinished line might be one that another process is writing.
        content = self.path.read_bytes()
        self._file.truncate(content.rfind(b"\n") + 1)  # what a killed process has not finished
        # The files of all processes, whose number may have changed since the last run.
        for path in sorted(folder.glob("scores.*.jsonl")):
            self._read(path)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self, path: Path) -> None:
        *lines, _ = path.read_bytes().split(b"\n")  # after the last newline nothing, or a line not finished
        # A full disk or a copy in mid-write damages lines; all others are still worth their hours.
        damaged = []
        for number, line in enumerate(lines, start=1):
            try:
                content = json.loads(line)
                of_system = self._systems.setdefault(str(content["of"]), {})
                scores = {str(name): float(value) for name, value in content["scores"].items()}
                of_system[str(content["id"]), int(content["seed"])] = scores, float(content["seconds"])
            except (ValueError, LookupError, TypeError, AttributeError):  # UnicodeDecodeError is a ValueError
                damaged.append(number)
        if damaged:
            print(f"{path}: {len(damaged)} of {len(lines)} lines are damaged, the first is line "
                  f"{damaged[0]}; left out, their images are tested again")

    def of(self, *what: Any) -> SystemRecord:
        """The scores of one system; what: its label, and all that they depend on, such as its weights.

        Not settings of sampling, such as steps: a test with others has another folder, see `free_folder`."""
        # Scores of other weights have another digest, and are never taken for these.
        digest = hashlib.blake2b("\n".join(map(str, what)).encode(), digest_size=8).hexdigest()
        return SystemRecord(self._file, digest, self._systems.setdefault(digest, {}))

    def refuse_missing_parts(self, records: Mapping[str, SystemRecord], images: Sequence[str],
                             seeds: Sequence[int]) -> None:
        """Raises ValueError if the test was run in parts here, and some of its images have no scores yet.

        records: of each system, by its label. images: names of all, in the order in which part i of m takes
        image i - 1, i - 1 + m, ... The message names the parts that miss some."""
        numbers = {int(match[1]) for path in self.folder.glob("scores.*.jsonl")
                   if (match := re.fullmatch(r"scores\.\d+of(\d+)\.\d+\.jsonl", path.name))}
        m = max(numbers)  # of several divisions the finest: it asks for the least to be done again
        for label, record in records.items():
            missing = [index for index, image in enumerate(images)
                       if not all(record.has(image, seed) for seed in seeds)]
            if missing and m > 1:
                numbers_of_parts = sorted({index % m + 1 for index in missing})
                names = ", ".join(f"{part}/{m}" for part in numbers_of_parts[:8])
                raise ValueError(f"{self.folder}: {len(missing)} of {len(images)} images have not been "
                                 f"tested with {label}, such as {images[missing[0]]}; run the same command "
                                 f"with --part {names}{', ...' if len(numbers_of_parts) > 8 else ''} first")
