# SPDX-License-Identifier: Apache-2.0
"""Check `models/` against the rules transformers has for model files (transformers-mlinter)."""

import sys
from pathlib import Path

import mlinter


MODELS = Path(__file__).parents[1] / "src" / "efficientsam_hf" / "models"

# Rules about the transformers repository itself, each with the reason it has no meaning here.
NOT_OURS = {
    "TRF028": "the licence is stated by an SPDX line in every file and by LICENSE, not by a copied paragraph",
    "TRF038": "asks for tests/models/<name>/, the layout of the transformers repository; ours are in tests/",
    "TRF057": "auto_docstring finds a model by its folder in transformers; elsewhere it documents 'a None model'",
}


def violations() -> list[mlinter.Violation]:
    """All violations in `models/`, ordered by file and line."""
    rules = mlinter.DEFAULT_ENABLED_TRF_RULES - NOT_OURS.keys()
    files = list(mlinter.iter_modeling_files(search_paths=[MODELS]))
    if not files:
        raise FileNotFoundError(f"no model files found in {MODELS}")
    return [found for path in files for found in mlinter.analyze_file(path, path.read_text(encoding="utf-8"), rules)]


def main() -> int:
    found = violations()
    for violation in found:
        print(f"{violation.file_path}:{violation.line_number}: {violation.message}", file=sys.stderr)
    print(f"transformers-mlinter {mlinter.__version__}: {len(found)} violations in {MODELS.name}/")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
