"""The TFDS builder of the Python standard library's text; imports TFDS, so import it late."""

from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from pjit_train.data import stdlib_files


class StdlibText(tfds.core.GeneratorBasedBuilder):
    """Documents {"path", "text"} in the splits "train" and "validation".

    Preparing it also writes files.json into the data directory: each file's path, split and sha256.
    """

    VERSION = tfds.core.Version(stdlib_files.VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="The text of the Python standard library.",
            features=tfds.features.FeaturesDict({"path": text, "text": text}),
            disable_shuffling=True,  # neighbours in the library stay neighbours
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager  # everything is on this machine
        files = stdlib_files.select_files(stdlib_files.stdlib_dir())
        stdlib_files.write_manifest(files, Path(self.data_dir).parents[1] / "files.json")
        return {
            split: self._generate_examples([f for f in files if f.split == split])
            for split in ("train", "validation")
        }

    def _generate_examples(self, files: list[stdlib_files.StdlibFile]) -> Iterator:
        for index, file in enumerate(files):
            yield index, {"path": file.path, "text": file.text}
