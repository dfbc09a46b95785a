# SPDX-License-Identifier: Apache-2.0
"""Draws a sheet of the pasted pictures of a mixture, each with its masks in colour beside it.

Usage: python examples/draw_pasted.py MIXTURE.yaml OUT.jpg [--source NAME] [--first N] [--count N] [--seed N]
       [--size PIXELS]
"""

import argparse
from dataclasses import replace
from pathlib import Path

from efficientsam_hf.data.mixture import MixtureSource, read_mixture
from efficientsam_hf.visualization import contact_sheet, draw_masks


def pasted_source(mixture: str, name: str | None) -> MixtureSource:
    """The first source of a mixture that has cut-outs, or the one of this name; ValueError if there is none."""
    pasted = [source for source in read_mixture(mixture) if source.kind == "cutouts"]
    for source in pasted:
        if name in (None, source.name):
            return source
    known = ", ".join(source.name for source in pasted) or "none"
    raise ValueError(f"{mixture} has no pasted pictures named {name}; it has {known}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mixture")
    parser.add_argument("output", type=Path)
    parser.add_argument("--source", help="name of the source, by default the first that has cut-outs")
    for name, default in (("first", 0), ("count", 12), ("seed", 0), ("size", 192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    pictures = replace(pasted_source(arguments.mixture, arguments.source).open(), seed=arguments.seed)
    tiles, objects = [], 0
    for index in range(arguments.first, arguments.first + arguments.count):
        sample = pictures.picture(index, arguments.size)
        tiles += [sample["image"], draw_masks(sample["image"], sample["masks"])]
        objects += len(sample["masks"])
    contact_sheet(tiles, columns=6, cell=arguments.size, gap=2).save(arguments.output, quality=85)
    print(f"{arguments.count} pictures, {objects / arguments.count:.1f} objects each, in {arguments.output}")


if __name__ == "__main__":
    main()
