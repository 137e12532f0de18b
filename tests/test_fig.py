"""Pictures show what was given, where it was given. No pixel of a figure is compared exactly."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import fig
from fig import canvas, method, pictures, results
from metrics import bootstrap_interval

H, W = 24, 32


def disc(row, column, radius):
    return (np.hypot(*(np.mgrid[:H, :W] - np.reshape([row, column], (2, 1, 1)))) <= radius).astype(float)


def batch(m=2, k=4, n=16, c=1):
    """Images (m, c, h, w), masks (m, k, h, w) of which the first is empty, samples (m, n, h, w)."""
    masks = np.stack([np.zeros((H, W)), *[disc(12, 14, radius) for radius in range(3, 2 + k)]])
    samples = np.stack([disc(12, 14, 2 + 4 * i / n) for i in range(n)])
    return np.full((m, c, H, W), 0.3), np.stack([masks] * m), np.stack([samples] * m)


def vertices(ax):
    return [np.concatenate([path.vertices for path in drawn.get_paths()]) for drawn in ax.collections]


def shown(ax):
    return np.asarray(ax.images[0].get_array())


def test_a_contour_runs_along_the_border_of_its_mask_in_its_experts_colour():
    edge = np.zeros((H, W))
    edge[4:10, 20:32] = 1  # touches the right edge, whose border is at x = 31.5
    ax = Figure().add_subplot()
    canvas.draw_contours(ax, np.stack([np.zeros((H, W)), edge, edge]))  # an empty mask draws nothing
    points, _ = vertices(ax)
    assert (points.min(0).tolist(), points.max(0).tolist()) == ([19.5, 3.5], [31.5, 9.5])
    colours = [to_hex(drawn.get_edgecolor()[0]).upper() for drawn in ax.collections]
    assert colours == [canvas.COLOURS[1], canvas.COLOURS[2]]
    below, above = (drawn.get_linewidth()[0] for drawn in ax.collections)
    assert below > above > 0  # a border that both experts drew shows both colours


def test_zoom_holds_all_marks_in_the_images_proportions_and_frames_them():
    whole, part = Figure().subplots(1, 2)
    whole.imshow(np.zeros((H, W)))
    canvas.zoom([part], disc(2, 30, 3)[None], framed=whole)
    (left, right), (bottom, top) = part.get_xlim(), part.get_ylim()
    assert left <= 26.5 and right == W - 0.5 and top == -0.5 and 5.5 <= bottom
    assert (right - left) / (bottom - top) == pytest.approx(W / H) and right - left < W / 2
    assert [(box.get_x(), box.get_x() + box.get_width()) for box in whole.patches] == [(left, right)]
    for everything in (np.zeros((1, H, W)), np.ones((1, H, W))):
        canvas.zoom([part], everything, framed=whole)
        assert (*part.get_xlim(), *part.get_ylim()) == (-0.5, W - 0.5, H - 0.5, -0.5)


def test_prediction_grid_shows_what_its_columns_say():
    images, masks, drawn = batch(k=3, c=3)
    figure = fig.prediction_grid(torch.tensor(images), torch.tensor(masks), torch.tensor(drawn).bool())
    panels = {ax.get_title(): ax for ax in figure.axes[:10]}
    assert list(panels) == ["image", "experts", "expert 1", "expert 2", "expert 3", "sample 1", "sample 2",
                            "sample 3", "sample 4", "variance"]
    assert len(vertices(panels["experts"])) == 2  # an expert's mask is empty
    np.testing.assert_array_equal(shown(panels["expert 3"]), masks[0, 2])
    for i in range(4):  # the first ones, not chosen
        np.testing.assert_array_equal(shown(panels[f"sample {i + 1}"]), drawn[0, i])
    np.testing.assert_allclose(shown(panels["variance"]), drawn[0].var(axis=0), atol=1e-6)


class Dataset(list):
    def __getitem__(self, index):  # image i has the brightness i / 10; image 3 has fewer masks
        images, masks, _ = batch(m=1)
        return torch.tensor(images[0] * 0 + index / 10), torch.tensor(masks[0])[:2 if index == 3 else 4]


def sample(images, n, generator=None):
    column = int(torch.randint(8, 24, (1,), generator=generator))
    return torch.tensor(np.full((len(images), n, H, W), 0.9 * disc(12, column, 5)))


def test_a_systems_pictures_are_of_the_first_images_or_of_four_evenly_spaced(tmp_path, monkeypatch):
    array = fig.validation_picture(sample, Dataset(range(10)))
    assert array.dtype == np.uint8 and array.shape[1:] == (600, 3) and 150 < array.shape[0] < 300
    assert (np.abs(array.astype(int) - [0xE6, 0x9F, 0x00]).sum(axis=2) < 30).any()  # the first expert's
    given = []
    monkeypatch.setattr(pictures, "prediction_grid", lambda *arrays: given.append(arrays) or Figure())
    drawn = fig.draw_samples(sample, Dataset(range(10)), tmp_path / "new", "atfm, 10 steps", seed=3)
    ((images, masks, samples),) = given
    assert torch.equal(drawn, samples)
    assert masks.shape[:2] == (4, 2)  # the experts that all four have
    assert images[:, 0, 0, 0].tolist() == pytest.approx([0, 0.3, 0.6, 0.9])
    assert torch.equal(samples, sample(images, 16, torch.Generator().manual_seed(3)) >= 0.5)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["atfm_10_steps.png"]


def test_systems_are_compared_on_the_same_four_images(tmp_path):
    masks = torch.rand(4, 16, H, W) > 0.5
    fig.draw_comparison({"atfm": masks, "ssn": ~masks}, Dataset(range(10)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.png"]
    images, experts, _ = batch(m=4)
    figure = fig.comparison(images, experts, {"atfm": masks, "ssn": ~masks})
    k = experts.shape[1]
    axes = np.array(figure.axes).reshape(6, 2, k + 1)  # images 1 and 2 above, 3 and 4 below
    assert [ax.get_ylabel() for ax in axes[:, 0, 0]] == ["experts", "atfm", "ssn"] * 2
    assert [ax.get_title() for ax in axes[3, 1]] == ["image 4", *[f"expert {j}" for j in range(1, k + 1)]]
    assert [ax.get_title() for ax in axes[4, 1]] == ["contours", *[f"sample {j}" for j in range(1, k + 1)]]
    drawn = [[shown(ax) for ax in row[1:]] for row in axes[3:, 0]]
    np.testing.assert_array_equal(drawn, [experts[2], masks[2, :k], ~masks[2, :k]])


@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (3, 3, 16), (4, 40, 2)])
def test_no_panel_of_a_comparison_is_empty_or_without_a_title(m, k, n):
    images, experts, samples = batch(m, max(k, 2), n)
    figure = fig.comparison(images, experts[:, :k], {"atfm, midpoint, 25 steps": samples, "act-gtr": samples})
    assert len(figure.axes) == m * (1 + min(k, 4) + 2 * (1 + min(n, 4, max(k, 3))))
    for ax in figure.axes:
        assert len(ax.images) == 1 and ax.get_title()
    figure.draw_without_rendering()
    lefts = [ax.yaxis.label.get_window_extent().x0 for ax in figure.axes if ax.get_ylabel()]
    assert len(lefts) == 3 * -(-m // 2) and min(lefts) >= 0  # no name is cut off
    assert [text.get_text() for text in figure.texts if text.get_text()] == (
        ["first 4 of 40 experts"] if k == 40 else [])


@pytest.mark.parametrize("label, stem", [
    ("atfm", "atfm"), ("atfm (best), 10 steps", "atfm_best_10_steps"), ("../cfm", ".._cfm")])
def test_a_systems_label_becomes_the_name_of_a_file(label, stem):
    assert pictures.file_stem(label) == stem


def many_experts(picture):
    """A picture of an image with 40 experts."""
    images, masks, samples = batch(m=2, k=40)
    return {
        "grid": lambda: fig.prediction_grid(images, masks, samples),
        "validation": lambda: fig.prediction_grid(images, masks, samples, small=True),
        "cases": lambda: fig.case_sheet([(torch.tensor(images[0]), torch.tensor(masks[0]))] * 2),
        "overview": lambda: fig.overview(**story() | {"masks": masks[0]})}[picture]()


@pytest.mark.parametrize("picture, count", [("grid", 8), ("validation", 4), ("cases", 8), ("overview", 8)])
def test_of_40_experts_a_picture_shows_the_first_and_says_so(picture, count):
    figure = many_experts(picture)
    figure.draw_without_rendering()
    box, width = figure.bbox, figure.bbox.width
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert f"first {count} of 40 experts" in texts and f"expert {count + 1}" not in texts
    assert max(len(ax.collections) for ax in figure.axes) <= count  # contours
    for text in filter(Text.get_text, figure.findobj(Text)):
        place = text.get_window_extent()
        assert 0 <= place.x0 < place.x1 <= width and 0 <= place.y0 < place.y1 <= box.height, text
    assert min(ax.get_position().width for ax in figure.axes if ax.images) * width > 40  # pixels


def test_write_samples_enlarges_masks_mean_and_variance(tmp_path):
    masks = torch.tensor([[[0, 1], [1, 1]], [[0, 0], [1, 1]], [[0, 0], [0, 1]], [[0, 0], [1, 1]]]).bool()
    fig.write_samples(tmp_path, torch.full((3, 4, 6), 0.5), masks)
    files = {f"sample_0{i}.png": 255 * mask for i, mask in enumerate(masks.int())} | {
        # means 0, 1/4, 3/4, 1; variances 0, 3/16, 3/16, 0, of which 1/4 is 255
        "mean.png": [[0, 64], [191, 255]], "variance.png": [[0, 191], [191, 0]]}
    assert {path.name for path in tmp_path.iterdir()} == {*files, "picture.png"}
    for name, values in files.items():  # a pixel of the model's is 2 x 3 of the image's
        with Image.open(tmp_path / name) as file:
            np.testing.assert_array_equal(np.asarray(file), np.kron(values, np.ones((2, 3), int)))


def story():
    image, masks, samples = (array[0] for array in batch(n=4))
    gtr_samples = np.linspace(0.2, 0.8, 4)[:, None, None] * samples[::-1]
    times = np.array([0, 0.25, 0.5, 0.75, 1])
    states = (1 - times)[:, None, None] * gtr_samples[0] + times[:, None, None] * samples[0]
    return dict(image=image, masks=masks, mean=8 * samples.mean(0) - 4, factor=samples,
                gtr_samples=gtr_samples, states=states, times=times, samples=samples)


def test_overview_leads_from_image_to_masks():
    axes, given = fig.overview(**story()).axes, story()
    assert [ax.get_xlabel() for ax in axes[9:12]] == ["$t = 0$", "$t = 0.25$", "$t = 0.5$"]
    np.testing.assert_allclose([shown(ax) for ax in axes[9:14]], given["states"], atol=1e-6)
    np.testing.assert_allclose(shown(axes[17]), given["samples"].var(0), atol=1e-6)


@pytest.mark.parametrize("change, message", [
    ({"masks": np.zeros((2, 4, H, W))}, r"masks: shape \(2, 4, 24, 32\), expected \(k, 24, 32\)"),
    ({"samples": np.zeros((0, H, W))}, "samples: shape .* no side of 0"),
    ({"samples": np.full((3, H, W), -4.0)}, r"samples: values from -4 to -4, expected \[0, 1\]"),
    ({"mean": np.full((H, W), np.nan)}, "mean: values that are not finite"),
    ({"factor": story()["factor"][:2]}, "factor: 2, expected at least 3"),
    ({"times": story()["times"][:4]}, r"states: shape \(5, 24, 32\), expected \(4, 24, 32\)"),
])
def test_arrays_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        fig.overview(**story() | change)


def test_leading_directions_keep_the_covariance_longest_first():
    factor = np.random.default_rng(0).normal(size=(3, H, W))
    columns, directions = factor.reshape(3, -1), method.leading_directions(factor, 3).reshape(3, -1)
    np.testing.assert_allclose(directions.T @ directions, columns.T @ columns, atol=1e-9)
    assert (np.diff(np.linalg.norm(directions, axis=1)) < 0).all()


def report(copies=6, **systems):
    """Of systems (NFE, alpha, what scores are lower by): two seeds, `copies` of two patients' four images."""
    values, spread = {"GED2": 0.5, "GED4": 0.4, "HM-IoU4": 0.7}, np.array([[-0.1, 0.1, 0, 0] * copies] * 2)
    values |= {"Distance": 0.5, "Diversity4": 0.4, "Experts' diversity": 0.2, "Size": 9.0, "Empty": 0.5,
               "Experts empty": 0.5}
    return {"groups": [f"{patient}{i}" for i in range(copies) for patient in "abab"],
            "metadata": {"what": "LIDC_demo"}, "sampling": {"samples": [2, 4]},
            "systems": {label.replace("__", ", ").replace("_", " "): {
                "nfe": cost, "alpha": alpha,
                "scores": {name: (value - less + spread).tolist() for name, value in values.items()},
            } for label, (cost, alpha, less) in systems.items()}}


