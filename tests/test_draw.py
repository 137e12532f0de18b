"""Pictures show what was given, where it was given, and are written whole. No pixel is compared exactly."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import fig
from fig import canvas, method, pictures

H, W = 24, 32


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def disc(row: float, column: float, radius: float) -> np.ndarray:
    """A mask (h, w) of a disc."""
    rows, columns = np.mgrid[:H, :W]
    return ((rows - row) ** 2 + (columns - column) ** 2 <= radius**2).astype(float)


def experts(k: int = 4) -> np.ndarray:
    """Masks (k, h, w): one of an expert who marked nothing, then growing discs."""
    return np.stack([np.zeros((H, W)), *[disc(12, 14, radius) for radius in range(3, 2 + k)]])


def batch(m: int = 2, k: int = 4, n: int = 16, c: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (m, c, h, w), masks (m, k, h, w), samples (m, n, h, w)."""
    samples = np.stack([disc(12, 14, 2 + 4 * i / n) for i in range(n)])
    return np.full((m, c, H, W), 0.3), np.stack([experts(k)] * m), np.stack([samples] * m)


def contours(ax) -> list[np.ndarray]:
    """The vertices (points, 2) as x, y of each contour on a panel."""
    return [np.concatenate([path.vertices for path in drawn.get_paths()])
            for drawn in ax.collections if isinstance(drawn, ContourSet)]


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def shown(ax) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


def panel(figure: Figure, title: str):
    """The panel of that title in the first row."""
    return next(ax for ax in figure.axes if ax.get_title() == title)


def test_a_contour_runs_along_the_border_of_its_mask():
    mask = np.zeros((H, W))
    mask[4:10, 20:32] = 1  # touches the right edge, whose border is at x = 31.5
    ax = Figure().add_subplot()
    canvas.draw_contours(ax, mask[None])
    (points,) = contours(ax)
    assert (points[:, 0].min(), points[:, 0].max()) == (19.5, 31.5)
    assert (points[:, 1].min(), points[:, 1].max()) == (3.5, 9.5)
    np.testing.assert_array_equal(points[0], points[-1])  # closed
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, 31.5), (23.5, -0.5))


def test_an_empty_mask_draws_nothing_and_leaves_the_others_their_colours():
    ax = Figure().add_subplot()
    canvas.draw_contours(ax, np.stack([np.zeros((H, W)), disc(9, 9, 4), np.ones((H, W))]))
    colours = [to_hex(drawn.get_edgecolor()[0]).upper() for drawn in ax.collections]
    assert colours == [canvas.COLOURS[1], canvas.COLOURS[2]]


def test_borders_on_which_experts_agree_show_all_of_them():
    ax = Figure().add_subplot()
    canvas.draw_contours(ax, np.stack([disc(9, 9, 4)] * 3))
    widths = [drawn.get_linewidth()[0] for drawn in ax.collections]
    assert widths[0] > widths[1] > widths[2] > 0


@pytest.mark.parametrize(("n", "count", "expected"), [
    (16, 3, [0, 8, 15]), (9, 4, [0, 3, 5, 8]), (2, 5, [0, 1]), (7, 1, [0])])
def test_evenly_spaced(n, count, expected):
    assert canvas.evenly_spaced(n, count).tolist() == expected


def test_window_holds_all_marks_in_the_image_s_proportions():
    corner = disc(2, 30, 3)
    left, right, top, bottom = canvas.window(corner[None])
    rows, columns = np.nonzero(corner)
    assert left <= columns.min() - 0.5 and columns.max() + 0.5 <= right <= W - 0.5
    assert -0.5 <= top <= rows.min() - 0.5 and rows.max() + 0.5 <= bottom
    assert (right - left) / (bottom - top) == pytest.approx(W / H)
    assert right - left < W / 2
    assert canvas.window(np.zeros((1, H, W))) == (-0.5, W - 0.5, -0.5, H - 0.5)
    assert canvas.window(np.ones((1, H, W))) == (-0.5, W - 0.5, -0.5, H - 0.5)


