"""report.html: one file, with every image and system that it says it shows, and what was scored on it."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jinja2.utils import htmlsafe_json_dumps
from matplotlib.path import Path as Polygon
from PIL import Image

from fig import report_page
from fig.canvas import COLOURS
from metrics.evaluation import draw

H, W = 12, 16
IDS = ["plain", 'a"b', "</script><img src=x>", "R&D <!--", "{{data}}", "plain (2)"]
TABLE = ("| system | GED2 |\n|---|---|\n| a & b, ours | 0.300 +- 0.100 |\n| <i>, paper |  |\n\n"
         "| minus atfm | GED2 |\n|---|---|\n| act-gtr | +0.1 [-0.1, +0.3] |\n")


class Images:
    ids = [*IDS[:-1], "plain"]  # another image by the name of the first

    def __getitem__(self, index):
        masks = torch.zeros(3, H, W)
        masks[1:, 2:6, 3:3 + index + 1] = 1  # the first expert's mask is empty
        return torch.full((1, H, W), index / 10), masks


def noise(shift, image, n, generator):
    factors = torch.rand((1, n, 1, 1), generator=generator)  # as of GTR: other samples for another n
    return 0.2 * factors + 0.8 * torch.rand((1, n, H, W), generator=generator) + shift


SYSTEMS = [SimpleNamespace(label="act-gtr", preset="paper", training={},
                           sample=lambda *a, **k: noise(-1, *a, **k)),  # empty masks
           SimpleNamespace(label="atfm", preset="best", sample=lambda *a, **k: noise(0, *a, **k), training={
               "GTR": {"rank": 10}, "atfm": {"alpha": 0.2, "data_path": "<b>", "dim_mults": (1, 2, 4)}})]


def report(**sampling):
    """Two seeds; atfm's GED12 falls from image 0 to 5, other scores are as an empty share has them."""
    scores = {"GED12": [[0.9 - 0.1 * i for i in range(6)], [0.7 - 0.1 * i for i in range(6)]],
              "HM-IoU12": [[0.5] * 6] * 2, "Empty": [[0.25] * 6] * 2}
    return {"metadata": {"what": "<LIDC>"}, "command": "test_prior_LIDC.py --split_seed 1 > a",
            "hardware": "CPU", "groups": ["p", "q", '"</script>', "r&s", "p", "q"],
            "sampling": {"samples": [2, 12], "seeds": [7, 8], "report_images": 100} | sampling,
            "systems": {"act-gtr": {"scores": scores}, "atfm": {"scores": scores}}}


