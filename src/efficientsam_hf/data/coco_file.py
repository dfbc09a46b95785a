# SPDX-License-Identifier: Apache-2.0
"""The one reader of COCO instances files: each field is checked once, for all who use it."""

from pathlib import Path
from typing import Any, NamedTuple

from ..files import read_json
from ..models.checks_efficientsam import short
from .json_values import identity, positive


KEYS = frozenset(
    "images annotations categories id file_name width height image_id category_id segmentation size counts iscrowd "
    "name".split()
)
CROWD = {None: False, 0: False, 1: True, "0": False, "1": True, "false": False, "true": True}
ID = "a whole number or text"


class CocoImage(NamedTuple):
    """An entry of "images"."""

    id: int | str
    file_name: str
    height: int
    width: int


class CocoAnnotation(NamedTuple):
    """An entry of "annotations", `place` being its number in the file from 0 on.

    The segmentation is a list of polygons or an RLE mask that nobody has looked into, None for a box alone.
    """

    place: int
    segmentation: Any
    category: int | str | None
    crowd: bool


class CocoFile:
    """Images, annotations of each image, and category ids of a COCO instances file.

    Ids are whole numbers or text; text that is a number counts as the number, in whatever place it stands. "iscrowd"
    may be 0, 1, false, true, the same as text, null or missing. "area" and "bbox" are not read: they follow from the
    masks. A segmentation that is null, empty or missing is a box alone. Without a list of categories they are those
    that annotations name, and an annotation that names none has category 1.

    Raises `FileNotFoundError`, and `ValueError` that names the file, the entry, the field and its value: for a field
    of another type, for two images or two categories of one id, and for an annotation of an image that is not listed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"annotation file {self.path} does not exist or is not a file")
        content = read_json(self.path, KEYS)
        entries = {name: self._entries(content, name) for name in ("images", "annotations")}
        del content["images"], content["annotations"]
        self.images = [self._image(place, entry) for place, entry in enumerate(entries["images"])]
        self.annotations: list[list[CocoAnnotation]] = [[] for _ in self.images]
        self._group(entries["annotations"])
        self.categories = self._categories(content)
        self._listed = bool(content.get("categories"))

    def _entries(self, content: Any, section: str) -> list[dict[str, Any]]:
        entries = content.get(section) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{self.path} is not a COCO instances file: it has no list '{section}'")
        return entries

    def _image(self, place: int, entry: Any) -> CocoImage:
        self._require("images", place, entry, ("id", "file_name", "width", "height"))
        number, name = identity(entry["id"]), entry["file_name"]
        height, width = positive(entry["height"]), positive(entry["width"])
        if number is None:
            self._fail("images", place, "id", entry["id"], ID)
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            self._fail("images", place, "file_name", name, "the name of a file")
        for field, value in (("height", height), ("width", width)):
            if value is None:
                self._fail("images", place, field, entry[field], "a whole number of at least 1")
        return CocoImage(number, name, height, width)

    def _group(self, entries: list[Any]) -> None:
        """Hand the annotations to their images; the list is used up, so that no large file lies in memory twice."""
        places: dict[int | str, int] = {}
        for place, image in enumerate(self.images):
            if places.setdefault(image.id, place) != place:
                first = self.images[places[image.id]].file_name
                raise ValueError(
                    f"{self.path}: two images have the id {short(image.id)}, {short(first)} and "
                    f"{short(image.file_name)}; files that are merged must be numbered anew"
                )
        for place in range(len(entries)):
            entry, entries[place] = entries[place], None
            self._require("annotations", place, entry, ("image_id",))
            number = identity(entry["image_id"])
            if number is None:
                self._fail("annotations", place, "image_id", entry["image_id"], ID)
            if number not in places:
                raise ValueError(
                    f"{self.path}: entry {place} of 'annotations' belongs to image {short(number)}, which is not in "
                    "'images'"
                )
            self.annotations[places[number]].append(self._annotation(place, entry))

    def _annotation(self, place: int, entry: dict[str, Any]) -> CocoAnnotation:
        category = entry.get("category_id")
        number = identity(category)
        if number is None and category is not None:
            self._fail("annotations", place, "category_id", category, ID)
        crowd = entry.get("iscrowd")
        if isinstance(crowd, str):
            crowd = crowd.strip().lower()
        if not isinstance(crowd, (int, float, str, type(None))) or crowd not in CROWD:
            self._fail("annotations", place, "iscrowd", entry["iscrowd"], "0 or 1")
        return CocoAnnotation(place, entry.get("segmentation") or None, number, CROWD[crowd])

    def _categories(self, content: dict[str, Any]) -> list[int | str]:
        """Ids in the file's order; those that annotations name where it lists none."""
        listed = content.get("categories") or []
        if not isinstance(listed, list):
            raise ValueError(f"{self.path}: 'categories' must be a list, got {short(listed)}")
        names: dict[int | str, Any] = {}
        for place, entry in enumerate(listed):
            self._require("categories", place, entry, ("id",))
            number, name = identity(entry["id"]), entry.get("name")
            if number is None:
                self._fail("categories", place, "id", entry["id"], ID)
            if names.setdefault(number, name) != name:
                raise ValueError(
                    f"{self.path}: two categories have the id {short(number)}, {short(names[number])} and "
                    f"{short(name)}"
                )
        if names:
            return list(names)
        used = {entry.category for entries in self.annotations for entry in entries} or {1}
        return sorted({1 if number is None else number for number in used}, key=lambda n: (isinstance(n, str), n))

    def category(self, entry: CocoAnnotation) -> int | str:
        """That of an annotation; the only one there is, or 1, if it names none."""
        if entry.category is not None:
            return entry.category
        return self.categories[0] if len(self.categories) == 1 else 1

    def check_categories(self) -> None:
        """`ValueError` for a mask of a category that is not listed, or of none where several are."""
        known = set(self.categories)
        for entry in (entry for entries in self.annotations for entry in entries if entry.segmentation is not None):
            shown = f"{self.path}: entry {entry.place} of 'annotations'"
            if entry.category is None and len(known) > 1 and self._listed:
                raise ValueError(f"{shown} has no category_id, and there are {len(known)} categories")
            if entry.category is not None and entry.category not in known:
                raise ValueError(
                    f"{shown}: category_id {short(entry.category)} is not among those of 'categories': "
                    f"{short(self.categories)}"
                )

    def describe_unused(self) -> str:
        """Why none of the annotations is an object to use, in words."""
        entries = [entry for entries in self.annotations for entry in entries]
        boxes = sum(entry.segmentation is None for entry in entries)
        crowds = sum(entry.segmentation is not None and entry.crowd for entry in entries)
        if entries and boxes == len(entries):
            return f"none of {boxes} annotations has a segmentation, and boxes alone cannot be trained on or measured"
        counts = [f"{len(entries)} annotations"]
        counts += [f"{boxes} of them boxes without a segmentation"] if boxes else []
        counts += [f"{crowds} of them crowds"] if crowds else []
        return ", ".join(counts)

    def _require(self, section: str, place: int, entry: Any, keys: tuple[str, ...]) -> None:
        if not isinstance(entry, dict):
            raise ValueError(f"{self.path}: entry {place} of '{section}' must be an object, got {short(entry)}")
        lacking = [key for key in keys if key not in entry]
        if lacking:
            raise ValueError(f"{self.path}: entry {place} of '{section}' lacks {', '.join(lacking)}")

    def _fail(self, section: str, place: int, field: str, value: Any, expected: str) -> None:
        raise ValueError(f"{self.path}: entry {place} of '{section}': {field} must be {expected}, got {short(value)}")
