"""Sources of images: scikit-learn's digits, folders of images by class, TFDS."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from pjit_train.data.sources import Tfds, falls_below
from pjit_train.errors import UserError
from sparsity.ranges import Fraction, check_fields

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TRAIN, _VALIDATION = ("train",), ("validation", "val", "valid", "test")


class Example(NamedTuple):
    """An image, uint8 [height, width, 1 or 3 channels], and the index of its class."""

    image: np.ndarray
    label: int


class Examples(Protocol):
    """The images of a split, read when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Opened(NamedTuple):
    """Examples and classes of a source of images, opened.

    Attributes:
      classes: their names, in the order of labels.
      train, validation: the images of the splits.
      digest: hexadecimal SHA-256 that is another one where the images are others.
    """

    classes: tuple[str, ...]
    train: Examples
    validation: Examples
    digest: str


@dataclasses.dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits of 8x8 pixels that come with scikit-learn.

    The test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak,
    1998). Every fifth image, 359 in all, is for validation.
    """

    def open(self) -> Opened:
        """Reads them; raises a UserError where scikit-learn is not installed."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError(
                f"Digits: scikit-learn cannot be imported ({error}); pip install scikit-learn"
            ) from error
        loaded = load_digits()
        # Sixteen shades, 0 to 16, as 0 to 255.
        images = np.round(loaded.images * (255 / 16)).astype(np.uint8)[..., None]
        labels = loaded.target.astype(int)
        held = np.arange(len(images)) % 5 == 4
        return Opened(
            classes=tuple(map(str, loaded.target_names)),
            train=_InMemory(images[~held], labels[~held]),
            validation=_InMemory(images[held], labels[held]),
            digest=_sha256(images.tobytes() + labels.astype(np.int64).tobytes()),
        )

    def seen_from(self, folder: Path) -> "Digits":
        """Returns the source itself: the images are in a library, not in a folder."""
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Images in a folder for each class: `PATH/CLASS/*.png`, or `PATH/train/CLASS/*.png` and
    `PATH/validation/CLASS/*.png` (val, valid and test are as good).

    Files of other kinds are passed over. Classes are in the order of their names.

    Attributes:
      path: of the folder.
      validation_fraction: of the images, where there is no folder of validation: those whose name
        has a hash below it, whatever other images there are.
    """

    path: str
    validation_fraction: Fraction = 0.1

    def __post_init__(self):
        check_fields(self, UserError)

    def open(self) -> Opened:
        """Lists the images; raises a UserError where there are none."""
        root = Path(self.path).expanduser()
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise UserError(f"ImageFolder.path={self.path!r} {what}; give a folder of images")
        train = _first_folder(root, _TRAIN)
        validation = _first_folder(root, _VALIDATION)
        if (train is None) != (validation is None):
            there, missing = (train, "validation") if train else (validation, "train")
            raise UserError(
                f"ImageFolder.path={self.path!r} has {there.name}/ and no {missing}/; give both, "
                "or folders of classes alone"
            )
        if train is not None:
            splits = {"train": _files(train), "validation": _files(validation)}
        else:
            files, fraction = _files(root), self.validation_fraction
            held = {path: falls_below(fraction, f"{c}/{path.name}") for c, path in files}
            splits = {
                "train": [(c, path) for c, path in files if not held[path]],
                "validation": [(c, path) for c, path in files if held[path]],
            }
        classes = sorted({name for name, _ in splits["train"]})
        if strange := sorted({name for name, _ in splits["validation"]} - set(classes)):
            raise UserError(
                f"ImageFolder.path={self.path!r}: class {strange[0]!r} is in the validation images "
                "and not in those of training; give every class images to train on"
            )
        for split, files in splits.items():
            if not files:
                raise UserError(
                    f"ImageFolder.path={self.path!r} has no images for {split}; give "
                    "PATH/CLASS/*.png (or jpg, webp, ...)"
                )
        listed = [
            [split, name, path.name, path.stat().st_size]
            for split, files in splits.items()
            for name, path in files
        ]
        of = functools.partial(_OfFiles, {name: i for i, name in enumerate(classes)})
        digest = _sha256(json.dumps(listed).encode())
        return Opened(tuple(classes), of(splits["train"]), of(splits["validation"]), digest)

    def seen_from(self, folder: Path) -> "ImageFolder":
        """Returns the source with a relative path taken from a folder, where it is found there."""
        path = folder / Path(self.path).expanduser()
        return dataclasses.replace(self, path=str(path)) if path.is_dir() else self


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsImages:
    """A TensorFlow Datasets dataset with features of an image and of a label.

    It is read as `sources.Tfds` is, without TensorFlow where it is prepared as ArrayRecord.

    Attributes:
      name, data_dir, train_split, validation_split: as of `sources.Tfds`.
      image_field, label_field: the features.
    """

    name: str
    data_dir: str | None = None
    image_field: str = "image"
    label_field: str = "label"
    train_split: str = "train"
    validation_split: str = "validation"

    def open(self) -> Opened:
        """Opens the splits; raises a UserError where TFDS cannot give them."""
        dataset = self._dataset()
        parts = {split: dataset.rows(split) for split in (self.train_split, self.validation_split)}
        train, validation = parts[self.train_split], parts[self.validation_split]
        names = self._classes(dataset, train)
        read = functools.partial(_OfRows, self.image_field, self.label_field)
        digest = _sha256(json.dumps(dataset.key()).encode())
        return Opened(names, read(train), read(validation), digest)

    def seen_from(self, folder: Path) -> "TfdsImages":
        """Returns the source with a relative `data_dir` taken from a folder, if it is found
        there."""
        return dataclasses.replace(self, data_dir=self._dataset().seen_from(folder).data_dir)

    def _dataset(self) -> Tfds:
        return Tfds(
            name=self.name,
            data_dir=self.data_dir,
            train_split=self.train_split,
            validation_split=self.validation_split,
        )

    def _classes(self, dataset: Tfds, rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
        if not len(rows):
            raise UserError(f"TfdsImages.name={self.name!r}: split {self.train_split!r} is empty")
        row = rows[0]
        for what, name, kind in (
            ("images", self.image_field, np.ndarray),
            ("labels", self.label_field, np.integer | int),
        ):
            if not isinstance(row.get(name), kind):
                raise UserError(
                    f"TfdsImages.name={self.name!r}: {name!r} is not a feature of {what}; set "
                    f"image_field and label_field to features of it ({', '.join(sorted(row))})"
                )
        label = dataset.features()[self.label_field]
        if (names := getattr(label, "names", None)) is not None:
            return tuple(names)
        raise UserError(
            f"TfdsImages.name={self.name!r}: {self.label_field!r} has no classes; set label_field "
            "to a feature of classes (ClassLabel)"
        )


@dataclasses.dataclass(frozen=True)
class _InMemory:
    images: np.ndarray  # uint8 [images, height, width, channels]
    labels: np.ndarray  # int [images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return Example(self.images[index], int(self.labels[index]))


@dataclasses.dataclass(frozen=True)
class _OfFiles:
    labels: dict[str, int]  # by class
    files: list[tuple[str, Path]]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        from PIL import Image, UnidentifiedImageError

        name, path = self.files[index]
        try:
            with Image.open(path) as image:
                grey = image.mode in ("1", "L", "I", "I;16", "F", "LA")
                pixels = np.asarray(image.convert("L" if grey else "RGB"))
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
            raise UserError(f"{path} is no image that can be read ({error}); remove it") from error
        return Example(pixels.reshape(*pixels.shape[:2], -1), self.labels[name])


@dataclasses.dataclass(frozen=True)
class _OfRows:
    image_field: str
    label_field: str
    rows: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        return Example(np.asarray(row[self.image_field], np.uint8), int(row[self.label_field]))


def _first_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _files(root: Path) -> list[tuple[str, Path]]:
    """(class, path) of every image in a folder of classes, in a fixed order."""
    return [
        (folder.name, path)
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
