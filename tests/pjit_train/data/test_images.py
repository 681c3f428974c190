"""Images: which are read, what becomes of their pixels, and batches by (seed, step)."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pjit_train.data.image_sources import Digits, ImageFolder, TfdsImages
from pjit_train.data.images import ImageData
from pjit_train.errors import UserError

DIGITS = ImageData(source=Digits(), image_size=8, channels=1, batch_size=16)


def draw(path, colour, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, red and blue, with a split for validation."""
    for split, count in (("train", 5), ("val", 2)):
        for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
            for i in range(count):
                draw(tmp_path / split / name / f"{i}.png", colour)
    (tmp_path / "train" / "red" / "notes.txt").write_text("no image")
    return tmp_path


def test_digits_are_scikit_learns_and_every_fifth_is_held_out():
    opened, loaded = Digits().open(), load_digits()
    assert opened.classes == tuple("0123456789")
    assert (len(opened.train), len(opened.validation)) == (1438, 359)
    for place, example in ((4, opened.validation[0]), (9, opened.validation[1])):
        assert example.label == loaded.target[place]
        np.testing.assert_array_equal(
            example.image[..., 0], np.round(loaded.images[place] * 15.9375)
        )
    np.testing.assert_array_equal(
        opened.train[4].image[..., 0], np.round(loaded.images[5] * 15.9375)
    )
    assert opened.digest == Digits().open().digest


def test_a_step_has_its_rows_whoever_reads_them_and_an_epoch_every_image_once():
    data = dataclasses.replace(DIGITS, shift=2, flip=True)
    batches, others = data.prepare(3), data.prepare(3)
    whole = batches.train_batch(7)
    parts = [others.train_batch(7, slice(0, 5)), others.train_batch(7, slice(5, 16))]
    for name, rows in whole.items():
        np.testing.assert_array_equal(rows, np.concatenate([part[name] for part in parts]))
    assert whole["images"].shape == (16, 8, 8, 1)
    assert whole["images"].dtype == np.float32
    assert not np.array_equal(whole["images"], data.prepare(4).train_batch(7)["images"])

    epoch, opened = DIGITS.prepare(0), Digits().open()
    steps = 1438 // 16
    images = np.concatenate([epoch.train_batch(step)["images"] for step in range(steps)])
    seen = Counter(image.tobytes() for image in images)
    known = [(opened.train[i].image / np.float32(255) - 0.5) / 0.5 for i in range(1438)]
    held = Counter(image.astype(np.float32).tobytes() for image in known)
    assert seen.total() == steps * 16
    assert not seen - held  # none twice, and none of the validation


def test_a_validation_has_every_image_once_and_padding_of_no_weight():
    batches, opened = DIGITS.prepare(0), Digits().open()
    read = [batches.eval_batch(i) for i in range(batches.num_eval_batches)]
    weights = np.concatenate([b["weights"] for b in read])
    labels = np.concatenate([b["labels"] for b in read])
    assert weights.sum() == 359
    assert np.all(weights[:359] == 1)
    assert list(labels[:359]) == [opened.validation[i].label for i in range(359)]
    pixels = np.concatenate([b["images"] for b in read])[0]
    np.testing.assert_allclose(pixels, (opened.validation[0].image / 255 - 0.5) / 0.5, atol=1e-6)


def test_moved_and_mirrored_images_are_those_images():
    plain = DIGITS.prepare(0).train_batch(0)["images"]
    moved = dataclasses.replace(DIGITS, shift=1).prepare(0).train_batch(0)["images"]
    mirrored = dataclasses.replace(DIGITS, flip=True).prepare(0).train_batch(0)["images"]
    black = (0 - 0.5) / 0.5
    shifts, flips = set(), set()
    for image, other, flipped in zip(plain, moved, mirrored, strict=True):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=black)
        of = {(i, j): padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)}
        fitting = [place for place, window in of.items() if np.array_equal(window, other)]
        assert fitting
        shifts.update(fitting)
        assert np.array_equal(flipped, image) or np.array_equal(flipped, image[:, ::-1])
        flips.add(np.array_equal(flipped, image))
    assert len(shifts) > 3
    assert flips == {True, False}


def test_a_folder_of_classes(folder):
    data = ImageData(source=ImageFolder(path=str(folder)), image_size=4, batch_size=4, std=0.25)
    batches = data.prepare(0)
    assert batches.classes == ("blue", "red")
    assert (batches.num_train, batches.num_eval_batches) == (10, 1)
    batch = batches.eval_batch(0)
    assert list(batch["labels"]) == [0, 0, 1, 1]
    assert batch["images"].shape == (4, 4, 4, 3)
    np.testing.assert_allclose(batch["images"][0], np.broadcast_to([-2, -2, 2], (4, 4, 3)))
    grey = dataclasses.replace(data, channels=1).prepare(0).eval_batch(0)["images"]
    luma = [round(0.114 * 255), round(0.299 * 255)]  # of ITU-R BT.601: blue, red
    np.testing.assert_allclose(grey[[0, 2], 0, 0, 0] * 0.25 + 0.5, np.array(luma) / 255, atol=0.003)
    draw(folder / "train" / "red" / "more.jpg", (200, 0, 0))
    again = data.prepare(0)
    assert again.digest != batches.digest
    assert again.num_train == 11


