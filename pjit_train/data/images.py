"""Batches of images with their classes that are a pure function of (seed, step)."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pjit_train.data.data import Data
from pjit_train.data.image_sources import Digits, Example, ImageFolder, Opened, TfdsImages
from pjit_train.data.text import derived_seed
from pjit_train.errors import UserError
from sparsity.ranges import Count, Fraction, Positive, Whole, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageData(Data):
    """Images, what is done to them, and how large the batches are.

    Attributes:
      source: where images come from.
      image_size: height and width that every image is brought to: scaled (bilinear, antialiased)
        by its shorter side, and its middle taken.
      channels: 1 for grey, 3 for red, green and blue.
      batch_size: images of a step, over all hosts.
      mean, std: of pixels between 0 and 1: (pixel - mean) / std is what the model is given.
      shift: of training images: most pixels that each is moved by, in both directions; what comes
        in is black ("random crop with padding").
      flip: of training images: whether half of them are mirrored.
    """

    source: Digits | ImageFolder | TfdsImages
    image_size: Count
    channels: Count = 3
    batch_size: Count = 128
    mean: Fraction = 0.5
    std: Positive = 0.5
    shift: Whole = 0
    flip: bool = False

    def __post_init__(self):
        check_fields(self, UserError)
        if self.channels not in (1, 3):
            raise UserError(f"ImageData.channels={self.channels}; use 1 (grey) or 3 (colours)")
        if self.shift >= self.image_size:
            raise UserError(
                f"ImageData.shift={self.shift} would move images of {self.image_size} pixels out "
                f"of sight; use less than {self.image_size}"
            )

    def prepare(self, seed: int, *, keep: bool = True) -> "ImageBatches":
        """Opens the images; see `Data.prepare`."""
        opened = self.source.open()
        for split in ("train", "validation"):
            if not len(getattr(opened, split)):
                raise UserError(f"{self.source} has no images for {split}; give it some")
        return ImageBatches(self, opened, seed)

    def seen_from(self, folder: Path) -> "ImageData":
        """Returns the data with a relative path of the source taken from a folder."""
        return dataclasses.replace(self, source=self.source.seen_from(folder))


class ImageBatches:
    """The batches of an `ImageData`, made by `ImageData.prepare`.

    A batch is a dict of arrays, `rows` being those asked for of `batch_size`:
      images: float32 [rows, image_size, image_size, channels].
      labels: int32 [rows].
      weights: float32 [rows], in evaluation batches only: 0 past the end of the split.

    Attributes:
      classes: names, in the order of labels.
    """

    def __init__(self, data: ImageData, opened: Opened, seed: int):
        import grain

        self.data, self.seed, self.batch_size = data, seed, data.batch_size
        self.classes, self.digest = opened.classes, opened.digest
        self._train, self._validation = opened.train, opened.validation
        shuffled = grain.MapDataset.range(len(opened.train)).shuffle(seed=derived_seed(seed, 0))
        self._order = shuffled.repeat()  # shuffled anew each time
        self._pool = ThreadPoolExecutor()  # files are decoded without Python's lock

    @property
    def num_train(self) -> int:
        """Number of images of the training split."""
        return len(self._train)

    @property
    def num_eval_batches(self) -> int:
        """Batches in which every image of the validation split stands once."""
        return -(-len(self._validation) // self.batch_size)

    def train_batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The given rows of the batch of a step; reads no others."""
        first = step * self.batch_size
        return self._stack(self._train_row, [first + r for r in range(self.batch_size)[rows]])

    def eval_batch(self, index: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The given rows of batch `index` of the validation split, in its order."""
        first = index * self.batch_size
        return self._stack(self._eval_row, [first + r for r in range(self.batch_size)[rows]])

    def _stack(self, make, indices: list[int]) -> dict[str, np.ndarray]:
        rows = list(self._pool.map(make, indices))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _train_row(self, index: int) -> dict[str, Any]:
        image, label = self._pixels(self._train[int(self._order[index])])
        return {"images": self._normalised(self._varied(image, index)), "labels": label}

    def _eval_row(self, index: int) -> dict[str, Any]:
        held = self._validation
        image, label = self._pixels(held[min(index, len(held) - 1)])
        weight = np.float32(index < len(held))
        return {"images": self._normalised(image), "labels": label, "weights": weight}

    def _pixels(self, example: Example) -> tuple[np.ndarray, np.int32]:
        """Decodes an example to uint8 [image_size, image_size, channels], and its label."""
        size, channels = self.data.image_size, self.data.channels
        image = example.image
        if image.shape[:2] != (size, size):
            image = _fitted(image, size)
        if image.shape[-1] != channels:
            image = np.repeat(image, 3, axis=-1) if channels == 3 else _grey(image)
        return image, np.int32(example.label)

    def _varied(self, image: np.ndarray, index: int) -> np.ndarray:
        """The image as training sees it at a place of the endless order: moved, mirrored."""
        shift, flip = self.data.shift, self.data.flip
        if not shift and not flip:
            return image
        rng = np.random.default_rng([derived_seed(self.seed, 1), index])
        if shift:
            down, right = rng.integers(0, 2 * shift + 1, size=2)
            padded = np.pad(image, ((shift, shift), (shift, shift), (0, 0)))
            image = padded[down : down + len(image), right : right + len(image)]
        return image[:, ::-1] if flip and rng.integers(2) else image

    def _normalised(self, image: np.ndarray) -> np.ndarray:
        mean, std = np.float32(self.data.mean), np.float32(self.data.std)
        return (image.astype(np.float32) / np.float32(255) - mean) / std


def _fitted(image: np.ndarray, size: int) -> np.ndarray:
    """The middle of an image whose shorter side is scaled to `size`."""
    from PIL import Image

    height, width = image.shape[:2]
    scale = size / min(height, width)
    scaled = max(size, round(width * scale)), max(size, round(height * scale))
    grey = image.shape[-1] == 1
    picture = Image.fromarray(image[..., 0] if grey else image)
    pixels = np.asarray(picture.resize(scaled, Image.Resampling.BILINEAR))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].reshape(size, size, -1)


def _grey(image: np.ndarray) -> np.ndarray:
    """Luma of ITU-R BT.601, as Pillow's conversion to grey."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).convert("L"))[..., None]
