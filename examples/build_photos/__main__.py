# SPDX-License-Identifier: Apache-2.0
"""Builds a set of training pictures from its publisher's own download; docs/photos.md says where to get each.

OUT/SET gets photos and COCO files (train/, val/, instances_train.json, instances_val.json), or cut-outs and their
lists (train/, val/, index_train.json, index_val.json). Nothing is downloaded. The same download gives the same files.

Usage: python examples/build_photos SET SOURCE OUT
       python examples/build_photos backgrounds SOURCE OUT --license NAME [--credit TEXT]
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from clothing import clothing
from photographs import backgrounds, caltech101, coco, facade
from scans import scans3d
from things import fluent3d

from efficientsam_hf.files import check_writable, write_folder, write_text


SETS: dict[str, Callable[[Path], Any]] = {
    "caltech101": caltech101,
    "coco": coco,
    "coco_persons": partial(coco, persons=True),
    "facade": facade,
    "clothing": clothing,
    "fluent3d": fluent3d,
    "scans3d": scans3d,
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="build_photos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", metavar="SET", choices=[*SETS, "backgrounds"], help=", ".join([*SETS, "backgrounds"]))
    parser.add_argument("source", metavar="SOURCE", type=Path, help="the publisher's download, unpacked")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder in which the set's own is made")
    parser.add_argument("--license", help="of backgrounds: what their publisher allows, such as CC-BY-2.0")
    parser.add_argument("--credit", help="of backgrounds: whom to name where their LICENSE.txt does not say it")
    return parser.parse_args(arguments)


def check_arguments(args: argparse.Namespace) -> None:
    """`ValueError` or `OSError` that names the argument."""
    if args.set == "backgrounds" and not args.license:
        raise ValueError("backgrounds need --license, what their publisher allows, such as CC-BY-2.0")
    if args.set != "backgrounds" and (args.license or args.credit):
        raise ValueError(f"--license and --credit belong to backgrounds; those of {args.set} are known")
    if not args.source.is_dir():
        raise FileNotFoundError(f"SOURCE {args.source} does not exist or is not a folder")
    if args.out.resolve().is_relative_to(args.source.resolve()):
        raise ValueError(f"OUT {args.out} must not lie in SOURCE {args.source}")
    if (args.out / args.set).exists():
        raise FileExistsError(f"OUT {args.out} has a folder {args.set} already: remove it, or give another OUT")
    check_writable(args.out)


def build(args: argparse.Namespace) -> None:
    """Write the set; it appears as a whole or not at all."""
    if args.set == "backgrounds":
        pictures = backgrounds(args.source, args.license, args.credit or "")
    else:
        pictures = SETS[args.set](args.source)

    def write(folder: Path) -> None:
        counts, left_out = pictures.write(folder, args.set)
        if not any(folder.glob("*/*")):
            raise ValueError(f"SOURCE {args.source} has nothing to use; {len(left_out)} left out, {left_out[:1]}")
        print("; ".join(counts))
        if left_out:
            write_text(folder / "left_out.txt", "\n".join(left_out) + "\n")
            print(f"{len(left_out):,} left out, listed in {args.out / args.set / 'left_out.txt'}")

    write_folder(args.out / args.set, write)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        check_arguments(args)
        build(args)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"build_photos: {error}")


if __name__ == "__main__":
    main()
