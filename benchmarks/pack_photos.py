# SPDX-License-Identifier: Apache-2.0
"""The train splits of docs/photos.md, smaller, to take along: `python benchmarks/pack_photos.py photos packed/photos`.

Photos become JPEG of a lower quality, and of each set the first `--most` stay. Prints what each set takes.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm


LISTS = ("images", "photos", "cutouts")  # what the files that describe a set call its pictures


def first_of(content: dict[str, Any], most: int) -> dict[str, Any]:
    """A set's description with so many pictures, and the annotations of these."""
    kept = {name: value[:most] if name in LISTS else value for name, value in content.items()}
    if "annotations" in kept:
        ids = {image["id"] for image in kept["images"]}
        kept["annotations"] = [entry for entry in kept["annotations"] if entry["image_id"] in ids]
    return kept


def pack(source: Path, target: Path, quality: int, most: int) -> int:
    """Copy one set; returns its bytes."""
    (target / "train").mkdir(parents=True)
    (description,) = source.glob("*_train.json")
    content = first_of(json.loads(description.read_text()), most)
    (target / description.name).write_text(json.dumps(content))
    pictures = next(content[name] for name in LISTS if name in content)
    for entry in tqdm(pictures, desc=source.name, leave=False):
        path = source / "train" / entry["file_name"]
        if path.suffix.lower() in (".jpg", ".jpeg"):
            with Image.open(path) as image:
                image.convert("RGB").save(target / "train" / path.name, "JPEG", quality=quality)
        else:
            shutil.copy(path, target / "train" / path.name)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--quality", type=int, default=50)
    parser.add_argument("--most", type=int, default=700, metavar="N", help="pictures of each set")
    args = parser.parse_args()
    total = 0
    for source in sorted(path for path in args.photos.iterdir() if (path / "train").is_dir()):
        size = pack(source, args.target / source.name, args.quality, args.most)
        total += size
        print(f"{source.name}: {size / 2**20:.1f} MiB")
    print(f"{total / 2**20:.1f} MiB in all")


if __name__ == "__main__":
    main()
