"""Other programs' masks, in files of any kind, have the scores that ours would have."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import metrics
from metrics.__main__ import main


@pytest.fixture
def cases(tmp_path):
    """Two cases: samples as PNGs of 0 and 255 or an array; masks as PNGs of 0 and 1, one of them empty."""
    random = np.random.default_rng(0)
    for case, (n, k) in {"a": (6, 3), "b": (6, 4)}.items():
        samples, masks = random.integers(0, 2, (n, 8, 9)), random.integers(0, 2, (k, 8, 9))
        masks[0] = 0
        if case == "a":
            write_pngs(tmp_path / "samples" / case, 255 * samples)
        else:
            np.save(tmp_path / "samples" / f"{case}.npy", samples.astype(np.int16))
        write_pngs(tmp_path / "masks" / case, masks)
    return tmp_path


def write_pngs(folder, masks):
    folder.mkdir(parents=True)
    for i, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8)).save(folder / f"{i}.png")


def test_scores_are_those_of_the_masks_in_the_files(cases, capsys):
    output = cases / "out.json"
    main([str(cases / "samples"), str(cases / "masks"), "--samples", "3", "6", "--output", str(output)])
    written, random = json.loads(output.read_text()), np.random.default_rng(0)
    for case, k in (("a", 3), ("b", 4)):
        samples, masks = random.integers(0, 2, (6, 8, 9)), random.integers(0, 2, (k, 8, 9))
        masks[0] = 0
        ged = metrics.ged(samples[None, :3], masks[None]).item()
        hm_iou = metrics.hm_iou(samples[None], masks[None]).item()
        assert written["cases"][case]["GED3"] == pytest.approx(ged, abs=1e-6)
        assert written["cases"][case]["HM-IoU6"] == pytest.approx(hm_iou, abs=1e-6)
    mean = (written["cases"]["a"]["GED6"] + written["cases"]["b"]["GED6"]) / 2
    assert written["mean"]["GED6"] == pytest.approx(mean)
    assert f"| 2 | {written['mean']['GED3']:.4f} | {mean:.4f} |" in capsys.readouterr().out


def test_volumes_are_scored_whole(tmp_path, capsys):
    random = np.random.default_rng(1)
    volumes = {"samples": random.integers(0, 2, (3, 4, 5, 6)), "masks": random.integers(0, 2, (2, 4, 5, 6))}
    for name, of_case in volumes.items():
        for i, volume in enumerate(of_case):
            write_volume(tmp_path / name / "a", i, volume.astype(np.uint8))
    main([str(tmp_path / "samples"), str(tmp_path / "masks")])
    flat = [of_case.reshape(1, -1, 4, 30) for of_case in volumes.values()]
    assert f"| 1 | {metrics.ged(*flat).item():.4f} |" in capsys.readouterr().out


def write_volume(folder, number, values, affine=None):
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine),
                 folder / f"{number}.nii.gz")


def test_an_array_in_a_folder_is_one_mask_as_every_file_there(tmp_path, capsys):
    volumes = np.random.default_rng(3).integers(0, 2, (3, 4, 5, 6))
    for name in ("samples", "masks"):
        (tmp_path / name / "a").mkdir(parents=True)
        for number, volume in enumerate(volumes):
            np.save(tmp_path / name / "a" / f"{number}.npy", volume)
    main([str(tmp_path / "samples"), str(tmp_path / "masks")])
    assert "| GED3 |" in capsys.readouterr().out
    for name in ("samples", "masks"):  # also one that is called like the case
        for number in range(3):
            (tmp_path / name / "a" / f"{number}.npy").unlink()
        np.save(tmp_path / name / "a" / "a.npy", volumes[0])
    main([str(tmp_path / "samples"), str(tmp_path / "masks")])
    assert "| GED1 |" in capsys.readouterr().out


def test_volumes_are_turned_as_their_headers_say(tmp_path, capsys):
    mask = (np.random.default_rng(2).random((4, 5, 6)) > 0.5).astype(np.float64)  # whole numbers
    turned = np.diag([-1.0, -1, 1, 1])
    turned[:2, 3] = 3, 4
    write_volume(tmp_path / "samples" / "a", 0, mask)
    write_volume(tmp_path / "masks" / "a", 0, mask[::-1, ::-1].astype(np.uint8), turned)
    main([str(tmp_path / "samples"), str(tmp_path / "masks")])
    assert "| 1 | 0.0000 | 1.0000 |" in capsys.readouterr().out
    for values, affine, message in ((mask, np.diag([2.0, 1, 1, 1]), "0.nii.gz: its affine, once turned"),
                                    (mask.reshape(4, 6, 5), np.eye(4), r"\(5, 6, 4\) pixels, expected")):
        write_volume(tmp_path / "masks" / "a", 0, values, affine)
        with pytest.raises(SystemExit, match=message):
            main([str(tmp_path / "samples"), str(tmp_path / "masks")])


def array(values):
    return lambda root: np.save(root / "samples" / "b.npy", values)


def picture(mode, size):
    return lambda root: Image.new(mode, size).save(root / "masks" / "a" / "1.png")


@pytest.mark.parametrize("spoil, message", [
    (lambda root: write_pngs(root / "masks" / "c", np.zeros((1, 2, 2))), "1 cases are in one folder only, "),
    (array(np.full((6, 8, 9), 0.5)), "b.npy: a mask with values such as 0.5"),
    (array(np.zeros((6, 8, 9, 2))), r"b.npy: \(6, 8, 9, 2\), expected a mask"),
    (array(np.zeros((6, 8, 8), int)), r"masks/b/0.png: \(8, 9\) pixels, expected \(8, 8\) .*b.npy"),
    (array(np.zeros((2, 8, 9), int)), "case b: 2 samples, expected 6"),
    (lambda root: np.save(root / "masks" / "a" / "1.npy", np.repeat(np.arange(3), 72).reshape(3, 8, 9)),
     r"a/1.npy: the values 0, 1, 2; expected 0 and one other"),  # each slice has one label
    (array(np.arange(432).reshape(6, 8, 9)), r"b.npy: the values 0, 1, 2, 3, 4, \.\.\.; expected 0"),
    (lambda root: (root / "masks" / "a" / "0.png").write_text("no image"), "a/0.png: not an image"),
    (picture("L", (3, 3)), r"a/1.png: \(3, 3\) pixels"),
    (lambda root: Image.new("RGB", (9, 8), "red").save(root / "masks" / "a" / "1.png"), "1.png: .*colours"),
])
def test_what_does_not_fit_is_named(spoil, message, cases):
    spoil(cases)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main([str(cases / "samples"), str(cases / "masks"), "--samples", "6"])


def test_of_unequal_numbers_of_samples_the_first_of_each_case_are_scored(cases, capsys):
    random = np.random.default_rng(5)
    write_pngs(cases / "samples" / "c", random.integers(0, 2, (4, 8, 9)))
    write_pngs(cases / "masks" / "c", random.integers(0, 2, (2, 8, 9)))
    output = cases / "out.json"
    main([str(cases / "samples"), str(cases / "masks"), "--output", str(output)])
    assert capsys.readouterr().out.startswith(
        "case c has 4 samples, case a 6: of each case the first 4 are scored, so that cases are comparable; "
        "--samples sets how many\n| cases | GED4 | HM-IoU4 |")
    written, random = json.loads(output.read_text()), np.random.default_rng(0)
    samples, masks = random.integers(0, 2, (6, 8, 9)), random.integers(0, 2, (3, 8, 9))
    masks[0] = 0
    expected = metrics.score(*(torch.from_numpy(sets[None]) for sets in (samples[:4], masks)), (4,))
    assert written["cases"]["a"] == pytest.approx({name: value.item() for name, value in expected.items()})
    main([str(cases / "samples"), str(cases / "masks"), "--samples", "2"])
    assert "of each case the first 2 are scored" in capsys.readouterr().out
    for case in "ab":
        shutil.rmtree(cases / "masks" / case)
    shutil.rmtree(cases / "samples" / "a")
    (cases / "samples" / "b.npy").unlink()
    main([str(cases / "samples"), str(cases / "masks")])
    assert capsys.readouterr().out.startswith("| cases | GED4 |")  # nothing is left out


@pytest.mark.parametrize("counts", [["0"], ["-1", "2"], ["2", "2"]])
def test_numbers_of_samples_that_make_no_sense_are_refused(counts, cases):
    with pytest.raises(SystemExit, match=f"error: --samples {' '.join(counts)}: expected different numbers"):
        main([str(cases / "samples"), str(cases / "masks"), "--samples", *counts])


def test_names_that_differ_in_unicode_form_only_are_one_case(tmp_path, capsys):
    mask = np.eye(4, dtype=np.uint8)[None]
    write_pngs(tmp_path / "samples" / "caf\u00e9", mask)
    write_pngs(tmp_path / "masks" / "cafe\u0301", mask)
    main([str(tmp_path / "samples"), str(tmp_path / "masks")])
    assert "| 1 | 0.0000 |" in capsys.readouterr().out
    write_pngs(tmp_path / "masks" / "caf\u00e9", mask)
    with pytest.raises(SystemExit, match="error: .*: case caf\u00e9 is also in .*; expected it once"):
        main([str(tmp_path / "samples"), str(tmp_path / "masks")])


def test_a_file_that_this_command_did_not_write_is_kept(cases, capsys):
    output, command = cases / "out.json", [str(cases / "samples"), str(cases / "masks"), "--output"]
    for content in ("notes", "[]", '{"samples": "other"}'):
        output.write_text(content)
        with pytest.raises(SystemExit, match=f"error: --output {output}: exists, and is not what this"):
            main([*command, str(output)])
        assert output.read_text() == content
    output.unlink()
    main([*command, str(output)])
    main([*command, str(output)])  # the same command
    with pytest.raises(SystemExit, match="exists, and is not what this command wrote"):
        main([*command, str(output), "--samples", "2"])


def test_without_memory_disk_or_permission_it_ends_in_one_line(cases, monkeypatch):
    command = [str(cases / "samples"), str(cases / "masks"), "--output", str(cases / "out.json")]

    def failing(error):
        def fail(*_):
            raise error
        return fail

    for name, error, message in (
            ("score_blocks", MemoryError(), "error: out of memory. What helps: fewer --samples"),
            ("write_text", OSError(28, "No space left on device"), "error: .*No space left on device"),
            ("cases_of", PermissionError(13, "Permission denied", "masks"), "error: .*Permission denied")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=message) as end:
            patch.setattr(f"metrics.__main__.{name}", failing(error))
            main(command)
        assert "\n" not in str(end.value) and len(str(end.value)) < 400


def test_a_terminal_that_knows_ascii_only_gets_escapes(tmp_path):
    write_pngs(tmp_path / "F\u00e4lle" / "a", np.eye(4, dtype=np.uint8)[None])
    write_pngs(tmp_path / "F\u00e4lle" / "\u00e4", np.eye(4, dtype=np.uint8)[None].repeat(2, 0))
    done = subprocess.run([sys.executable, "-m", "metrics", *2 * [str(tmp_path / "F\u00e4lle")]],
                          env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and done.stdout.startswith(r"case a has 1 samples, case \xe4 2: of each case")


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(SystemExit, match="error: .*nowhere: no such folder"):
        main([str(tmp_path / "nowhere"), str(tmp_path)])
    with pytest.raises(SystemExit, match="no case; expected sub-folders"):
        main([str(tmp_path), str(tmp_path)])
