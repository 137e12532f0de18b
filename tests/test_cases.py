"""Which files are an image and its masks, in every form that people have; and what is refused."""

import unicodedata

import nibabel
import numpy as np
import pytest
from PIL import Image

from data import cases, patients
from data.cases import Case, find

SIDE = 8


def write(folder, *names, values=0):
    """Files of SIDE x SIDE pixels."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".nii.gz"):
            nibabel.save(nibabel.Nifti1Image(np.full((SIDE, SIDE, 3), values, np.uint8), np.eye(4)), path)
        elif name.endswith(".npy"):
            np.save(path, np.full((SIDE, SIDE), values))
        else:
            Image.fromarray(np.full((SIDE, SIDE), values, np.uint8)).save(path)
    return folder


def brief(folder, all_cases):
    """name -> patient, image, masks, as relative paths."""
    return {case.name: (case.patient, *(path.relative_to(folder).as_posix()
                                        for path in (case.image, *case.masks))) for case in all_cases}


FORMS = {  # files, patterns, and of each case the name, the patient, the image and the masks
    "QUBIQ": (["c1/image.nii.gz", "c1/task01_seg02.nii.gz", "c1/task01_seg10.nii.gz", "c2/image.nii.gz",
               "c2/task01_seg01.nii.gz"], {}, {
        "c1": ("c1", "c1/image.nii.gz", "c1/task01_seg02.nii.gz", "c1/task01_seg10.nii.gz"),
        "c2": ("c2", "c2/image.nii.gz", "c2/task01_seg01.nii.gz")}),
    "REFUGE": (["g01/g01.jpg", "g01/g01_seg_cup_1.png", "g01/g01_seg_cup_2.png", "g01/g01_seg_disc_1.png"],
               {"masks": "*cup*"},
               {"g01": ("g01", "g01/g01.jpg", "g01/g01_seg_cup_1.png", "g01/g01_seg_cup_2.png")}),
    "CIMD": (["s/0/image_0.jpg", "s/0/label0_.jpg", "s/0/label1_.jpg"], {},
             {"s/0": ("0", "s/0/image_0.jpg", "s/0/label0_.jpg", "s/0/label1_.jpg")}),
    "HPU": (["images/p1/z-1.0_c0.png", "images/p1/z-10.0_c0.png", "images/p2/z-1.0_c0.png",
             "gt/p1/z-1.0_l0.png", "gt/p1/z-10.0_l0.png", "gt/p1/z-1.0_l1.png", "gt/p2/z-1.0_l0.png"], {}, {
        "images/p1/z-1.0_c0": ("p1", "images/p1/z-1.0_c0.png", "gt/p1/z-1.0_l0.png", "gt/p1/z-1.0_l1.png"),
        "images/p1/z-10.0_c0": ("p1", "images/p1/z-10.0_c0.png", "gt/p1/z-10.0_l0.png"),
        "images/p2": ("p2", "images/p2/z-1.0_c0.png", "gt/p2/z-1.0_l0.png")}),
    "HPU, crops numbered in both": (
        ["images/p/z_c0.png", "images/p/z_c1.png", "gt/p/z_c0_l0.png", "gt/p/z_c1_l0.png"], {}, {
            "images/p/z_c0": ("z_c0", "images/p/z_c0.png", "gt/p/z_c0_l0.png"),
            "images/p/z_c1": ("z_c1", "images/p/z_c1.png", "gt/p/z_c1_l0.png")}),
    "all in one folder": (["a1_scan.png", "a1_m1.png", "a10_scan.png", "a10_m1.png"], {"image": "*_scan.*"}, {
        "a1_scan": ("a1_scan", "a1_scan.png", "a1_m1.png"),
        "a10_scan": ("a10_scan", "a10_scan.png", "a10_m1.png")}),
    "masks in a folder below": (["c/image.png", "c/masks/1.png", "c/masks/2.png"], {},
                                {"c": ("c", "c/image.png", "c/masks/1.png", "c/masks/2.png")}),
    "split": (["Training/1/image.png", "Training/1/m1.png", "validation/2/image.png", "validation/2/m1.png",
               "test/3/image.png", "test/3/m1.png"], {}, {
        "test/3": ("test/3", "test/3/image.png", "test/3/m1.png"),
        "train/1": ("train/1", "Training/1/image.png", "Training/1/m1.png"),
        "val/2": ("val/2", "validation/2/image.png", "validation/2/m1.png")}),
    "split below, without test": (
        ["task/Training/1/image.png", "task/Training/1/m1.png", "task/Validation/2/image.png",
         "task/Validation/2/m1.png"], {}, {
            "test/task/2": ("val/2", "task/Validation/2/image.png", "task/Validation/2/m1.png"),
            "train/task/1": ("train/1", "task/Training/1/image.png", "task/Training/1/m1.png")}),
    "images and masks of a patient": (
        ["P0/images/z1.png", "P0/images/z2.png", "P0/gt/z1_1.png", "P0/gt/z2_1.png",
         "P1/images/z1.png", "P1/gt/z1_1.png"], {}, {
            "P0/images/z1": ("P0", "P0/images/z1.png", "P0/gt/z1_1.png"),
            "P0/images/z2": ("P0", "P0/images/z2.png", "P0/gt/z2_1.png"),
            "P1/images": ("P1", "P1/images/z1.png", "P1/gt/z1_1.png")}),
    "a path": (["1/ct.png", "1/a/ct.png", "1/b/ct.png"], {"image": "?/ct.png", "masks": "*/[ab]/*"},
               {"1": ("1", "1/ct.png", "1/a/ct.png", "1/b/ct.png")}),
    "names that contain one another": (
        ["images/1.2.3.png", "images/1.2.3.4.png", "gt/1.2.3_1.png", "gt/1.2.3_4.png", "gt/1.2.3.4_1.png"],
        {"image": "images/*"}, {
            "images/1.2.3": ("1.2.3", "images/1.2.3.png", "gt/1.2.3_1.png", "gt/1.2.3_4.png"),
            "images/1.2.3.4": ("1.2.3.4", "images/1.2.3.4.png", "gt/1.2.3.4_1.png")}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_recognised(tmp_path, form):
    files, patterns, expected = FORMS[form]
    (write(tmp_path, *files) / "readme.txt").write_text("text")
    all_cases = find(tmp_path, **patterns)
    assert brief(tmp_path, all_cases) == expected and [case.name for case in all_cases] == list(expected)


PATIENTS = {  # folders -> the patient of the image in each
    "sets": ({"training_set/U1": "U1", "validation_set/V1": "V1", "testing_set/T1": "T1"}, "image"),
    "data, and a task": ({"training_data/brain/Training/c1": "c1", "training_data/brain/Training/c2": "c2",
                          "validation_data/brain/Validation/c9": "c9"}, "image"),
    "tasks": ({"brain/Training/case1": "brain/case1", "brain/Validation/case3": "brain/case3",
               "kidney/Training/case1": "kidney/case1"}, "image"),
    "numbers in each fold": ({"training/0": "train/0", "testing/0": "test/0"}, "image"),
    "called image": ({"image_001": "image_001", "image_002": "image_002"}, "image"),
    "images of a patient, in a fold": ({"train/images/P1": "P1", "test/images/P2": "P2"}, "a"),
    "images under another name": ({"train/scans/P1": "P1", "train/scans/P2": "P2"}, "a"),
    "two images of each": ({"image_001": "image_001", "image_002/a": "image_002",
                            "image_002/b": "image_002"}, "image"),
    "several scans of a patient": ({"A/c1": "A", "A/c2": "A", "B/c1": "B"}, "image"),
}


@pytest.mark.parametrize("form", PATIENTS)
def test_whose_image_it_is(tmp_path, form):
    folders, name = PATIENTS[form]
    write(tmp_path, *[f"{folder}/{name}.png" for folder in folders],
          *[f"{folder}/m1.png" for folder in folders])
    patterns = {"image": f"{name}*"} if name != "image" else {}
    all_cases = find(tmp_path, **patterns)
    assert {case.image.parent.relative_to(tmp_path).as_posix(): case.patient for case in all_cases} == folders


@pytest.mark.parametrize("form", ["NFC", "NFD"])  # of an accented letter, which differs between file systems
def test_images_in_a_folder_of_the_users_name_are_of_the_patient_below_it(tmp_path, form):
    write(tmp_path, *[f"train/{kind}/P{patient}/{kind[0]}1.png"
                      for kind in ("scäns", "labels") for patient in (1, 2)])
    all_cases = find(tmp_path, image=unicodedata.normalize(form, "scäns"), masks="labels")
    assert [case.patient for case in all_cases] == ["P1", "P2"]


@pytest.mark.parametrize("files, patterns, message", [
    (["a/image.png"], {}, "a/image.png: an image without masks"),
    (["a/image.png", "a/m1.png", "b/m1.png"], {}, "b/m1.png: a mask of no image"),
    (["a/scan.png", "a/m1.png"], {}, "2 image files, none of them called image.* or like its folder"),
    (["a/scan.png"], {"image": "*.tif"}, r"none of them called \*.tif; name"),
    (["images/x1.png", "images/x2.png", "gt/x_1.png"], {}, "gt/x_1.png: a mask of no image"),
    (["images/x1.png", "images/x2.png", "gt/x1_1.png", "gt/x3_1.png"], {}, "x3_1.png: a mask of no image"),
    (["g/g.png", "g/cup_1.png", "g/disc_1.png"], {}, "several kinds, cup_1.png, disc_1.png; .*--masks"),
    (["q/image.png", "q/task01_seg01.png", "q/task02_seg01.png"], {}, "masks of several kinds"),
    (["q/image.png", "q/image.tif", "q/image_1.png"], {"image": "image.*"}, "a mask of several images"),
])
def test_what_does_not_belong_together_is_named(tmp_path, files, patterns, message):
    with pytest.raises(ValueError, match=message):
        find(write(tmp_path, *files), **patterns)


def table_of(folder, text, encoding="utf-8"):
    path = folder / "p.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["F\u00e4lle", "Fa\u0308lle"])
def test_patients_of_a_table(tmp_path, encoding, name):
    """Two lines may say the same, other lines and columns do not count."""
    table = table_of(tmp_path, f"case,who,patient\r\n{name},x,M\u00fcller\r\n{name},x,M\u00fcller\r\n"
                               "b,z,p9\r\n", encoding)
    case = Case("F\u00e4lle", "folder", tmp_path, ())
    assert patients.with_patients([case], table)[0].patient == "M\u00fcller"
    assert patients.with_patients([case], table, "who")[0].patient == "x"


@pytest.mark.parametrize("text, encoding, message", [
    ("case,patient\n\u00e4,b\n", "cp1252", "not a table .'utf-8'.*; save it as CSV in UTF-8"),
    ("case,patient\na,b\n", "utf-16", "not a table .'utf-8'"),
    ("case,patient\na," + "x" * 200_000, "utf-8", "not a table .field larger"),
    ("", "utf-8", "columns ; expected the case"),
    ("case,who\na,b\n", "utf-8", "columns case, who; .* another 'patient', once, see --column"),
    ("case,patient,patient\na,b,c\n", "utf-8", "expected the case in the first and another 'patient', once"),
    ("case,patient\na,b\na,c\n", "utf-8", "case a is of patient b in a line and of c in another"),
    ("case,patient\na,\n", "utf-8", "no patient of 1 of 1 cases, such as a"),
])
def test_a_table_that_does_not_name_the_patient_is_refused(tmp_path, text, encoding, message):
    with pytest.raises(ValueError, match=f"--patients .*p.csv: .*{message}"):
        patients.with_patients([Case("a", "", tmp_path, ())], table_of(tmp_path, text, encoding))


def test_names_in_two_unicode_forms_are_one(tmp_path):
    composed, decomposed = "F\u00e4lle", "Fa\u0308lle"
    write(tmp_path / "a", f"images/{composed}.png", f"gt/{decomposed}_1.png", f"gt/{composed}_2.png",
          "images/other.png", "gt/other_1.png")
    case = find(tmp_path / "a", image="images/*")[0]
    assert (case.name, case.patient, len(case.masks)) == (f"images/{composed}", composed, 2)
    write(tmp_path / "b", f"{decomposed}/{composed}.png", f"{decomposed}/{decomposed}_seg1.png")
    assert [(case.name, case.patient) for case in find(tmp_path / "b")] == [(composed, composed)]
    write(tmp_path / "c", *[f"{name}/{file}.png" for name in (composed, decomposed)
                            for file in ("image", "m1")])
    with pytest.raises(ValueError, match="m1.png: a mask of several images"):
        find(tmp_path / "c")


def test_a_patient_in_two_folds_is_refused(tmp_path):
    all_cases = [Case("train/a", "p1", tmp_path / "a.png", ()), Case("test/b", "p1", tmp_path / "b.png", ())]
    with pytest.raises(ValueError, match="b.png: patient p1 is in test and in train"):
        patients.refuse_divided(all_cases)
    patients.refuse_divided([all_cases[0], Case("test/b", "p2", tmp_path / "b.png", ())])


def case_of(folder, **files):
    """A case of arrays (x, y, z), or of pairs of one and an affine, as NIfTI."""
    for name, value in files.items():
        values, affine = value if isinstance(value, tuple) else (value, np.eye(4))
        nibabel.save(nibabel.Nifti1Image(values, affine), folder / f"{name}.nii.gz")
    return find(folder)[0]


def test_masks_are_brought_to_the_image_s_orientation(tmp_path):
    random = np.random.RandomState(0)
    volume, mask = random.rand(4, 5, 3), (random.rand(4, 5, 3) > 0.5).astype(np.uint8)
    flipped = np.diag([-1.0, 1, 1, 1])
    flipped[0, 3] = 3  # the same place, first axis read backwards
    case = case_of(tmp_path, image=volume, m1=mask, m2=(mask[::-1], flipped))
    image, (same, other), labels = cases.read(case)
    np.testing.assert_array_equal(same, other)
    np.testing.assert_array_equal(image[..., 0], volume[::-1, ::-1].swapaxes(0, 2))
    np.testing.assert_array_equal(same, mask[::-1, ::-1].swapaxes(0, 2) == 1)  # as of DICOM
    assert image.shape == (3, 5, 4, 1) and labels == {1}


@pytest.mark.parametrize("change, message", [
    ({"m2": (np.zeros((4, 5, 3), np.uint8), np.diag([2.0, 1, 1, 1]))}, "m2.nii.gz: its affine, once turned"),
    ({"m2": (np.zeros((4, 5, 3), np.uint8), np.diag([-1.0, 1, 1, 1]))}, "m2.nii.gz: its affine, once turned"),
    ({"m2": np.zeros((4, 5, 2), np.uint8)}, r"m2.nii.gz: a mask of \(2, 5, 4\), expected \(3, 5, 4\)"),
    ({"image": np.zeros((5, 4, 3))}, r"image.nii.gz: an image of \(3, 4, 5\) with masks of \(3, 5, 4\)"),
    ({"m2": np.full((4, 5, 3), 0.5)}, "m2.nii.gz: a mask with values such as 0.5"),
    ({"m2": np.full((4, 5, 3), np.nan)}, "m2.nii.gz: 60 values are NaN"),
    ({"image": np.full((4, 5, 3), np.nan)}, "image.nii.gz: 60 values are NaN"),
    ({"m1": np.zeros((4, 5, 3, 2), np.uint8), "m2": np.zeros((4, 5, 3, 2), np.uint8)},
     "a mask of .* and 2 or 3 dimensions|with masks of"),
])
def test_files_that_do_not_fit_each_other_are_named(tmp_path, change, message):
    files = {"image": np.zeros((4, 5, 3)), "m1": np.zeros((4, 5, 3), np.uint8),
             "m2": np.zeros((4, 5, 3), np.uint8)} | change
    with pytest.raises(ValueError, match=message):
        cases.read(case_of(tmp_path, **files))


def test_labels_choose_and_slices_are_cut_across_an_axis(tmp_path):
    labels = np.arange(60).reshape(4, 5, 3).astype(np.uint8) % 4
    case = case_of(tmp_path, image=np.random.RandomState(0).rand(4, 5, 3), m1=labels)
    assert cases.read(case)[2] == {1, 2, 3}
    image, masks, chosen = cases.read(case, (2, 3))
    assert chosen == {2, 3} and masks.mean() == 0.5
    for axis, shapes in (("fewest", (3, 5, 4)), ("z", (3, 5, 4)), ("y", (5, 3, 4)), ("x", (4, 3, 5))):
        slices = list(cases.slices(image, masks, axis))
        assert (len(slices), *slices[0][1].shape[1:]) == shapes == (len(slices), *slices[0][0].shape[:2])
    ((whole, its_masks),) = cases.slices(image[0], masks[:, 0], "x")
    assert whole.shape == (5, 4, 1) and its_masks.shape == (1, 5, 4)


def test_a_slice_is_scaled_by_the_limits_of_its_volume():
    volume, masks = np.arange(24).reshape(2, 3, 4, 1).astype(np.int16), np.zeros((1, 2, 3, 4), bool)
    for axis, number in (("z", 0), ("y", 1), ("x", 2)):
        images = [image for image, _ in cases.slices(volume, masks, axis)]
        np.testing.assert_allclose(np.stack(images, number), volume / 23)
    np.testing.assert_allclose([image.max() for image, _ in cases.slices(volume, masks, "z", (0, 46))],
                               [11 / 46, 0.5])


@pytest.mark.parametrize("shapes, axis, chosen, warning", [
    ({"a": (12, 24, 24), "b": (40, 24, 24)}, "fewest", "z", "1 have fewer"),
    ({"a": (12, 24, 24), "b": (30, 9, 24), "c": (30, 24, 9), "d": (30, 9, 25)}, "fewest", "y",
     "2 have fewer across another, such as a (12, 24, 24)"),
    ({"a": (12, 24, 24), "b": (13, 24, 24)}, "fewest", "z", ""),
    ({"a": (24, 24)}, "fewest", "fewest", ""), ({"a": (12, 24, 24), "b": (40, 24, 24)}, "z", "z", ""),
])
def test_all_volumes_are_cut_across_one_axis(capsys, shapes, axis, chosen, warning):
    assert cases.common_axis(shapes, axis) == chosen
    said = capsys.readouterr().out
    assert warning in said and bool(said) == bool(warning)


def test_files_in_a_form_that_is_not_read_are_named(tmp_path, capsys):
    write(tmp_path, "c/image.png", "c/seg1.png", "c/seg2.png")
    for name in ("c/seg1.json", "c/notes.txt"):  # descriptions
        (tmp_path / name).write_text("text")
    find(tmp_path)
    assert capsys.readouterr().out == ""
    (tmp_path / "c" / "seg3.nrrd").write_text("text")
    assert len(find(tmp_path)[0].masks) == 2
    assert "1 files are passed over, in a form that is not read, such as" in capsys.readouterr().out