def test_a_folder_without_splits_holds_out_a_part_by_names(tmp_path):
    for i in range(60):
        draw(tmp_path / "a" / f"{i}.png", i, mode="L")
        draw(tmp_path / "b" / f"{i}.png", i, mode="L")
    opened = ImageFolder(path=str(tmp_path), validation_fraction=0.2).open()
    held = {path for _, path in opened.validation.files}
    assert 8 <= len(held) <= 40
    assert len(opened.train) + len(held) == 120
    draw(tmp_path / "c" / "new.png", 0, mode="L")
    draw(tmp_path / "a" / "new.png", 0, mode="L")
    more = ImageFolder(path=str(tmp_path), validation_fraction=0.2).open()
    assert held <= {path for _, path in more.validation.files}  # none moves over


def test_images_are_scaled_by_their_shorter_side_and_cut_in_the_middle(tmp_path):
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 255  # the middle third
    for name in ("train", "val"):
        (tmp_path / name / "only").mkdir(parents=True)
        Image.fromarray(wide).save(tmp_path / name / "only" / "wide.png")
    source = ImageFolder(path=str(tmp_path))
    data = ImageData(source=source, image_size=4, channels=1, batch_size=1, mean=0.0, std=1.0)
    image = data.prepare(0).eval_batch(0)["images"][0, :, :, 0]
    assert np.all(image[:, 1:3] == 1)
    assert np.all(image > 0.5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: ImageFolder(path=str(p / "none")), r"none' does not exist; give a folder"),
        (lambda p: ImageFolder(path=str(p / "file")), r"file' is a file; give a folder"),
        (lambda p: ImageFolder(path=str(p / "empty")), r"empty' has no images for train; give"),
        (lambda p: ImageFolder(path=str(p / "half")), r"half' has train/ and no validation/"),
        (lambda p: ImageFolder(path=str(p / "odd")), r"class 'b' is in the validation images and"),
    ],
)
def test_a_folder_that_is_none_is_told_in_one_line(tmp_path, make, says):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    draw(tmp_path / "half" / "train" / "a" / "1.png", 0)
    draw(tmp_path / "odd" / "train" / "a" / "1.png", 0)
    draw(tmp_path / "odd" / "test" / "b" / "1.png", 0)
    with pytest.raises(UserError, match=says) as raised:
        make(tmp_path).open()
    assert "\n" not in str(raised.value)


def test_a_damaged_image_is_named(folder):
    (folder / "val" / "red" / "0.png").write_bytes(b"\x89PNG and no more")
    data = ImageData(source=ImageFolder(path=str(folder)), image_size=4, batch_size=4)
    with pytest.raises(
        UserError, match=r"val/red/0.png is no image that can be read .*; remove it"
    ):
        data.prepare(0).eval_batch(0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(channels=2), r"channels=2; use 1 \(grey\) or 3"),
        (dict(shift=8), r"shift=8 would move images of 8 pixels out of sight"),
        (dict(image_size=0), r"image_size=0; use a whole number from 1"),
        (dict(std=0.0), r"std=0.0; use a number"),
    ],
)
def test_options_that_make_no_sense(changes, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(DIGITS, **changes)


def test_a_relative_folder_counts_from_where_the_run_was_begun(folder, monkeypatch):
    data = ImageData(source=ImageFolder(path=folder.name), image_size=4)
    assert data.seen_from(folder.parent).source.path == str(folder)
    assert data.seen_from(folder / "train").source.path == folder.name  # nothing is there


def test_a_prepared_dataset_of_tfds(tmp_path):
    import tensorflow_datasets as tfds

    shades = [np.full((5, 5, 3), 40 * i, np.uint8) for i in range(6)]

    class Shades(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(5, 5, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["dark", "light"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {
                "train": self._generate_examples(range(4)),
                "test": self._generate_examples(range(4, 6)),
            }

        def _generate_examples(self, which):
            for i in which:
                path = tmp_path / f"{i}.png"
                Image.fromarray(shades[i]).save(path)
                yield i, {"image": str(path), "label": "light" if i > 2 else "dark"}

    Shades(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = TfdsImages(name="shades", data_dir=str(tmp_path), validation_split="test")
    data = ImageData(source=source, image_size=5, batch_size=2, mean=0.0, std=1.0)
    batches = data.prepare(0)
    assert batches.classes == ("dark", "light")
    assert batches.num_train == 4
    batch = batches.eval_batch(0)
    assert list(batch["labels"]) == [1, 1]
    np.testing.assert_allclose(batch["images"] * 255, [shades[4], shades[5]], rtol=1e-5)
    wrong = dataclasses.replace(source, label_field="image")
    with pytest.raises(UserError, match=r"'image' is not a feature of labels; set image_field and"):
        wrong.open()
