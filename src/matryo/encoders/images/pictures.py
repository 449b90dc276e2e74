"""Pictures as one uint8 array: every file is decoded once, by one rule, and bad ones are named.

The rule: EXIF orientation applied; grey repeated over three channels; palettes expanded; transparency laid over white;
scaled so that the shorter side fits and cropped in the middle. Pictures of 16 or 32 bits per channel are refused, as
their range is not known.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError, MissingExtraError
from matryo.core.files import digest

Pixels = NDArray[np.uint8]
Bad = Literal["refuse", "skip"]
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Pictures:
    """N decoded pictures and, where the source has them, their classes."""

    pixels: Pixels
    """(N, H, H, 3); memory-mapped if it came from a cache."""
    labels: NDArray[np.int64] | None
    """(N,) places in `classes`."""
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    """What was left out, with the reason."""

    def __len__(self) -> int:
        return len(self.pixels)


def decode(item: Any, size: int, what: str = "image") -> Pixels:
    """One picture as (size, size, 3) uint8, by the rule of this module.

    Args:
        item: a path, the bytes of a file, a PIL image, a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or the
            `{"bytes": ..., "path": ...}` of `datasets`.
        size: pixels of a side, at least 1.
        what: its name in errors.

    Raises:
        InputError: not a picture that can be read; names it.
    """
    image_of, ops = _pillow()
    if isinstance(item, Mapping):
        item = item["bytes"] if item.get("bytes") is not None else item.get("path")
    try:
        if isinstance(item, (str, Path)):
            picture = image_of.open(item)
        elif isinstance(item, (bytes, bytearray, memoryview)):
            picture = image_of.open(io.BytesIO(item))
        elif isinstance(item, np.ndarray):
            picture = image_of.fromarray(_array(item, what))
        elif isinstance(item, image_of.Image):
            picture = item
        else:
            raise InputError(
                f"{what} is {type(item).__name__}; give a path, bytes, a PIL image or a uint8 array (H, W, 3)"
            )
        if picture.mode in DEEP:
            raise InputError(
                f"{what} has mode {picture.mode}, whose range is not known; convert it to 8 bits a channel"
            )
        picture = _flat(ops.exif_transpose(picture), image_of)
        if picture.size != (size, size):
            picture = ops.fit(picture, (size, size), method=image_of.Resampling.BICUBIC)
        return np.asarray(picture, dtype=np.uint8)
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, image_of.DecompressionBombError) as error:
        raise InputError(f"{what} cannot be read as a picture ({error}); mend it, or leave it out") from error


def read_pictures(
    source: Any,
    size: int,
    *,
    bad: Bad = "refuse",
    classes: Sequence[str] | None = None,
    cache: str | Path | None = None,
) -> Pictures:
    """Decode a data set.

    Args:
        source: a folder of class folders; a Parquet or JSONL file with `image` (bytes, or a path beside the file) and
            perhaps `label`; or rows with these keys, such as a `datasets.Dataset`.
        size: pixels of a side.
        bad: what to do with a picture that cannot be read: refuse the data set, or skip it and tell in `skipped`.
        classes: the classes of an earlier split, whose numbers this one shall have.
        cache: a folder to decode into once; later calls map the file into memory. Files are known by their content.

    Raises:
        InputError: no such source, no pictures, a broken one, a row without a label beside others that have one, or a
            class that is not among `classes`.
    """
    if bad not in ("refuse", "skip"):
        raise InputError(f"bad must be refuse or skip, got {bad!r}")
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 4096:
        raise InputError(f"size must be a whole number of pixels in 1..4096, got {size!r}")
    path = Path(source) if isinstance(source, (str, Path)) else None
    if cache is not None and path is not None and path.is_file():
        return _cached(path, size, bad, classes, Path(cache))
    rows = list(_rows(source))
    if not rows:
        raise InputError(f"{path or 'the data set'} holds no pictures")
    kept = np.empty((len(rows), size, size, 3), dtype=np.uint8)
    names, skipped = _decode_into(kept, rows, size, bad)
    labels, found = _numbered(names, classes)
    return Pictures(kept[: len(names)], labels, found, skipped)


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingExtraError("pillow", "images", "reading pictures") from error
    return Image, ImageOps


def _array(item: NDArray[Any], what: str) -> Pixels:
    array = item[..., 0] if item.ndim == 3 and item.shape[-1] == 1 else item
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise InputError(
            f"{what} must be a uint8 array (H, W), (H, W, 3) or (H, W, 4), got {item.dtype} {tuple(item.shape)}"
        )
    return cast(Pixels, array)


def _flat(picture: Any, image_of: Any) -> Any:
    """RGB, with whatever is transparent laid over white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        return image_of.alpha_composite(image_of.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return picture.convert("RGB")


def _rows(source: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, picture, label or None) of every row."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            yield from _folder(path)
        elif not path.is_file():
            raise InputError(f"no such file or folder: {path}")
        elif path.suffix == ".parquet":
            yield from _table(path)
        elif path.suffix == ".jsonl":
            yield from _lines(path)
        else:
            raise InputError(f"{path}: pictures come as a folder of class folders, .parquet or .jsonl")
    elif isinstance(source, Iterable):
        yield from _mappings(source, "row")
    else:
        raise InputError(f"pictures come as a path or as rows, got {type(source).__name__}")


def _folder(path: Path) -> Iterator[tuple[str, Any, Any]]:
    kinds = sorted(each for each in path.iterdir() if each.is_dir())
    if not kinds:
        raise InputError(f"{path} holds no class folders; put the pictures of each class into a folder of its name")
    for kind in kinds:
        for file in sorted(kind.iterdir()):
            if file.suffix.lower() in SUFFIXES:
                yield str(file.relative_to(path)), file, kind.name


def _table(path: Path) -> Iterator[tuple[str, Any, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", f"reading {path}") from error
    file = parquet.ParquetFile(path)
    columns = [name for name in ("image", "label") if name in file.schema_arrow.names]
    if "image" not in columns:
        raise InputError(f"{path} has no column 'image', it has {', '.join(file.schema_arrow.names)}")
    seen = 0
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            yield f"{path.name} row {seen}", _beside(row["image"], path), row.get("label")
            seen += 1


def _lines(path: Path) -> Iterator[tuple[str, Any, Any]]:
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                image = row["image"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} line {n}: expected an object with 'image' ({error})") from error
            yield f"{path.name} line {n}", _beside(image, path), row.get("label")


def _mappings(rows: Iterable[Any], what: str) -> Iterator[tuple[str, Any, Any]]:
    for n, row in enumerate(rows):
        if not isinstance(row, Mapping) or "image" not in row:
            raise InputError(f"{what} {n} has no 'image'; rows are mappings with 'image' and perhaps 'label'")
        yield f"{what} {n}", row["image"], row.get("label")


def _beside(item: Any, file: Path) -> Any:
    """Paths in a file are relative to it."""
    if isinstance(item, Mapping) and item.get("bytes") is None:
        item = item.get("path")
    return file.parent / item if isinstance(item, str) else item


def _decode_into(
    out_NHWC: Pixels, rows: Sequence[tuple[str, Any, Any]], size: int, bad: Bad
) -> tuple[list[Any], tuple[str, ...]]:
    """Decode rows into the front of `out_NHWC`; the labels of those that could be read, and what was skipped."""
    labels: list[Any] = []
    skipped = []
    for name, item, label in rows:
        try:
            out_NHWC[len(labels)] = decode(item, size, name)
        except InputError as error:
            if bad == "refuse":
                raise
            skipped.append(str(error))
            continue
        labels.append(label)
    if not labels:
        raise InputError(f"none of {len(rows)} pictures can be read; the first: {skipped[0]}")
    return labels, tuple(skipped)


def _numbered(labels: Sequence[Any], classes: Sequence[str] | None) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Places of the labels among the classes; numbers are put in the order of numbers, everything else by its text."""
    missing = [n for n, label in enumerate(labels) if label is None]
    if len(missing) == len(labels):
        return None, tuple(classes or ())
    if missing:
        raise InputError(f"{len(missing)} of {len(labels)} pictures have no label, the first at {missing[0]}; give all")
    whole = all(isinstance(label, int) and not isinstance(label, bool) for label in labels)
    found = tuple(str(x) for x in sorted(set(labels))) if whole else tuple(sorted({str(x) for x in labels}))
    order = {name: n for n, name in enumerate(found if classes is None else classes)}
    unknown = [name for name in found if name not in order]
    if unknown:
        raise InputError(f"class {unknown[0]!r} is not among the {len(order)} classes of the training split")
    return np.array([order[str(label)] for label in labels], dtype=np.int64), tuple(order)


def _cached(path: Path, size: int, bad: Bad, classes: Sequence[str] | None, cache: Path) -> Pictures:
    cache.mkdir(parents=True, exist_ok=True)
    stem = f"{path.stem}-{digest(path)}-{size}-{bad}"
    pixels, notes = cache / f"{stem}.npy", cache / f"{stem}.json"
    if not notes.is_file():
        rows = list(_rows(path))
        if not rows:
            raise InputError(f"{path} holds no pictures")
        temporary = pixels.with_suffix(".tmp")
        try:
            out = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(rows), size, size, 3))
            labels, skipped = _decode_into(out, rows, size, bad)
            out.flush()
            temporary.replace(pixels)
        finally:
            temporary.unlink(missing_ok=True)
        # The notes come last: their presence means whole pixels.
        notes.write_text(json.dumps({"labels": labels, "skipped": skipped}))
    said = json.loads(notes.read_text())
    numbers, found = _numbered(said["labels"], classes)
    mapped: Any = np.load(pixels, mmap_mode="r")
    return Pictures(mapped[: len(said["labels"])], numbers, found, tuple(said["skipped"]))
