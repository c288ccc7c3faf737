"""Pictures of forecasts: what a column of voxels looks like from above, PNG, GIF, refusals."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from PIL import Image

from mfd_fast.models.occfm.birds_eye import COLOURS, PALETTE, birds_eye_view, shown_classes
from mfd_fast.models.occfm.data.classes import CLASSES, FREE
from mfd_fast.models.occfm.pictures import forecast_animation, forecast_grid

CAR, ROAD = CLASSES.index("car"), CLASSES.index("driveable_surface")


def scene(height=4):
    grid = np.full((8, 6, height), FREE, np.uint8)
    grid[1:, :, 0] = ROAD
    return grid


def test_every_class_has_its_own_colour():
    assert list(COLOURS) == list(CLASSES) and len(set(COLOURS.values())) == len(CLASSES)


def test_a_column_shows_its_highest_voxel_forward_up_and_left_left():
    grid = scene()
    grid[6, 5, 1:] = CAR  # far ahead, far left
    grid[2, 3, 1] = CAR  # lower
    view = birds_eye_view(grid)
    assert view.shape == (8, 6, 3)
    assert np.array_equal(view[7], np.broadcast_to(PALETTE[FREE], (6, 3)))  # behind: nothing
    assert np.array_equal(view[1, 0], PALETTE[CAR])  # the highest layer has full brightness
    low = view[5, 2] / PALETTE[CAR]
    assert np.allclose(low, low[0]) and 0.72 < low[0] < 0.9
    assert np.array_equal(view[3, 3], PALETTE[ROAD])
    assert (view[2, 1] < PALETTE[ROAD]).all()  # in the shadow of the car ahead to the left


def test_one_layer_and_an_empty_grid_can_be_drawn():
    assert np.array_equal(birds_eye_view(scene(1))[0, 0], PALETTE[ROAD])
    assert (birds_eye_view(np.full((3, 3, 4), FREE, np.uint8)) == 1).all()


def test_the_legend_names_what_is_there():
    grid = scene()
    assert shown_classes(grid) == ["driveable_surface"]
    grid[3, 3, 1] = CAR
    assert shown_classes(scene(), grid) == ["car", "driveable_surface"]


@pytest.fixture
def rows():
    frames = np.stack([scene() for _ in range(6)])
    for i in range(6):
        frames[i, i + 1, 3, 1] = CAR
    truth = torch.from_numpy(frames)
    return {"ground truth": truth, "student\n1 step": truth.roll(1, 2)}


def test_png_and_gif_are_written(tmp_path, rows):
    forecast_grid(rows, tmp_path / "new" / "forecast.png", "two rows")
    with Image.open(tmp_path / "new" / "forecast.png") as picture:
        assert picture.format == "PNG" and picture.width >= 1200
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 20
    narrow = picture.width
    forecast_grid(rows, tmp_path / "seen.png", "", seen=rows["ground truth"][0])
    with Image.open(tmp_path / "seen.png") as picture:
        assert picture.width > narrow  # a column more
    forecast_animation(rows, tmp_path / "gif" / "forecast.gif")
    with Image.open(tmp_path / "gif" / "forecast.gif") as picture:
        assert (picture.format, picture.n_frames, picture.info["duration"]) == ("GIF", 6, 500)
        assert picture.info["loop"] == 0
        shown = []
        for i in range(6):
            picture.seek(i)
            shown.append(picture.convert("RGB").tobytes())
    assert len(set(shown)) == 6  # the car moves


@pytest.mark.parametrize("draw", [lambda r, p: forecast_grid(r, p, ""), forecast_animation])
def test_rows_that_do_not_fit_are_refused(tmp_path, rows, draw):
    path = tmp_path / "x.gif"
    with pytest.raises(ValueError, match=r"rows of one shape \[frames, X, Y, Z\], got {}"):
        draw({}, path)
    with pytest.raises(ValueError, match=r"'b': \[5, 8, 6, 4\]"):
        draw({"a": rows["ground truth"], "b": rows["ground truth"][:5]}, path)
    with pytest.raises(ValueError, match=r"class ids \[frames, X, Y, Z\], got {'a': \[8, 6, 4\]}"):
        draw({"a": rows["ground truth"][0]}, path)
    assert not path.exists()