NFES = {"act_gtr": (0, None, 0), "atfm__25_steps": (25, None, 0.2), "atfm__1_steps": (1, None, 0)}
STEPS, FEW = report(**NFES), report(copies=4, **NFES)  # of 12 patients and of 8
ALPHAS = report(act_gtr=(0, None, 0), atfm__alpha_1=(25, 1e-3, 0), atfm__alpha_0=(25, 0.0, 0.1))
NOTE = "No intervals and no parts by size: 8 test patients, and such numbers need 10."


def test_curves_join_the_rows_of_a_test_that_differ_in_cost_or_alpha():
    (ged, hm_iou), (swept, _) = results.tradeoff(STEPS).axes, results.sweep(ALPHAS).axes
    lines, evenly, higher = (
        {drawn.get_label(): drawn[0].get_xydata().T.round(6).tolist() for drawn in ax.containers}
        for ax in (ged, swept, hm_iou))
    assert ged.get_ylabel() == "GED4 (lower is better)\n95 % interval over patients"
    assert lines == {"act gtr": [[0], [0.4]], "atfm": [[1, 25], [0.4, 0.2]]}
    assert evenly == {"atfm": [[0, 1], [0.3, 0.4]]} and higher["atfm"] == [[1, 25], [0.7, 0.5]]
    scores = np.array(STEPS["systems"]["atfm, 25 steps"]["scores"]["GED4"])
    _, low, high = bootstrap_interval(scores, STEPS["groups"], results.RESAMPLES)
    _, _, (bars,) = ged.containers[1]
    np.testing.assert_allclose(bars.get_segments()[1][:, 1], [low, high])
    assert [text.get_text() for text in swept.get_xticklabels()] == ["0", "0.001"]
    assert [line.get_xdata()[0] for line in swept.lines if line.get_label() == "paper's default"] == [1]


