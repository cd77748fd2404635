"""Runs the published RandAugment in TensorFlow, and prints digests of its results for test_reference.py:

    python3.11 -m venv tf && tf/bin/pip install tensorflow-cpu==2.15.1
    tf/bin/python tests/data/augment/reference_values.py RANDAUGMENT.PY > tests/data/augment/reference_values.json

RANDAUGMENT.PY is `randaugment.py` of github.com/google-research/noisystudent at aac52bf. It runs unchanged. TensorFlow 2 lacks
tf.contrib, whose rotate, translate and transform are replaced by the operation of TensorFlow that they call.
"""

import hashlib
import inspect
import json
import sys
import types
from pathlib import Path

import numpy as np

MAGNITUDES = (0, 5, 9, 10, 15, 24, 27, 30)
SIZES = (16, 32, 65, 224)
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def make_picture(size: int) -> np.ndarray:
    """Slopes with noise, uint8 [size, size, 3]; no channel spans all values."""
    y, x = np.mgrid[:size, :size] / size
    slopes = np.stack([40 + 170 * x, 30 + 150 * y * x, 200 * (1 - y)], 2)
    return (slopes + np.random.RandomState(size).randint(0, 20, (size, size, 3))).astype(np.uint8)


def digest_pixels(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:8]


def load_published(path: Path, signs: list[int]) -> dict:
    import tensorflow.compat.v1 as tf

    tf.disable_v2_behavior()

    def transform(image, matrix):
        matrix = tf.reshape(tf.convert_to_tensor(matrix, tf.float32), (1, 8))
        images = image[None]
        shape = tf.shape(images)[1:3]
        return tf.raw_ops.ImageProjectiveTransformV2(
            images=images, transforms=matrix, output_shape=shape, interpolation="NEAREST"
        )[0]

    def rotate(image, radians):
        side = tf.cast(tf.shape(image)[0], tf.float32) - 1
        angle = tf.constant(radians, tf.float32)
        cos, sin = tf.cos(angle), tf.sin(angle)
        x, y = (side - (cos * side - sin * side)) / 2.0, (side - (sin * side + cos * side)) / 2.0
        return transform(image, tf.stack([cos, -sin, x, sin, cos, y, 0.0, 0.0]))

    def translate(image, shift):
        return transform(image, [1.0, 0.0, -shift[0], 0.0, 1.0, -shift[1], 0.0, 0.0])

    contrib, image, training = (types.ModuleType(f"tensorflow.contrib{name}") for name in ("", ".image", ".training"))
    image.transform, image.rotate, image.translate = transform, rotate, translate
    training.HParams = types.SimpleNamespace
    contrib.image, contrib.training, tf.contrib = image, training, contrib
    sys.modules |= {"tensorflow": tf} | {module.__name__: module for module in (contrib, image, training)}
    inspect.getargspec = lambda function: inspect.getfullargspec(function)[:4]
    published: dict = {}
    exec(compile(path.read_text(), str(path), "exec"), published)
    published["_randomly_negate_tensor"] = lambda value: signs[0] * value
    return published


def run_published(path: Path) -> dict[str, dict[str, list[str]]]:
    """{size: {operation and sign: a digest per magnitude}}; Cutout, which draws a place, is left out."""
    import tensorflow.compat.v1 as tf

    signs = [1]
    published = load_published(path, signs)
    values: dict[str, dict[str, list[str]]] = {}
    for size in SIZES:
        picture = make_picture(size)
        constants = types.SimpleNamespace(translate_const=size // 8 if size <= 64 else 100, cutout_const=0)
        with tf.Graph().as_default(), tf.Session() as session:
            image = tf.placeholder(tf.uint8, picture.shape)
            results: dict[str, list] = {}
            for name in published["NAME_TO_FUNC"]:
                for sign in (1, -1) if name in SIGNED else (1,):
                    signs[0] = sign
                    for magnitude in MAGNITUDES if name != "Cutout" else ():
                        function, _, arguments = published["_parse_policy_info"](
                            name, 1.0, float(magnitude), [128] * 3, constants
                        )
                        results.setdefault(f"{name}{'+' if sign > 0 else '-'}", []).append(function(image, *arguments))
            got = session.run(results, {image: picture})
        values[str(size)] = {name: [digest_pixels(pixels) for pixels in magnitudes] for name, magnitudes in got.items()}
    return values


if __name__ == "__main__":
    json.dump(run_published(Path(sys.argv[1])), sys.stdout, indent=1)
    print()
