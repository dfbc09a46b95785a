# SPDX-License-Identifier: Apache-2.0
"""What every test file shares: the folder beside the checkout, a photo, a fixed number of threads and seed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings
from PIL import Image
from property_testing import register_profiles


if TYPE_CHECKING:
    from hub_server import HubServer
    from huggingface_hub import HfApi

    from efficientsam_hf import EfficientSamModel, EfficientSamProcessor


# No test may reach for the Hub; set before huggingface_hub is imported, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# `make test` runs several tests at a time: the processes that a test starts must not each take every core.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # Reductions are split by thread, so their last bits depend on the count: fix it for every machine.
    torch.set_num_threads(1)
    register_profiles()
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Models built without a checkpoint draw their weights from torch's global generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout (reference answers, photos, data sets); skips where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder}, which holds reference data and is not part of the project")
    return folder


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """Chelsea the cat (CC0, ships with scikit-image): an RGB photo of 451 x 300 pixels."""
    skimage_data = pytest.importorskip("skimage.data")
    with Image.open(Path(skimage_data.data_dir) / "chelsea.png") as image:
        return image.convert("RGB")


@pytest.fixture(scope="session")
def picture(photo: Image.Image) -> Image.Image:
    """The photo at 230 x 150 pixels."""
    return photo.resize((230, 150))


@pytest.fixture(scope="session")
def model() -> "EfficientSamModel":
    """The shipped model, for all tests: one that changes or moves it takes a copy."""
    from efficientsam_hf import EfficientSamModel, default_checkpoint

    return EfficientSamModel.from_pretrained(default_checkpoint()).eval()


@pytest.fixture(scope="session")
def processor() -> "EfficientSamProcessor":
    """Of the shipped model, for small pictures and without its options of segment-everything."""
    from efficientsam_hf import EfficientSamImageProcessor, EfficientSamProcessor, default_checkpoint

    processor = EfficientSamProcessor.from_pretrained(default_checkpoint())
    processor.image_processor = EfficientSamImageProcessor.from_pretrained(
        default_checkpoint(), size=256, mask_generation=None, mask_cleaning=None
    )
    return processor


@pytest.fixture
def recipe_without_teacher(tmp_path: Path) -> str:
    """The smoke recipe of pretraining without its teacher, and without its scenes: both are left to flags."""
    from efficientsam_hf.training.arguments import RECIPES

    text = (RECIPES / "pretrain" / "smoke.yaml").read_text()
    path = tmp_path / "recipe_without_teacher.yaml"
    path.write_text(
        "".join(line for line in text.splitlines(True) if not line.startswith(("teacher", "train_scenes")))
    )
    return str(path)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads comes back after a run with another one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def not_ignored() -> Iterator[None]:
    """SIGHUP ends processes, also where `nohup` runs the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """A file as `efficientsam evaluate --output` writes it."""
    sizes = {"small": 0.01, "medium": 0.1, "large": 0.6}
    by_size = {f"miou_{size}": value for size, value in zip(sizes, (0.3, 0.4, 0.56))}
    content = {
        "metrics": {
            "images": 7, "objects": 31, "seed": 0, "sizes": sizes,
            "center": {"miou": 0.4213, "oracle_miou": 0.55, **by_size},
            "box": {"miou": 0.66789, "oracle_miou": 0.7, **by_size},
        },
        "seconds": 12.0,
        "command": "efficientsam evaluate --annotations /data/photos/instances_val.json --images /data/photos/val",
        "model": "/home/someone/models/tiny",
        "dtype": "float32",
        "date": "2026-05-04T03:02:01+00:00",
        "machine": {"cpu": "Some CPU", "cores": 2, "threads": 2, "gpus": []},
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    path = tmp_path / "metrics-photos.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator["HubServer"]:
    """A Hub on loopback: huggingface_hub is online, sees no other Hub and no token or cache of this machine."""
    from hub_server import HubServer, close_session, point_client_at

    with HubServer() as server:
        point_client_at(server, tmp_path_factory.mktemp("hf_home"), monkeypatch)
        yield server
        close_session()


@pytest.fixture
def api(hub: "HubServer") -> "HfApi":
    """The client of the user who owns the repositories."""
    from hub_server.helpers import client_of

    return client_of(hub, hub.token)


@pytest.fixture
def repo(api: "HfApi") -> str:
    """Name of an empty model repository."""
    from hub_server.helpers import REPO

    return api.create_repo(REPO).repo_id


# Of the file alone: all of the package takes seconds to import.
HOLD = """
import runpy, sys
from pathlib import Path
lock = runpy.run_path(sys.argv[1])["FolderLock"]
locks = [lock(Path(folder)) for folder in sys.argv[2:]]
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen]]:
    """Let another process have folders."""
    started = []

    def start(*folders: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(ROOT / "src/efficientsam_hf/files.py"), *map(str, folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
