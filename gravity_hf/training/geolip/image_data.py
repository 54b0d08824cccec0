"""Images that a geolip learns from: made by rules, in a folder, or of a data set; read one by one.

train, held_out = load_images("shapes", processor, count=1024)
train, held_out = load_images("pictures/", processor)
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from ...models.geolip.image_arrays import as_channels_first
from .records import name_of_source
from .splitting import drawn_apart
from .synthetic import KINDS, synthetic_images

__all__ = ["SUFFIXES", "ImageRows", "Images", "load_images"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_COLUMNS = ("image", "img", "picture", "pixel_values")
_SPLITS = ("train", "validation", "test")
_SYNTHETIC = 1024


class ImageRows(Dataset):
    """Rows `{"pixel_values": [C, H, W]}` for GeolipCollator, each made when it is asked for.

    Args:
        read: the image with a number, as the processor takes it.
        numbers: which images.
        processor: a GeolipImageProcessor. None: `read` gives pixel values.
    """

    def __init__(
        self, read: Callable[[int], Any], numbers: Sequence[int], processor: Any = None
    ) -> None:
        self.read, self.numbers, self.processor = read, list(numbers), processor

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.read(self.numbers[index])
        if self.processor is None:
            return {"pixel_values": image}
        values = self.processor(image, return_tensors="pt")["pixel_values"]
        return {"pixel_values": values[0]}


class Images(NamedTuple):
    """Rows to learn from, others to measure on, one line about where they come from, and a digest
    of which images they are: of files by their names and sizes."""

    train: ImageRows
    held_out: ImageRows
    description: str
    digest: str


def load_images(
    source: str,
    processor: Any,
    *,
    count: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    dataset_config: str | None = None,
    column: str | None = None,
) -> Images:
    """Images by where they come from; a share of them, drawn by `seed`, is held out.

    Args:
        source: a kind of `synthetic_images`; or a folder with image files, in folders of it, too;
            or a name or folder for `datasets.load_dataset`, whose first split is read.
        processor: the GeolipImageProcessor; its image_size and patch_size are those of synthetic
            images.
        count: at most so many images. None: 1024 synthetic ones, or all there are.
        held_out: share in (0, 1); 2 images at least.
        seed: of synthetic images, of the choice of `count`, and of what is held out.
        dataset_config: configuration of the data set.
        column: its column of images. None: the one that is called as such columns are.

    Raises:
        ValueError: no such source, fewer than 3 images, a share outside of (0, 1), or a file that
            is no image in spite of its name.
        ImportError: a data set without the package that reads it.
    """
    listed: list[str] = []
    if source in KINDS:
        size, patch = processor.size.height, processor.patch_size
        pixels = synthetic_images(source, count or _SYNTHETIC, size, patch, seed)
        read, total, processor = (lambda i: pixels[i]), len(pixels), None
        origin = f"synthetic images ({source}) of {size} x {size} pixels, seed {seed}"
    elif files := _files(Path(source)):
        read = _reader(files, to_rgb=processor.do_convert_rgb)
        total, origin = len(files), f"folder {name_of_source(source)}"
        listed = [f"{file.relative_to(source)} {file.stat().st_size}" for file in files]
    else:
        rows, name = _dataset(source, dataset_config, column)
        read, total = (lambda i: rows[i][name]), len(rows)
        origin = f"data set {name_of_source(source)}"
    numbers = list(range(total))
    if count is not None and count < total:
        numbers = random.Random(seed).sample(numbers, count)
    if listed:
        _check_images([files[i] for i in numbers])
    description = f"{len(numbers)} images, {origin}"
    # Another draw than that of the count.
    away = drawn_apart(len(numbers), held_out, seed + 1, f"images of {source!r}")
    train = sorted(set(range(len(numbers))) - set(away))
    return Images(
        ImageRows(read, [numbers[i] for i in train], processor),
        ImageRows(read, [numbers[i] for i in away], processor),
        description,
        hashlib.sha256("\0".join([description, *listed]).encode()).hexdigest()[:16],
    )


def _files(folder: Path) -> list[Path]:
    """Image files under a folder, in order of their names; none where it is no folder."""
    if not folder.is_dir():
        return []
    found = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    return sorted(file for file in found if file.is_file())


def _reader(files: list[Path], *, to_rgb: bool) -> Callable[[int], Any]:
    def read(number: int) -> Any:
        with _opened(files[number]) as image:
            return as_channels_first(image, to_rgb=to_rgb)

    return read


def _check_images(files: Sequence[Path]) -> None:
    """Said before a training begins; what is behind a file's first bytes is not looked at."""
    for file in files:
        with _opened(file):
            pass


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError) as error:
        # PIL says SyntaxError of some files that are broken.
        raise ValueError(
            f"{file}: expected an image, cannot read it ({error}). Take it out of the folder"
        ) from error


def _dataset(source: str, config: str | None, column: str | None) -> tuple[Any, str]:
    """Rows of a data set, and the name of their images."""
    try:
        from datasets import Image, load_dataset
    except ImportError as error:
        raise ImportError(
            f"images: {source!r} is neither of {list(KINDS)} nor a folder with images; as a data "
            "set it needs the package datasets, which is not installed: pip install datasets"
        ) from error
    try:
        splits: Any = load_dataset(source, config)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"images: expected one of {list(KINDS)}, a folder with images, or a data set, got "
            f"{source!r}, which cannot be loaded ({error})"
        ) from error
    split = next((part for part in _SPLITS if part in splits), next(iter(splits)))
    rows = splits[split]
    images = [name for name, kind in rows.features.items() if isinstance(kind, Image)]
    known = [column] if column else [name for name in (*_COLUMNS, *images) if name in images]
    if not known or known[0] not in images:
        raise ValueError(
            f"images: expected a column of images in {source!r} ({split}), "
            f"{'got ' + repr(column) if column else 'found none'}; it has {rows.column_names}"
        )
    return rows, known[0]