@pytest.mark.parametrize("c", [1, 3])
def test_samples_picture_needs_no_experts(c):
    images, _, drawn = batch(c=c)
    figure = fig.samples_picture(images[0], drawn[0], contours=5)
    assert titles(figure) == ["image", "5 of 16 samples", "mean", "variance"]
    assert len(contours(panel(figure, "5 of 16 samples"))) == 5
    np.testing.assert_allclose(shown(panel(figure, "mean")), drawn[0].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(shown(panel(figure, "variance")), drawn[0].var(axis=0), atol=1e-6)
    zoomed = panel(figure, "mean").get_xlim()
    assert zoomed[1] - zoomed[0] < W and panel(figure, "image").get_xlim() == (-0.5, W - 0.5)
    fig.figure_to_array(figure)
    fig.figure_to_array(fig.samples_picture(images[0], np.zeros((3, H, W))))  # nothing was found


@pytest.mark.parametrize(("k", "c", "numbers"), [(4, 1, (1, 9, 16)), (3, 3, (1, 6, 11, 16))])
def test_prediction_grid_shows_what_its_columns_say(k, c, numbers):
    images, masks, drawn = batch(k=k, c=c)
    figure = fig.prediction_grid(torch.tensor(images), torch.tensor(masks), torch.tensor(drawn).bool())
    names, samples = [f"expert {i + 1}" for i in range(k)], [f"sample {i}" for i in numbers]
    assert titles(figure) == ["image", "experts", *names, *samples, "variance"]
    assert len(contours(panel(figure, "experts"))) == k - 1  # one expert marked nothing
    np.testing.assert_array_equal(shown(panel(figure, "expert 3")), masks[0, 2])
    np.testing.assert_array_equal(shown(panel(figure, samples[-1])), drawn[0, 15])
    np.testing.assert_allclose(shown(panel(figure, "variance")), drawn[0].var(axis=0), atol=1e-6)
    assert fig.figure_to_array(figure).shape[1] == 1660  # twice README's width
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names


def test_prediction_grid_frames_the_part_it_zooms_to():
    images, masks, samples = batch(m=1)
    zoomed, whole = (fig.prediction_grid(images, masks, samples, zoomed=z) for z in (True, False))
    (box,) = [patch for patch in panel(zoomed, "image").patches if isinstance(patch, Rectangle)]
    assert panel(zoomed, "variance").get_xlim() == (box.get_x(), box.get_x() + box.get_width())
    assert panel(zoomed, "image").get_xlim() == panel(whole, "variance").get_xlim() == (-0.5, W - 0.5)
    assert not panel(whole, "image").patches


def test_prediction_grid_draws_the_variance_given():
    images, masks, samples = batch(m=1)
    figure = fig.prediction_grid(images, masks, samples, np.full((1, H, W), 0.2))
    np.testing.assert_allclose(shown(panel(figure, "variance")), 0.2, atol=1e-6)


@pytest.mark.parametrize(("change", "message"), [
    ({"masks": np.zeros((1, 4, H, W))}, r"masks: found shape \(1, 4, 24, 32\), expected \(2, k, 24, 32\)"),
    ({"samples": np.zeros((2, 0, H, W))}, "samples: found shape"),
    ({"samples": np.full((2, 3, H, W), -4.0)}, r"samples: found values from -4 to -4, expected \[0, 1\]"),
    ({"images": np.full((2, 1, H, W), np.nan)}, "images: found values that are not finite"),
    ({"images": np.zeros((2, 2, H, W))}, "image: found 2 channels, expected 1"),
])
def test_prediction_grid_names_what_does_not_fit(change, message):
    images, masks, samples = batch()
    with pytest.raises(ValueError, match=message):
        fig.prediction_grid(**{"images": images, "masks": masks, "samples": samples, **change})


def test_validation_picture_is_a_small_array():
    figure = fig.validation_picture(*batch())
    array = fig.figure_to_array(figure)
    assert array.dtype == np.uint8 and array.shape[1:] == (600, 3) and 50 < array.shape[0] < 300
    assert titles(figure) == ["experts", *[f"expert {i}" for i in (1, 2, 3, 4)],
                              *[f"sample {i}" for i in (1, 6, 11, 16)]]
    orange = np.abs(array.astype(int) - [0xE6, 0x9F, 0x00]).sum(axis=2) < 30
    assert orange.any()  # the frame of the first expert


def test_binary_entropy_in_bits():
    p = np.array([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(pictures.binary_entropy(p), [0, 0.8112781, 1, 0], atol=1e-6)


def test_variance_and_entropy_are_of_experts_above_and_samples_below():
    images, masks, samples = batch(m=1)
    figure = fig.variance_and_entropy(images[0], masks[0], samples[0])
    above = [panel(figure, title) for title in ("mean", "variance", "entropy (bits)")]
    below = figure.axes[5:8]  # after the first row's four panels and the contours of the second
    for row, members in ((above, masks[0]), (below, samples[0])):
        p = members.mean(axis=0)
        for ax, expected in zip(row, (p, p * (1 - p), pictures.binary_entropy(p)), strict=True):
            np.testing.assert_allclose(shown(ax), expected, atol=1e-6)
    assert len(contours(figure.axes[0])) == 3 and len(contours(figure.axes[4])) == 8


def test_augmentation_sheet_draws_each_image_with_its_own_masks():
    images, masks, _ = batch(m=3)
    figure = fig.augmentation_sheet(images, masks, images[..., ::-1], masks[..., ::-1])
    before, after = (contours(figure.axes[i])[0][:, 0] for i in (0, 3))
    np.testing.assert_allclose(sorted(after), sorted(W - 1 - before))
    with pytest.raises(ValueError, match="augmented_masks: found shape"):
        fig.augmentation_sheet(images, masks, images, masks[:, :2])


def run() -> dict[str, np.ndarray]:
    """What `overview` draws."""
    image, masks, samples = (array[0] for array in batch(n=4))
    gtr_samples = np.linspace(0.2, 0.8, 4)[:, None, None] * samples[::-1]
    times = np.array([0, 0.25, 0.5, 0.75, 1])
    states = (1 - times)[:, None, None] * gtr_samples[0] + times[:, None, None] * samples[0]
    return dict(image=image, masks=masks, mean=8 * samples.mean(0) - 4, factor=samples,
                gtr_samples=gtr_samples, states=states, times=times, samples=samples, variance=samples.var(0))


def test_overview_leads_from_image_to_masks():
    story = run()
    figure = fig.overview(**story)
    assert len(figure.axes) == 19  # two rows of nine and a colour bar
    assert [ax.get_xlabel() for ax in figure.axes[9:12]] == ["$t = 0$", "$t = 0.25$", "$t = 0.5$"]
    for i, state in enumerate(story["states"]):
        np.testing.assert_allclose(shown(figure.axes[9 + i]), state, atol=1e-6)
    np.testing.assert_allclose(shown(figure.axes[6]), shown(figure.axes[9]))  # the arrow's two ends
    assert fig.figure_to_array(figure).shape[1] == 1660


@pytest.mark.parametrize(("name", "change", "message"), [
    ("states", lambda states: states[::-1].copy(), "states: found a first state other than gtr_samples"),
    ("samples", lambda samples: samples[::-1].copy(), "samples: found a first mask other than"),
    ("factor", lambda factor: factor[:2], "factor: found 2, expected at least 3"),
    ("times", lambda times: times[:4], r"states: found shape \(5, 24, 32\), expected \(4, 24, 32\)"),
])
def test_overview_refuses_arrays_that_contradict_its_arrows(name, change, message):
    story = run()
    with pytest.raises(ValueError, match=message):
        fig.overview(**{**story, name: change(story[name])})


def test_leading_directions_keep_the_covariance_and_ignore_a_rotation_of_the_columns():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(3, H, W))
    directions = method.leading_directions(factor, 3).reshape(3, -1)
    columns = factor.reshape(3, -1)
    np.testing.assert_allclose(directions.T @ directions, columns.T @ columns, atol=1e-9)
    assert (np.diff(np.linalg.norm(directions, axis=1)) < 0).all()
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    rotated = method.leading_directions((rotation @ columns).reshape(factor.shape), 3).reshape(3, -1)
    np.testing.assert_allclose(rotated, directions, atol=1e-9)


def test_learning_curves_have_a_panel_per_series_and_a_line_per_run():
    short, long = np.arange(10), np.arange(1000)
    figure = fig.learning_curves({"a": {"loss": (long, np.sin(long) + 2), "GED_16": (short, 1 / (1 + short))},
                                  "b": {"GED_16": (short, 2 / (1 + short))}}, log_scale=["loss"])
    loss, ged = figure.axes
    assert (loss.get_title(), loss.get_yscale(), len(loss.lines)) == ("loss", "log", 2)  # points and mean
    assert (ged.get_title(), ged.get_yscale(), len(ged.lines)) == ("GED_16", "linear", 2)  # the two runs
    steps, mean = loss.lines[1].get_data()
    assert (steps[0], steps[-1]) == (19, 999)
    assert mean[0] == pytest.approx(np.mean(np.sin(long[:20])) + 2)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    fig.figure_to_array(figure)
    (ax,) = fig.learning_curves({"a": {"loss": ([5], [1.0])}}).axes
    assert ax.lines[0].get_marker() == "o"  # of one point there is no line to see
    with pytest.raises(ValueError, match="histories: found no series in 1 runs"):
        fig.learning_curves({"a": {}})


ATFM = fig.Points([1, 25], [0.5, 0.3], [0.4, 0.3], [0.6, 0.35])


def interval_ends(ax, line: int) -> list[list[float]]:
    """[low, high] of each interval of a line on a panel."""
    _, _, (bars,) = ax.containers[line]
    return [segment[:, 1].tolist() for segment in bars.get_segments()]


def test_tradeoff_has_a_place_for_no_evaluations_and_draws_intervals_as_given():
    gtr = fig.Points([0], [0.4], [0.38], [0.43])
    figure = fig.tradeoff({"GED": {"Act. GTR": gtr, "ATFM": ATFM}, "HM-IoU": {"ATFM": ATFM}})
    ged, hm_iou = figure.axes
    assert [text.get_text() for text in ged.get_xticklabels()] == ["0", "1", "25"]
    np.testing.assert_allclose(interval_ends(ged, 1), [[0.4, 0.6], [0.3, 0.35]])
    assert (ged.get_ylabel(), hm_iou.get_ylabel(), len(hm_iou.containers)) == ("GED", "HM-IoU", 1)
    fig.figure_to_array(figure)
    with pytest.raises(ValueError, match="points of 'ATFM'.*low <= score <= high"):
        fig.tradeoff({"GED": {"ATFM": fig.Points([1], [0.5], [0.6], [0.7])}})
    with pytest.raises(ValueError, match="as many of each"):
        fig.tradeoff({"GED": {"ATFM": fig.Points([1, 2], [0.5], [0.5], [0.5])}})
    with pytest.raises(ValueError, match="panels: found {}"):
        fig.tradeoff({})


def test_differences_have_a_row_per_choice_in_every_panel_and_tell_zero_apart():
    better = fig.Difference(-0.2, -0.3, -0.1, [-0.25, -0.15])
    unclear = fig.Difference(0.1, -0.1, 0.2, [0.1])
    ged, hm_iou = fig.differences({"GED": {"first": better, "other": unclear}, "HM": {"other": better}}).axes
    assert [text.get_text() for text in ged.get_yticklabels()] == ["first", "other"]
    zero, interval, runs, mean = ged.lines[:4]
    drawn = [list(line.get_xdata()) for line in (interval, runs, mean)]
    assert drawn == [[-0.3, -0.1], [-0.25, -0.15], [-0.2]]
    assert interval.get_color() != ged.lines[4].get_color()  # zero lies within the other's interval
    assert [list(ax.lines[1].get_ydata()) for ax in (ged, hm_iou)] == [[0, 0], [1, 1]]
    assert ged.get_ylim() == hm_iou.get_ylim() == (1.5, -0.5)  # the first choice at the top
    with pytest.raises(ValueError, match="panels: found {}, expected a score"):
        fig.differences({})


def test_sweep_spaces_values_evenly_and_marks_the_paper_s_default():
    method = fig.Points([0, 1e-4, 1e-3], [0.3, 0.2, 0.25], [0.29, 0.19, 0.24], [0.31, 0.21, 0.26])
    other = fig.Points([1e-3], [0.5], [0.4], [0.6])
    figure = fig.sweep({"GED": {"ATFM": method, "SFM": other}}, setting="alpha", paper=1e-3)
    (ax,) = figure.axes
    marked = [line for line in ax.lines if line.get_label() == "paper's default"]
    assert [line.get_xdata()[0] for line in marked] == [2]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.0001", "0.001"]
    assert [drawn[0].get_xdata().tolist() for drawn in ax.containers] == [[0, 1, 2], [2]]
    np.testing.assert_allclose(interval_ends(ax, 0)[0], [0.29, 0.31])
    with pytest.raises(ValueError, match="paper: found 5, expected .* values drawn, 0, 0.0001, 0.001"):
        fig.sweep({"GED": {"ATFM": method}}, setting="alpha", paper=5)


@pytest.mark.filterwarnings("ignore")
def test_read_scalars_returns_every_point_of_all_event_files(tmp_path):
    for start in (0, 5000):  # a run, and what resumed it 1000 steps before its end
        with SummaryWriter(tmp_path, filename_suffix=f".{start}") as writer:
            for step in range(start, start + 6000):  # more points than TensorBoard keeps by default, 10000
                writer.add_scalar("train/loss", step / 2 if step < 5000 or start else -1, step)
            writer.add_scalar("val/GED_16", 0.25, start)
    series = fig.read_scalars(tmp_path)
    assert sorted(series) == ["train/loss", "val/GED_16"]
    steps, values = series["train/loss"]
    np.testing.assert_array_equal(steps, np.arange(11000))
    np.testing.assert_allclose(values, np.arange(11000) / 2)
    with pytest.raises(FileNotFoundError, match="absent: found no events.out.tfevents"):
        fig.read_scalars(tmp_path / "absent")


def test_save_writes_a_whole_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "curve.png"
    figure = fig.sweep({"GED": {"ATFM": ATFM}}, setting="steps")
    fig.save(figure, path)
    with Image.open(path) as picture:
        picture.load()
        assert picture.size == (830, 640)
    assert list(path.parent.iterdir()) == [path]


def test_save_keeps_the_old_file_where_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "curve.png"
    path.write_bytes(b"old")
    figure = Figure()
    with pytest.raises(ValueError, match="found suffix '.bmq', expected one of"):
        fig.save(figure, tmp_path / "curve.bmq")

    def half(file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        fig.save(figure, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_drawing_leaves_pyplot_and_the_models_alone():
    code = "import sys, fig; print({'matplotlib.pyplot', 'models', 'data', 'metrics'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
