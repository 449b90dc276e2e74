"""`matryo train --task` and `matryo eval` on pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryo.cli.terminal import InterruptedByUserError, bar, note, say, say_json
from matryo.core.errors import InputError

if TYPE_CHECKING:
    from matryo.core.labelled import LabelledTask
    from matryo.encoders import Model
    from matryo.encoders.images import Pictures
    from matryo.training.images import Epoch, ImageConfig

SHARED = ("epochs", "batch_size", "learning_rate", "seed", "precision", "warmup", "weight_decay")
TAKEN = ("out", "base", "widths", "dim", "loss", "loss_arg", *SHARED, "config")
PLAIN = (*SHARED, "per_class", "padding", "flip")  # the last three in a file alone
"""What goes to the configuration as it is given."""
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    "convnext": {"hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 2, 1], "patch_size": 2},
    "vit": {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512},
    "dinov2": {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4},
}
"""Small backbones to train from scratch."""
SMALL = 64
"""Pictures up to so many pixels go through a ResNet whose first convolution is 3x3 and keeps their size by half."""


def holds_pictures(path: Path) -> bool:
    """Whether this is a folder, or a table with a column `image`."""
    if path.is_dir():
        return True
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet as parquet

        return "image" in parquet.read_schema(path).names
    if path.suffix == ".jsonl" and path.is_file():
        with path.open(encoding="utf-8") as lines:
            return '"image"' in lines.readline()
    return False


def task_of(folder: Path, split: str, size: int) -> "LabelledTask":
    """The labelled task of a folder with pictures to learn from (`train`) and others to be measured on (`split`).

    Raises:
        InputError: one of the two is missing, or whatever `read_pictures` refuses.
    """
    from matryo.core.labelled import LabelledTask
    from matryo.encoders.images import read_pictures

    read: list[Pictures] = []
    labels: list[list[str]] = []
    for name in ("train", split):
        places = [folder / name, folder / f"{name}.parquet", folder / f"{name}.jsonl"]
        found = next((place for place in places if place.exists()), None)
        if found is None:
            raise InputError(
                f"{folder}: no pictures of the split {name}; put them into {places[0]}/CLASS/ or {places[1]}, or name "
                "the split to measure on with --split"
            )
        pictures = read_pictures(found, size, classes=read[0].classes if read else None)
        if pictures.labels is None:
            raise InputError(f"{found}: the pictures have no labels; put them into class folders, or give 'label'")
        read.append(pictures)
        labels.append([pictures.classes[n] for n in pictures.labels])
    return LabelledTask(folder.resolve().name, labels[0], labels[1], read[0].pixels, read[1].pixels)


def train_pictures(given: dict[str, Any], loss: str, picture: Any, resume: bool, as_json: bool) -> None:
    """Train on the pictures of `given["pairs"]` and say where the model lies.

    Raises:
        InputError: an option that pictures do not take, or whatever `read_pictures` and `train_images` refuse.
    """
    from matryo.cli.train import loss_arguments, numbers
    from matryo.encoders.images import read_pictures

    source = given.pop("pairs")
    unknown = sorted(given.keys() - {*TAKEN})
    if unknown:
        names = ", ".join("--" + name.replace("_", "-") for name in unknown)
        raise InputError(
            f"{names}: not for pictures; they take {', '.join('--' + name.replace('_', '-') for name in TAKEN)}"
        )
    given = {**given, "widths": numbers(given.get("widths")), "loss_args": loss_arguments(given.pop("loss_arg", []))}
    if "config" in given:
        given, picture = _with_file(given, picture)
    if not isinstance(picture, dict) or picture.keys() - {"size", "pooling", "model_type", "stem", "bad"}:
        raise InputError(f"--picture takes size, pooling, model_type, stem and bad, got {picture!r}")
    if "out" not in given:
        raise InputError("out: Field required")
    config = _config(given, loss, picture)
    pictures = read_pictures(source, config.network.size, bad=picture.get("bad", "refuse"))
    for skipped in pictures.skipped:
        note(f"skipped: {skipped}")
    if pictures.skipped:
        note(f"{len(pictures.skipped)} of {len(pictures) + len(pictures.skipped)} pictures skipped")
    model = _run(config, pictures, resume)
    assert model.nesting is not None
    if as_json:
        said = {"model": str(config.out), "widths": model.nesting.widths, "skipped": len(pictures.skipped)}
        say_json({**said, "scores": model.card.scores})
    else:
        say(f"{config.out}: a nested model of widths {', '.join(map(str, model.nesting.widths))}")


def _with_file(given: dict[str, Any], picture: Any) -> tuple[dict[str, Any], Any]:
    """The options, and below them what the YAML file says."""
    from matryo.training.config import PictureConfig

    file = PictureConfig.from_yaml(given.pop("config")).model_dump(exclude_none=True)
    below = file.pop("picture")
    # Another loss has other arguments, so those of the file go with the file's loss.
    arguments = {**({} if "loss" in given else file["loss_args"]), **given["loss_args"]}
    chosen = {**file, **{name: value for name, value in given.items() if value is not None}, "loss_args": arguments}
    return chosen, {**below, **picture} if isinstance(picture, dict) else picture


def _config(given: dict[str, Any], loss: str, picture: dict[str, Any]) -> "ImageConfig":
    from matryo.encoders.folder import IMAGE
    from matryo.encoders.images.encoder import ImageEncoder
    from matryo.encoders.images.network import NetworkConfig, pretrained
    from matryo.training.images import ImageConfig

    base, width = given.get("base"), given.get("dim")
    if base is not None and (Path(base) / IMAGE).is_file():
        network = ImageEncoder.load(base).network.config
        if width is not None:
            network = NetworkConfig.of({**network.plain(), "width": width})
    elif base is not None:
        network = pretrained(base, width, picture.get("size", 224), picture.get("pooling", "avg")).config
    else:
        network = _from_scratch(width, picture)
    arguments = given["loss_args"]
    wrong = sorted(arguments.keys() - {"tied", "label_smoothing"})
    if wrong:
        raise InputError(f"--loss-arg {wrong[0]}: with pictures it is tied or label_smoothing")
    plain = {name: given[name] for name in PLAIN if name in given}
    return ImageConfig(
        out=Path(given["out"]),
        network=network,
        base=base,
        widths=given.get("widths"),
        loss=given.get("loss", loss),
        **arguments,
        **plain,
    )


def _from_scratch(width: int | None, picture: dict[str, Any]) -> Any:
    from matryo.encoders.images.network import NetworkConfig

    kind, size = picture.get("model_type", "resnet"), picture.get("size", 32)
    if kind not in BACKBONES:
        raise InputError(f"model_type must be one of {', '.join(BACKBONES)} from scratch, got {kind!r}; or give --base")
    backbone = {"model_type": kind, **BACKBONES[kind]}
    if kind in ("vit", "dinov2"):
        backbone |= {"image_size": size, "patch_size": max(1, size // 8)}
    stem = picture.get("stem", "half" if kind == "resnet" and size <= SMALL else "built")
    return NetworkConfig(backbone, width=width, size=size, pooling=picture.get("pooling", "avg"), stem=stem)


def _run(config: "ImageConfig", pictures: "Pictures", resume: bool) -> "Model":
    from matryo.training.images import train_images

    with bar(None, "training") as progress:

        def report(said: "Epoch") -> None:
            losses = " ".join(f"{width}:{loss:.4f}" for width, loss in said.losses.items())
            note(f"epoch {said.epoch}/{said.epochs} loss {losses}")
            progress.to(said.epoch, said.epochs)

        try:
            return train_images(config, pictures, resume=resume, report=report)
        except KeyboardInterrupt:
            raise InterruptedByUserError(
                f"interrupted; finished epochs are kept in {config.out}, go on with the same command and --resume"
            ) from None
