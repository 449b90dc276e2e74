"""Writing a folder for small devices, its vectors checked, its size, speed and quality measured."""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError, MissingExtraError
from matryo.core.files import digest, fsync_folder, storage_errors, write_text
from matryo.core.prefix import check_width, truncate
from matryo.encoders import Model, load
from matryo.encoders.export import SAMPLE, export_onnx, overlap
from matryo.encoders.folder import fingerprint
from matryo.encoders.int8 import STEPS, coded, quantise_enough
from matryo.encoders.onnx import MODEL, TOKENIZER, OnnxEncoder, read_about
from matryo.encoders.static import StaticEncoder

Float32s = NDArray[np.float32]
Embed = Callable[[Sequence[str], Path], Float32s]

FORMAT = 1
ABOUT, SCRIPT, TABLE, SCALES = "edge.json", "embed.py", "table.npy", "scales.npy"
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "int8": 2e-2}
"""Largest difference of any number of a unit vector that a code may make; int8 of a transformer is judged otherwise."""
JUDGES = 100
"""Texts from which neighbours are compared."""


def export_edge(
    name: str | Path, out: Path, *, width: int, code: str = "int8", texts: Sequence[str] = (), floor: float = 0.9
) -> dict[str, Any]:
    """Write a model at one width so that it runs on numpy and tokenizers, and on onnxruntime if it is a transformer.

    A static model's table is cut and stored in the code, int8 with one scale a row. A transformer's graph gets the cut
    and the normalisation, and for int8 its products are of integers, as many as neighbours allow. The vectors have
    length 1 either way.

    Args:
        name: a static model's folder, a sentence-transformers folder or hub name, or an export to ONNX (fp32).
        out: a folder that does not exist yet. It appears whole or not at all.
        width: d in 1..D, best one of the trained widths.
        code: int8, float16 (static models only) or float32.
        texts: what to judge by: texts like those to be encoded. 100 or more for the int8 code of a transformer.
        floor: for that one, the least share of each text's 10 nearest neighbours at this width that must stay.

    Returns:
        What `edge.json` in the folder says: `bytes`, `milliseconds` a text, `quality`.

    Raises:
        InputError: a width or code that cannot be had, or the folder's vectors differ too much from the model's.
        MissingExtraError: a transformer needs the `onnx` extra, and `train` unless it is an export.
    """
    if out.exists():
        raise InputError(f"{out} is there already; choose another folder or remove it first")
    if code not in TOLERANCE:
        raise InputError(f"code must be one of {', '.join(TOLERANCE)}, got {code!r}")
    model = load(name)
    width = check_width(width, model.width)
    static = isinstance(model.encoder, StaticEncoder)
    if not static:
        _refuse(model, name, code, texts)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with storage_errors(f"writing {out}"):
            temporary.mkdir(parents=True)
            about: dict[str, Any] = {"format": FORMAT, "width": width, "full_width": model.width, "code": code}
            about["kind"] = "static" if static else "onnx"
            about["source"] = {"name": Path(name).name} | fingerprint(str(name))
            if isinstance(model.encoder, StaticEncoder):
                _write_table(model.encoder, temporary, width, code)
            else:
                about |= _write_graph(name, model, temporary, width)
            script = Path(__file__).with_name("small_static.py" if static else "small_onnx.py")
            shutil.copyfile(script, temporary / SCRIPT)
            write_text(temporary / ABOUT, json.dumps(about))  # which the script reads
            found = _measured(model, temporary, about, list(texts), floor)
            write_text(temporary / ABOUT, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
            write_text(temporary / "README.md", _readme(found))
            fsync_folder(temporary)
            os.rename(temporary, out)
            fsync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def _refuse(model: Model, name: str | Path, code: str, texts: Sequence[str]) -> None:
    if code == "float16":
        raise InputError("float16 is for static models; a transformer takes int8 or float32")
    if code == "int8" and len(texts) < JUDGES:
        raise InputError(
            f"int8 of a transformer is judged by texts like those to be encoded: give at least {JUDGES} (--texts), got "
            f"{len(texts)}"
        )
    if isinstance(model.encoder, OnnxEncoder) and model.encoder.about.precision != "fp32":
        raise InputError(f"{name} is quantised already; export from the fp32 one, which is cut first")
    for package in ("onnxruntime", "onnx"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(package, "onnx", "exporting a transformer") from error


def _write_table(encoder: StaticEncoder, folder: Path, width: int, code: str) -> None:
    """The cut table. One int8 scale a row: rows of rare tokens are short and would vanish under a common one."""
    encoder.tokenizer.save(str(folder / TOKENIZER), pretty=False)
    table = np.ascontiguousarray(encoder.table[:, :width])
    if code == "int8":
        whole, step = coded(table, STEPS, axis=1)
        np.save(folder / SCALES, step[:, 0])
        np.save(folder / TABLE, whole)
    else:
        np.save(folder / TABLE, table.astype(code))


def _write_graph(name: str | Path, model: Model, folder: Path, width: int) -> dict[str, Any]:
    """The graph with cut and normalisation, and what a caller must know of its inputs."""
    whole = Path(name)
    if not isinstance(model.encoder, OnnxEncoder):
        whole = folder / "whole"
        export_onnx(name, whole)
    about = read_about(whole)
    shutil.copyfile(whole / TOKENIZER, folder / TOKENIZER)
    _cut(whole / MODEL, folder / MODEL, width)
    if whole.parent == folder:
        shutil.rmtree(whole)
    prompts = {kind: words for kind, words in about.prompts.items() if words}
    if words := about.prompts.get(about.default_prompt or "", ""):
        prompts[""] = words
    return {"max_tokens": about.max_tokens, "pad": about.pad, "prompts": prompts}


def _cut(source: Path, target: Path, width: int) -> None:
    """Append to a graph: the first dimensions, divided by their length. A row of zeros stays zeros."""
    import onnx

    graph = onnx.load(str(source))
    inner, (output,) = graph.graph, graph.graph.output
    last = output.name
    numbers = {"cut_from": [0], "cut_to": [width], "cut_axis": [1]}
    inner.initializer.extend(onnx.numpy_helper.from_array(np.array(v, np.int64), n) for n, v in numbers.items())
    inner.initializer.append(onnx.numpy_helper.from_array(np.array([1e-12], np.float32), "shortest"))
    make = onnx.helper.make_node
    inner.node.extend(
        [
            make("Slice", [last, *numbers], ["prefix"]),
            make("ReduceL2", ["prefix"], ["length"], axes=[1], keepdims=1),
            make("Max", ["length", "shortest"], ["divisor"]),
            make("Div", ["prefix", "divisor"], ["unit_prefix"]),
        ]
    )
    del inner.output[:]
    inner.output.append(onnx.helper.make_tensor_value_info("unit_prefix", onnx.TensorProto.FLOAT, ["inputs", width]))
    onnx.checker.check_model(graph)
    onnx.save(graph, str(target))


def _quantise(folder: Path, texts: list[str], expected: Float32s, floor: float) -> int:
    """Put integer products in the place of the others; how many had to be left for neighbours to stay."""
    embed, cut = _runner(static=False), folder / f"fp32.{MODEL}"
    os.replace(folder / MODEL, cut)

    def kept() -> float:
        _reopen(static=False)
        return overlap(expected, embed(texts, folder))

    _, left = quantise_enough(cut, folder / MODEL, kept, floor, expected.shape[1])
    cut.unlink()
    return left


def _measured(model: Model, folder: Path, about: dict[str, Any], texts: list[str], floor: float) -> dict[str, Any]:
    """`about` with size, speed and quality, the vectors compared with the model's own on every text."""
    static, width, code = about["kind"] == "static", about["width"], about["code"]
    embed = _runner(static)
    judged = [*SAMPLE, *texts]
    full = truncate(model.encoder.vectors(judged, 64, False), model.width)
    prefix = truncate(full, width)
    if not static and code == "int8":
        _compare(embed(judged, folder), prefix, "float32")  # the cut itself is right
        about["float32_products"] = _quantise(folder, texts, prefix[len(SAMPLE) :], floor)
    embed(judged[:1], folder)  # opens the files
    began = time.process_time()
    rows = embed(judged, folder)
    spent = (time.process_time() - began) / len(judged)
    quality: dict[str, Any] = {"texts": len(texts)}
    if static or code == "float32":
        quality["difference"] = _compare(rows, prefix, code)
    cosines = np.einsum("nd,nd->n", rows, prefix)[prefix.any(axis=1)]
    quality |= {"cosine_mean": float(cosines.mean()), "cosine_least": float(cosines.min())}
    if len(texts) >= JUDGES:
        mine, same, whole = (part[len(SAMPLE) :] for part in (rows, prefix, full))
        quality |= {"neighbours_of_prefix": overlap(same, mine), "neighbours_of_full_width": overlap(whole, mine)}
    _reopen(static)
    names = sorted(path.name for path in folder.iterdir() if path.name != ABOUT)
    sizes = {name: (folder / name).stat().st_size for name in names}
    files = {name: {"bytes": size, "blake2b": digest(folder / name)} for name, size in sizes.items()}
    scores = [row for row in model.card.scores if row.get("width") == width and row.get("code") == "float32"]
    return about | {
        "bytes": sum(sizes.values()),
        "milliseconds": {"a_text": 1000 * spent, "processor": platform.machine(), "texts": len(judged)},
        "quality": quality | {"evaluation_of_prefix": scores},
        "files": files,
    }


def _runner(static: bool) -> Embed:
    """The very code that goes into the folder."""
    if static:
        from matryo.encoders.edge.small_static import embed
    else:
        from matryo.encoders.edge.small_onnx import embed
    return embed


def _reopen(static: bool) -> None:
    """Let go of files that were opened, which another export may write anew."""
    from matryo.encoders.edge import small_static

    if static:
        small_static.opened.cache_clear()
        return
    from matryo.encoders.edge import small_onnx

    small_onnx.opened.cache_clear()


def _compare(rows: Float32s, prefix: Float32s, code: str) -> float:
    most = float(np.abs(rows - prefix).max())
    if not most <= TOLERANCE[code]:
        raise InputError(
            f"vectors at width {prefix.shape[1]} in {code} differ from the model's by {most:.1e} where "
            f"{TOLERANCE[code]} is allowed; take a larger width or another code"
        )
    return most


def _readme(found: dict[str, Any]) -> str:
    """What a person who finds the folder must know."""
    quality, speed = found["quality"], found["milliseconds"]
    needs = "numpy and tokenizers" + ("" if found["kind"] == "static" else " and onnxruntime")
    lines = [
        f"# {found['source']['name']} at width {found['width']}, {found['code']}",
        "",
        f"Unit vectors of the first {found['width']} of {found['full_width']} dimensions. Needs {needs}:",
        "",
        "```",
        'python embed.py "a query" texts.txt',
        "```",
        "",
        "| measured | |",
        "|---|---|",
        f"| size | {found['bytes'] / 1e6:.2f} MB |",
        f"| processor time a text, on {speed['processor']} | {speed['a_text']:.3f} ms, mean of {speed['texts']} |",
        f"| cosine with the model's own prefix | {quality['cosine_mean']:.5f}, least {quality['cosine_least']:.5f} |",
    ]
    if "difference" in quality:
        lines.append(f"| largest difference of a number from it | {quality['difference']:.1e} |")
    if "neighbours_of_prefix" in quality:
        lines += [
            f"| 10 nearest neighbours kept, of the same width | {quality['neighbours_of_prefix']:.3f} |",
            f"| 10 nearest neighbours kept, of full width | {quality['neighbours_of_full_width']:.3f} |",
        ]
    for row in quality["evaluation_of_prefix"]:
        value = f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})" if "low" in row else f"{row['value']:.3f}"
        lines.append(f"| {row['metric']} on {row['task']}, this width before quantising | {value} |")
    given = f"{quality['texts']} given texts and {len(SAMPLE)} of our own" if quality["texts"] else "a few texts"
    return "\n".join([*lines, "", f"Cosines, differences and neighbours are measured on {given}; see `edge.json`.", ""])