class Page(HTMLParser):
    """Elements with their attributes, the text of each kind of element, and the data."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], {}, ""
        self.feed(text)
        (self.data,) = (json.loads(text) for text in self.text["script"] if text.lstrip().startswith("{"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open = tag

    def handle_data(self, data):
        self.text.setdefault(self._open, []).append(data)


def written(folder, **sampling):
    report_page.write_report(folder, SYSTEMS, Images(), report(**sampling), TABLE)
    return Page((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return written(tmp_path_factory.mktemp("page"))


def polygons(path):
    """The vertices of an SVG path of M and l, in pixels."""
    contours = []
    for part in path.split("M")[1:]:
        numbers = np.array([int(number) for number in re.findall(r"-?\d+", part)]).reshape(-1, 2)
        contours.append(np.cumsum(numbers, axis=0) / 2)
    return contours


@pytest.mark.parametrize("mask", [
    np.zeros((H, W)), np.ones((H, W)), np.eye(H, W),
    np.pad(np.pad(np.zeros((2, 3)), 2, constant_values=1), 1),
    np.random.default_rng(0).random((H, W)) > 0.6])
def test_an_outline_encloses_the_pixels_of_its_mask_and_no_others(mask):
    centres = np.argwhere(np.ones_like(mask))[:, ::-1] + 0.5  # x, y
    inside = np.zeros(len(centres), bool)
    for vertices in polygons(report_page.outline(mask)):
        inside ^= Polygon(vertices).contains_points(centres)  # a hole is a contour within another
    np.testing.assert_array_equal(inside.reshape(mask.shape), mask)


def test_the_page_refers_to_nothing_outside(page):
    references = [value for _, attributes in page.elements for name, value in attributes.items()
                  if name in ("src", "href", "action", "srcset", "data")]
    assert references and all(item.startswith(("data:", "#")) for item in references)
    text = "".join(sum(page.text.values(), []))
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)
    policy = {attributes.get("http-equiv"): attributes["content"] for tag, attributes in page.elements
              if tag == "meta" and "content" in attributes}
    assert policy["Content-Security-Policy"].startswith("default-src 'none'; img-src data:;")


def test_every_image_and_system_is_on_the_page_worst_first_with_its_mean_scores(page):
    assert [item["id"] for item in page.data["images"]] == IDS
    assert [item["patient"] for item in page.data["images"]] == report()["groups"]
    assert page.data["systems"] == ["act-gtr", "atfm"]
    assert (page.data["scores"], page.data["first"]) == (["GED12", "HM-IoU12", "Empty"], 0)
    assert page.data["better"] == ["lower", "higher", ""]
    for index, item in enumerate(page.data["images"]):
        assert item["scores"] == [pytest.approx([0.8 - 0.1 * index, 0.5, 0.25])] * 2
        assert [area for area, _ in item["experts"]] == [0, *[4 * (index + 1)] * 2]
        empty, marked = item["systems"]
        assert empty["samples"] == [[0, ""]] * report_page.SHOWN
        assert len(marked["samples"]) == report_page.SHOWN and all(path for _, path in marked["samples"])


def test_the_samples_are_those_that_were_scored_under_the_first_seed(page):
    for index, item in enumerate(page.data["images"]):
        image, _ = Images()[index]
        scored = draw(SYSTEMS[1].sample, image[None], 12, 7, IDS[index])[0, :report_page.SHOWN].numpy()
        expected = [[int(mask.sum()), report_page.outline(mask)] for mask in scored]
        assert item["systems"][1]["samples"] == expected


def test_names_of_any_characters_stay_text(page):
    tags = [tag for tag, _ in page.elements]
    assert not {"i", "b"} & set(tags) and tags.count("img") == 2 and tags.count("script") == 2
    assert page.text["title"][0] == "<LIDC>: test of act-gtr, atfm"
    assert "test_prior_LIDC.py --split_seed 1 > a" in page.text["code"]
    assert [cell for cell in page.text["th"] if cell.strip()] == [
        "system", "GED2", "a & b, ours", "<i>, paper", "minus atfm", "GED2", "act-gtr",
        "rank", "alpha", "data_path", "dim_mults"]
    assert [cell for cell in page.text["td"] if cell.strip()] == [
        "0.300 +- 0.100", "+0.1 [-0.1, +0.3]", "10", "0.2", "<b>", "(1, 2, 4)"]


def test_each_system_stands_with_its_preset_and_its_training_which_is_collapsed(page):
    headings = [text for text in page.text["h3"] if text.strip()]
    assert headings == ["act-gtr: preset paper", "atfm: preset best"]
    assert [attributes for tag, attributes in page.elements if tag == "details"] == [{}]  # not open
    assert [text for text in page.text["caption"] if text.strip()][-2:] == ["GTR", "atfm"]
    assert "Its training configuration is not known." in page.text["p"]


def test_the_commit_is_shown_if_it_is_known(page):
    assert "commit" not in "".join(page.text["br"])
    text = report_page.page(report() | {"commit": "0123abc"}, SYSTEMS, TABLE, [], 6)
    assert "commit 0123abc" in "".join(Page(text).text["br"])


def pixels(uri):
    with Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))) as file:
        return np.asarray(file.convert("RGB"))


def test_maps_are_of_all_samples_and_of_the_experts():
    masks, samples = torch.zeros(2, H, W), torch.zeros(2, 12, H, W)
    masks[:, 0, 0] = masks[0, 0, 1] = samples[1, :, 0, 2] = samples[1, -6:, 0, 3] = 1
    item = report_page.image_item(torch.zeros(1, H, W), masks, samples[:, :8], samples.mean(1))
    less, _, more = (tuple(int(COLOURS[i][at:at + 2], 16) for at in (1, 3, 5)) for i in (1, 2, 0))
    error = pixels(item["systems"][1]["error"])
    assert error.shape == (H, W, 3)
    assert [tuple(value) for value in error[0, [0, 2, 4]].tolist()] == [less, more, (0, 0, 0)]
    for uri, column in ((item["variance"], 1), (item["systems"][1]["variance"], 3)):
        bright = pixels(uri).astype(int).sum(2)
        assert np.argwhere(bright == bright.max()).tolist() == [[0, column]]
    assert item["box"] == [0, 0, 4.5, 3.38] and item["size"] == (W, H)


@pytest.mark.parametrize("shape, kind", [((1, H, W), "png"), ((3, H, W), "jpeg"), ((1, 300, 600), "png")])
def test_a_picture_is_grey_or_rgb_and_not_large(shape, kind):
    c, h, w = shape
    image = torch.linspace(0, 1, w).expand(shape)
    item = report_page.image_item(image, torch.zeros(2, h, w), torch.zeros(1, 2, h, w), torch.zeros(1, h, w))
    assert item["picture"].startswith(f"data:image/{kind};")
    picture = pixels(item["picture"])
    assert picture.shape == ((128, 256, 3) if w == 600 else (h, w, 3))
    assert np.abs(picture[:, [0, -1], 0] - [0, 255.0]).max() < 10


def test_a_few_images_are_evenly_spaced_from_worst_to_best(tmp_path):
    page = written(tmp_path, report_images=2)
    assert [item["id"] for item in page.data["images"]] == [IDS[0], IDS[-1]]
    assert "2 of 6 test images are shown" in "".join(page.text["p"])
    assert written(tmp_path, report_images=0).data["images"] == []


def test_a_page_that_would_be_too_large_leaves_images_out_and_says_so(page, tmp_path, monkeypatch):
    size = max(len(htmlsafe_json_dumps(item)) for item in page.data["images"])
    monkeypatch.setattr(report_page, "LARGEST", report_page.TEXT + 3 * size + 200)
    smaller = written(tmp_path)
    assert [item["id"] for item in smaller.data["images"]] == [IDS[0], IDS[2], IDS[-1]]
    assert (tmp_path / "report.html").stat().st_size < report_page.LARGEST
    assert "3 of 6 test images are shown" in "".join(smaller.text["p"])
    assert "3 that were drawn are left out" in "".join(smaller.text["p"])
