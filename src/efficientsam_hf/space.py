# SPDX-License-Identifier: Apache-2.0
"""Where the files of the Space lie: the demo serves them, publishing uploads them."""

from pathlib import Path


PACKAGE = Path(__file__).resolve().parent
# A wheel carries the folder inside the package (setup.py); in a checkout it lies beside `src`.
FOLDERS = (PACKAGE / "spaces" / "efficientsam", PACKAGE.parents[1] / "spaces" / "efficientsam")


def space_folder() -> Path:
    """The folder of the Space, complete; `FileNotFoundError` for an installation without it."""
    for folder in FOLDERS:
        if (folder / "app.py").is_file():
            return folder
    wanted = " and no ".join(map(str, FOLDERS))
    raise FileNotFoundError(f"the Space is missing from this installation: no {wanted}")
