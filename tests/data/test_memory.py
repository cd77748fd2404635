"""Memory does not grow with the number of images. `NS_TEST_IMAGES=1000000` takes a quarter of an hour and proves no more."""

import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import simplejpeg

FEW, MANY = 10_000, int(os.environ.get("NS_TEST_IMAGES", "100000"))

IMPORT = r"""
import re, sys
from pathlib import Path
from ns.config.schema import ImportConfig
from ns.data.importing.ingest import import_images
from ns.storage import LocalStore

data = import_images(sys.argv[1], LocalStore(sys.argv[2]), name="n", role="unlabeled", config=ImportConfig(), workers=1)
print(data.samples, re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""

CHECK = r"""
import re, sys
from pathlib import Path
from ns.data.leakage import NamedDataset, check_datasets
from ns.data.dataset import Dataset
from ns.storage import LocalStore

folder = LocalStore(sys.argv[1])
data = Dataset.load(folder)
report = check_datasets([NamedDataset("pool", folder, data)], LocalStore(sys.argv[2]), LocalStore(sys.argv[2]).at("kept"))
print(data.samples, re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""

STREAM = r"""
import re, sys
from pathlib import Path
import numpy as np
from ns.config.schema import NoiseConfig
from ns.data.augment.transforms import TrainTransform
from ns.data.dataset import Dataset
from ns.data.loading import shard_reader
from ns.data.loading.stream import LabeledImages, TrainingBatches
from ns.storage import LocalStore

shard_reader.DECODED_BYTES = 0
folder = LocalStore(sys.argv[1])
data = Dataset.load(folder).model_copy(update={"classes": ("a", "b")})
labeled = LabeledImages.__new__(LabeledImages)
labeled.source = shard_reader.ImageSource(folder, data)
labeled.class_ids = [np.zeros(shard.samples, np.int32) for shard in data.shards]
labeled.copies = [np.ones(shard.samples, np.uint8) for shard in data.shards]
labeled.samples = data.samples
batches = TrainingBatches(labeled, None, TrainTransform(NoiseConfig(randaugment_layers=0), 32, "none"),
                          batch_size=500, pseudo_batch_size=0, num_classes=2, seed=0)
for step in range(-(-data.samples // 500)):
    batches[step]
print(data.samples, re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""


def measured(program: str, *arguments) -> tuple[int, int]:
    """Number of images and peak memory in kB; not ru_maxrss, which a child inherits from its parent."""
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    count, peak = done.stdout.splitlines()[-1].split()
    return int(count), int(peak)


def write_tar(path, count):
    """A tar of noise, so that no two images are alike: memory may grow with the duplicates only."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"{number // 1000:04d}/{number:07d}.jpg")
            data = simplejpeg.encode_jpeg(rng.integers(0, 256, (32, 32, 3), np.uint8), 75, "RGB")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            # tarfile would keep all members in memory.
            tar.members.clear()
    return path


@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_memory_of_import_check_and_stream_is_flat(tmp_path):
    peaks: dict[str, list[int]] = {"import": [], "check": [], "stream": []}
    for count in (FEW, MANY):
        source = write_tar(tmp_path / f"{count}.tar", count)
        out = tmp_path / f"out-{count}"
        for name, program, arguments in (
            ("import", IMPORT, (source, out)),
            ("check", CHECK, (out, tmp_path / f"check-{count}")),
            ("stream", STREAM, (out,)),
        ):
            images, peak = measured(program, *arguments)
            assert images == count
            peaks[name].append(peak)
        source.unlink()
    assert all(many < 1.1 * few for few, many in peaks.values()), peaks
