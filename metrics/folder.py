"""The folder of a test, or of samples for a user's image: it holds results of the same settings only."""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from itertools import count
from pathlib import Path
from typing import Any

# Settings that may differ without making it another test: the images and weights themselves are compared.
WITHOUT_EFFECT = ("data_path", "part", "report_images")
SETTINGS = "settings.json"


def free_folder(folder: Path, **settings: Any) -> Path:
    """Where results go, made: `folder`, or folder_2, ... where it holds those of other settings.

    settings: dataclasses and JSON values by name, such as the fingerprints of images and weights. They are
    kept in settings.json, which only the first process writes, even if several start at the same moment.
    Those in WITHOUT_EFFECT may differ: the test then goes on in the same folder. For each folder that is
    left as it is, a line says which settings differ.
    Raises OSError, naming the path, where no folder can be made."""
    # Through JSON and back, as the file has it: a tuple would never equal the list read from it.
    ours = json.loads(json.dumps({name: _plain(value) for name, value in settings.items()}))
    for number in count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        theirs = _claimed(place, ours)
        if theirs == ours:
            return place
        differing = list(_differing(ours, theirs)) if isinstance(theirs, dict) else []
        reason = f"; {', '.join(differing[:5])} differ" if differing else ""
        print(f"{place}: kept, the results of another command{reason}")
    raise AssertionError("count does not end")


def _claimed(place: Path, ours: dict[str, Any]) -> Any:
    """The settings whose results this folder holds, `ours` if it was free; None if unknown."""
    if place.exists() and not place.is_dir():
        return None
    try:
        place.mkdir(parents=True, exist_ok=True)
        others = any(path.name != SETTINGS for path in place.iterdir())
        if others and not (place / SETTINGS).exists():  # a user's files
            return None
        # a+ creates the file if it is missing and never empties it, whichever process comes first.
        with open(place / SETTINGS, "a+") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)  # of several that start at once, one comes first
            file.seek(0)
            content = file.read()
            if not content:
                file.write(json.dumps(ours))
                return ours
    except OSError as error:
        raise OSError(f"{place}: no results can be kept there ({error}); choose another --output_path"
                      ) from error
    try:
        return json.loads(content)
    except ValueError:  # damaged
        return None


def _plain(value: Any) -> Any:
    """A dataclass as a dict, without what has no effect; another value as it is."""
    if not is_dataclass(value):
        return value
    return {name: item for name, item in asdict(value).items() if name not in WITHOUT_EFFECT}  # type: ignore


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """The names of the settings that differ."""
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        # The innermost names say most: "steps", not the whole configuration it is in.
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differing(a, b)
        elif a != b:
            yield name
