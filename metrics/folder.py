"""The folder of a test: one for each combination of settings, models and images, of one test alone."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from itertools import count
from pathlib import Path
from typing import Any

from metrics.files import write_text

# Settings that may differ without making it another test: the images and weights themselves are compared.
WITHOUT_EFFECT = ("data_path", "part", "report_images")
SETTINGS = "settings.json"


def free_folder(folder: Path, **settings: Any) -> Path:
    """Where a test's results go, made: `folder`, or folder_2, ... where it holds those of another test.

    settings: dataclasses and JSON values that tell tests apart, by name, such as the fingerprints of images
    and weights; they are kept in settings.json, which only one of several processes can write: a folder has
    one test, also if others start at the same moment. Those in WITHOUT_EFFECT may differ, and the test goes
    on in the same folder. A line says which folder is left as it is, and what differs.
    Raises OSError, naming the path, where no folder can be made."""
    ours = json.loads(json.dumps({name: _plain(value) for name, value in settings.items()}))
    for number in count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        theirs = _claimed(place, ours)
        if theirs == ours:
            return place
        differing = list(_differing(ours, theirs)) if isinstance(theirs, dict) else []
        reason = f"; {', '.join(differing[:5])} differ" if differing else ""
        print(f"{place}: kept, the results of another test{reason}")
    raise AssertionError("count does not end")


def _claimed(place: Path, ours: dict[str, Any]) -> Any:
    """The settings of the test that has this folder: `ours`, now or before, or another's; None if unknown."""
    if not (place / "results.json").exists() or (place / SETTINGS).exists():
        place.mkdir(parents=True, exist_ok=True)
        temporary = place / f".{SETTINGS}.{secrets.token_hex(4)}.tmp"
        temporary.write_text(json.dumps(ours))
        try:
            os.link(temporary, place / SETTINGS)  # fails if there is one: whoever comes first has the folder
            return ours
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            with suppress(FileExistsError), open(place / SETTINGS, "x") as file:
                file.write(json.dumps(ours))
                return ours
        finally:
            temporary.unlink(missing_ok=True)
    try:
        theirs = json.loads((place / SETTINGS).read_text())
    except (ValueError, FileNotFoundError):  # damaged, or of an older version
        return None
    # A test of an earlier version, which kept fewer settings, goes on unless there are results to keep.
    if not (place / "results.json").exists() and _continues(ours, theirs):
        write_text(place / SETTINGS, ours)
        return ours
    return theirs


def _continues(ours: Mapping[str, Any], theirs: Any) -> bool:
    """Whether these are settings of an earlier version, in which all that it kept is as in ours."""
    return isinstance(theirs, dict) and 0 < len(theirs) < len(ours) and all(
        ours.get(name) == value for name, value in theirs.items())


def _plain(value: Any) -> Any:
    """A dataclass as a dict, without what has no effect; another value as it is."""
    if not is_dataclass(value):
        return value
    return {name: item for name, item in asdict(value).items() if name not in WITHOUT_EFFECT}  # type: ignore


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """The names of the settings that differ."""
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differing(a, b)
        elif a != b:
            yield name
