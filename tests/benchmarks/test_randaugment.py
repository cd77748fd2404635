from pathlib import Path

import pytest

from benchmarks import randaugment


@pytest.mark.integration
def test_table_in_the_documents_is_what_the_command_prints():
    assert randaugment.render_table() in (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def test_describe_changes_tells_the_kinds_apart():
    picture = randaugment.make_picture()
    assert randaugment.describe_changes(picture, "posterize", 27) == "0 / 62 / 7"
    assert randaugment.describe_changes(picture, "cutout", 5).endswith(" / –")
