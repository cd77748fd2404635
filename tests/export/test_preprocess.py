"""The file that goes with an export reads images as our own evaluation does."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ns.data.augment.transforms import EvalTransform
from ns.data.loading.decode import decode_image
from ns.export import exporter

SIDE_PX = 32


def make_picture(mode: str) -> Image.Image:
    """An asymmetric picture of 60 × 44 px in one of Pillow's modes."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8)).resize((60, 44), Image.Resampling.BICUBIC)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 60).astype(np.uint8), (44, 1)))
    if mode in ("RGBA", "LA"):
        picture = rgb.convert(mode)
        picture.putalpha(alpha)
        return picture
    if mode == "P":
        picture = rgb.convert("P")
        picture.info["transparency"] = 3
        return picture
    if mode in ("I;16", "12 of 16 bits", "I"):
        factor = 16 if mode == "12 of 16 bits" else 257
        gray = np.asarray(rgb.convert("L")).astype(np.uint16) * factor
        return Image.fromarray(gray.astype(np.int32) if mode == "I" else gray)
    return rgb.convert(mode)


GEOMETRIES = {
    "resized": ("resized", "paper", "bicubic"),
    "none": ("none", "paper", "bicubic"),
    "center": ("resized", "center", "bilinear"),
    "squash": ("resized", "squash", "bicubic"),
}


@pytest.fixture(params=GEOMETRIES)
def preprocess(tmp_path, request):
    """The module as it lies beside a model."""
    crop, test_crop, interpolation = GEOMETRIES[request.param]
    about = {
        "resolution": SIDE_PX,
        "crop": crop,
        "test_crop": test_crop,
        "interpolation": interpolation,
        "test_margin_px": 8,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
    }
    (tmp_path / "export.json").write_text(json.dumps(about))
    shutil.copy(exporter.Path(exporter.__file__).with_name(exporter.PREPROCESS_FILE), tmp_path)
    spec = importlib.util.spec_from_file_location("preprocess", tmp_path / exporter.PREPROCESS_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, about


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *((mode, "PNG") for mode in ("RGB", "L", "1", "RGBA", "LA", "P", "I;16", "12 of 16 bits")),
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGBA", "WEBP"),
        ("I;16", "TIFF"),
        ("I", "TIFF"),
    ],
)
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_files_are_read_as_in_evaluation(preprocess, tmp_path, mode, kind, orientation):
    module, about = preprocess
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image"
    make_picture(mode).save(path, kind, exif=exif)
    transform = EvalTransform(
        SIDE_PX, about["crop"], about["test_margin_px"], test_crop=about["test_crop"], interpolation=about["interpolation"]
    )
    expected = transform(decode_image(path.read_bytes()))
    found = module.load_pixels(path)
    assert found.dtype == np.uint8
    assert found.flags.writeable, "torch.from_numpy warns of arrays that are not"
    # torch's filter here, and Pillow's there.
    difference = np.abs(found.astype(int) - expected)
    assert difference.mean() <= 1
    assert difference.max() <= 3
    normalized = (found / 255 - np.array(about["mean"])) / np.array(about["std"])
    np.testing.assert_allclose(module.load_input(path), normalized.transpose(2, 0, 1)[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preprocess", ["center"], indirect=True)
def test_elongated_files_are_read_as_in_evaluation(preprocess, tmp_path):
    """Of which only the middle is resized."""
    module, about = preprocess
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 81, 3), np.uint8)).save(tmp_path / "image", "PNG")
    transform = EvalTransform(SIDE_PX, "resized", 8, test_crop="center", interpolation=about["interpolation"])
    expected = transform(decode_image((tmp_path / "image").read_bytes()))
    assert np.abs(module.load_pixels(tmp_path / "image").astype(int) - expected).max() <= 3


def test_floating_point_images_are_refused(preprocess, tmp_path):
    Image.fromarray(np.ones((40, 40), np.float32)).save(tmp_path / "image", "TIFF")
    with pytest.raises(ValueError, match="unknown range"):
        preprocess[0].load_pixels(tmp_path / "image")


def test_file_needs_numpy_and_pillow_only(preprocess):
    source = exporter.Path(preprocess[0].__file__).read_text()
    imported = {line.split()[1].partition(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"io", "json", "contextlib", "pathlib", "typing", "numpy", "PIL"}
