"""The exported lists are those that the scripts train, validate and test on."""

import csv

import pytest

import data
from data.export import main
from models.flags import experiment


def test_the_lists_are_those_of_the_runs_and_have_no_patient_in_common(tmp_path, capsys):
    main(["--what", "LIDC_demo", "--output", str(tmp_path / "splits.csv")])
    with open(tmp_path / "splits.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["split", "id", "patient"]
    patients = {}
    for part in ("train", "val", "test"):
        images = data.load(experiment("LIDC_demo").metadata, part)
        assert [name for split, name, _ in rows if split == part] == images.ids
        patients[part] = {patient for split, _, patient in rows if split == part}
        assert patients[part] == {str(patient) for patient in images.patients}
    assert not patients["train"] & patients["test"] and not patients["val"] & patients["test"]
    assert f"{tmp_path / 'splits.csv'}: 469 train, 107 val, 144 test images" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--what", "LIDC", "--data_path", "none"], "LIDC: data_path .*none' does not exist"),
    (["--what", "LIDC_demo", "--split_seed", "-1"], "--split_seed -1: expected a number in")])
def test_what_cannot_be_exported_is_named(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main([*flags, "--output", str(tmp_path / "a.csv")])


def test_only_the_same_lists_are_written_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--what", "LIDC_demo", "--output=~/a.csv"]
    for _ in range(2):
        main(flags)
    before = (tmp_path / "a.csv").read_bytes()
    with pytest.raises(SystemExit, match="^error: --output .*a.csv: exists and does not hold these lists"):
        main([*flags, "--split_seed", "7"])
    assert (tmp_path / "a.csv").read_bytes() == before
