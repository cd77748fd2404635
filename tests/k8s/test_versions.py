import pytest

from k8s.versions import find_version_conflicts, format_version, parse_image_version, parse_version


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("v1.33.1-gke.1041000", (1, 33, 1)),
        ("1.36+", (1, 36, 0)),
        ("4.4.1-4.6.0-ubuntu22.04", (4, 4, 1)),
        ("latest", None),
        ("sha-48e7a93", None),
        ("", None),
    ],
)
def test_parse_version(text, version):
    assert parse_version(text) == version


@pytest.mark.parametrize(
    ("image", "version"),
    [
        ("ghcr.io/kubeflow/kfp-api-server:2.17.0", (2, 17, 0)),
        ("10.0.0.1:5000/kubeflow/kfp-api-server:2.17.0@sha256:1f2.3", (2, 17, 0)),
        # The port is no version.
        ("registry.example:5000/kueue", None),
        ("kueue@sha256:0.1.2", None),
        ("kueue:main", None),
    ],
)
def test_parse_image_version(image, version):
    assert parse_image_version(image) == version


@pytest.mark.parametrize(
    ("found", "pairs"),
    [
        ({"kueue": (0, 17, 3), "trainer": (2, 1, 0)}, [("kueue", "trainer")]),
        ({"kueue": (0, 17, 0), "trainer": (2, 2, 0)}, []),
        ({"kueue": (0, 16, 9), "trainer": (2, 2, 0)}, [("kueue", "trainer")]),
        ({"kueue": (0, 16, 9), "trainer": (2, 1, 0)}, []),
        ({"kfp": (2, 17, 0), "argo": (3, 6, 4)}, [("kfp", "argo")]),
        ({"kfp": (2, 17, 0)}, []),
    ],
)
def test_find_version_conflicts(found, pairs):
    assert [(pair.component, pair.other_component) for pair in find_version_conflicts(found)] == pairs


def test_format_version():
    assert format_version((2, 17, 0)) == "2.17.0"