def test_few_patients_have_no_intervals_and_no_thirds_and_a_line_says_so():
    curves, parts = results.tradeoff(FEW), results.parts(FEW)
    for ax in curves.axes:
        assert "interval" not in ax.get_ylabel() and not any(drawn[2] for drawn in ax.containers)
    _, distance, diversity = parts.axes
    assert [line.get_ydata().round(6).tolist() for line in distance.lines] == [[0.5], [0.3], [0.5]]
    assert [text.get_text() for text in diversity.get_xticklabels()] == ["all\nsizes"]
    assert [figure.legends[0].get_title().get_text() for figure in (curves, parts)] == [NOTE, NOTE]
    assert results.parts(STEPS).legends[0].get_title().get_text() == ""


def test_a_test_leaves_the_curves_that_its_rows_give_rise_to(tmp_path):
    assert fig.results_curves(STEPS, tmp_path) == ["parts.png", "tradeoff.png"]
    assert fig.results_curves(ALPHAS, tmp_path) == ["parts.png", "sweep.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"parts.png", "tradeoff.png", "sweep.png"}
    not_varied = report(act_gtr=(0, None, 0), atfm=(25, None, 0), sfm=(25, None, 0))
    assert fig.results_curves(not_varied, tmp_path) == ["parts.png"]


def test_the_parts_of_a_score_and_the_fractions_of_empty_masks():
    empty, distance, diversity = results.parts(STEPS).axes
    assert [ax.get_title().partition("\n")[0] for ax in (empty, distance, diversity)] == [
        "Empty masks", "Distance from experts", "Diversity of samples"]
    act_gtr, _, _, diagonal = empty.lines
    assert act_gtr.get_xydata().T.round(6).tolist() == [[0.4, 0.5, 0.6], [0.4, 0.5, 0.6]]
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    # By size, smallest first: six of -0.1 and two of 0; eight of 0; two of 0 and six of 0.1.
    assert distance.lines[0].get_ydata().round(6).tolist() == [0.425, 0.5, 0.575]
    assert diversity.lines[1].get_ydata().round(6).tolist() == [0.125, 0.2, 0.275]
    assert diversity.lines[-1].get_ydata().round(6).tolist() == [0.125, 0.2, 0.275]


def test_the_backend_of_a_notebook_does_not_stop_whoever_imports_matplotlib_after_fig():
    subprocess.run([sys.executable, "-c", "import fig; import matplotlib"], cwd=Path(__file__).parents[1],
                   env=os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, check=True)
