"""Predicts with an export, by NumPy, Pillow and ONNX Runtime alone: it needs neither torch nor mmsnnet.

Examples:
    python tools/deployment/ort_predict.py image.jpg DIR --out picture.png
    python tools/deployment/ort_predict.py image.jpg DIR --out picture.png --max-gflops 30
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

MOST_PIXELS = 100_000_000
# What a manifest has.
KEYS = (
    *("task", "format", "stitches", "image_size", "outputs", "preprocessing", "inference", "classes", "palette"),
    *("weights", "weights_digest", "metric", "higher"),
)
OPACITY = 0.6  # of classes over the image
# Boxes of lower scores are not drawn.
SHOWN_SCORE = 0.3


class Mistake(Exception):
    """A mistake of the user; the message is one line."""


# The choice of a stitch


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise Mistake(f"there is no {path}: give a folder that tools/deployment/export.py wrote") from None
    except ValueError as error:
        raise Mistake(f"{path} cannot be read ({error}): export again") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export, whose files are there and unchanged."""
    path = folder / "manifest.json"
    manifest = read_json(path)
    known = isinstance(manifest, dict) and manifest.get("schema") == 1 and all(key in manifest for key in KEYS)
    files = [stitch.get("file") for stitch in manifest["stitches"] if isinstance(stitch, dict)] if known else []
    if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise Mistake(f"{path} is no manifest of an export of schema 1: export again")
    if manifest["format"] != "onnx":
        raise Mistake(f"{folder} has programs of {manifest['format']}: export with --format onnx")
    digest = hashlib.blake2b(digest_size=16)
    try:
        with (folder / Path(manifest["weights"]).name).open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    except OSError:
        raise Mistake(f"{folder} lacks {manifest['weights']}, which its manifest names: export again") from None
    if digest.hexdigest() != manifest["weights_digest"]:
        raise Mistake(f"{folder / manifest['weights']} is not the file that was exported: export again")
    return manifest


def choose(folder: Path, manifest: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The stitch by name, or the best within the budget; by default the last, which is the costliest."""
    stitches = {stitch["name"]: stitch for stitch in manifest["stitches"]}
    if args.stitch is not None:
        for stitch in stitches.values():
            if args.stitch in (stitch["name"], str(stitch["id"])):
                return stitch
        raise Mistake(f"the export has no stitch {args.stitch!r}; it has {', '.join(stitches)}")
    if args.max_gflops is None and args.max_latency_ms is None:
        return max(stitches.values(), key=lambda stitch: stitch["flops"])
    if args.max_gflops is not None:
        unit, budget = "GFLOPs", args.max_gflops
        costs = {name: stitch["flops"] / 1e9 for name, stitch in stitches.items()}
    else:
        unit, budget = "ms", args.max_latency_ms
        front = read_json(folder / "front.json")
        if not isinstance(front, dict) or front.get("benchmark", {}).get("backend") != "onnxruntime":
            raise Mistake(
                f"{folder / 'front.json'} has no latencies of ONNX Runtime: tools/analysis_tools/benchmark.py "
                f"{folder / 'config.py'} --backend onnx {folder} --out {folder / 'front.json'} measures them"
            )
        timed = {point["name"]: point.get("latency_ms") for point in front["stitches"]}
        costs = {name: timed[name] for name in stitches if timed.get(name) is not None}
    if not budget > 0:
        raise Mistake(f"a budget is a positive number of {unit}, got {budget:g}")
    within = [name for name, cost in costs.items() if cost <= budget]
    if not within:
        least = min(costs.values(), default=math.nan)
        raise Mistake(f"a budget of {budget:g} {unit} is below the cheapest stitch, which needs {least:g} {unit}")
    return stitches[best_of(within, stitches, manifest)]


def best_of(names: list[str], stitches: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The stitch with the best metric, and the cheapest of equal ones; without metrics, the costliest."""
    qualities = {name: stitches[name]["metrics"].get(manifest["metric"]) for name in names}
    if all(value is None for value in qualities.values()):
        return max(names, key=lambda name: stitches[name]["flops"])
    sign = 1 if manifest["higher"] else -1
    measured = [name for name in names if qualities[name] is not None]
    return max(measured, key=lambda name: (sign * qualities[name], -stitches[name]["flops"]))


# Pictures to inputs


def read_image(path: Path) -> np.ndarray:
    """An image as (H, W, 3), red first, rotated by its EXIF orientation; of an animation, the first frame."""
    Image.MAX_IMAGE_PIXELS = None  # checked below
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Mistake(f"{path} has {image.width} x {image.height} pixels; at most {MOST_PIXELS} are read")
            if image.mode.startswith(("I", "F")):
                raise Mistake(f"{path} has more than 8 bits, whose white is not known: convert it to 8 bits")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise Mistake(f"there is no image {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise Mistake(f"{path} is no image that can be decoded ({error})") from None


def bilinear(
    image: np.ndarray, height: int, width: int, rows: slice = slice(None), align_corners: bool = False
) -> np.ndarray:
    """Resize (H, W, C) without antialiasing, as OpenCV does; return some ``rows`` of the result."""
    if image.shape[:2] == (height, width):
        return image[rows].astype(np.float32)

    def places(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        where = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        if align_corners:
            where = np.arange(new) * (old - 1) / max(new - 1, 1)
        first = np.floor(where).astype(int)
        return first, np.minimum(first + 1, old - 1), (where - first).astype(np.float32)

    top, bottom, down = (place[rows] for place in places(image.shape[0], height))
    left, right, across = places(image.shape[1], width)
    down, across = down[:, None, None], across[None, :, None]
    lines = image[top].astype(np.float32) * (1 - down) + image[bottom].astype(np.float32) * down
    return lines[:, left] * (1 - across) + lines[:, right] * across


def prepare(image: np.ndarray, steps: dict[str, Any]) -> np.ndarray:
    """The resized, cropped and normalised picture (1, C, H, W)."""
    if steps["others"]:
        raise Mistake(f"the test pipeline has {', '.join(steps['others'])}, which needs the toolbox: use Predictor")
    if not isinstance(steps["channels"], str):
        raise Mistake(f"the model takes images of {steps['channels']} bands, which need the toolbox: use Predictor")
    resize = steps["resize"] or {}
    height, width = image.shape[:2]
    if "short_side" in resize:  # timm's, by Pillow with antialiasing
        short = resize["short_side"]
        size = [
            short if side == min(height, width) else int(short * side / min(width, height)) for side in (width, height)
        ]
        filters = dict(bilinear=Image.Resampling.BILINEAR, bicubic=Image.Resampling.BICUBIC)
        image = np.asarray(Image.fromarray(image).resize(size, filters[steps["interpolation"]]))
        crop = steps["crop"]
        top, left = (round((side - crop) / 2) for side in image.shape[:2])
        image = image[top : top + crop, left : left + crop]
    elif resize:
        long, short = max(resize["scale"]), min(resize["scale"])
        if resize["keep_ratio"]:
            factor = min(long / max(height, width), short / min(height, width))
            height, width = int(height * factor + 0.5), int(width * factor + 0.5)
        else:
            width, height = resize["scale"]
        image = np.rint(bilinear(image, height, width))
    values = image.astype(np.float32)
    if steps["channels"] == "bgr":
        values = values[..., ::-1]
    values = (values - np.float32(steps["mean"])) / np.float32(steps["std"])
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


# Graphs on inputs


class Graph:
    """An exported stitch, and the windows of slide inference around it."""

    def __init__(self, folder: Path, manifest: dict[str, Any], stitch: dict[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, too
        threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
        options.intra_op_num_threads = int(threads) if threads.isdigit() else 0  # 0: all cores
        try:
            self.session = onnxruntime.InferenceSession(
                folder / stitch["file"],
                options,
                ["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"],
            )
        except Exception as error:  # ONNX Runtime's errors have no common class
            reason = str(error).splitlines()[0][:200]
            raise Mistake(f"{folder / stitch['file']} cannot be loaded ({reason}): export again") from None
        self.size = manifest["image_size"]
        self.inference = manifest["inference"]

    def run(self, images: np.ndarray, names: list[str]) -> list[np.ndarray]:
        return self.session.run(names, {"images": images})

    def maps(self, images: np.ndarray, name: str) -> np.ndarray:
        """An output (1, K, H, W) of a whole picture."""
        height, width = images.shape[-2:]
        if self.inference.get("mode") in ("slide", "slide_flip"):
            return self._slide(images, name)
        if self.size is None or list(self.size) == [height, width]:
            return self.run(images, [name])[0]
        raise Mistake(
            f"the picture is {height} x {width} after resizing, and the graph takes {self.size[0]} x {self.size[1]}: "
            "export with --dynamic-size, or with --size"
        )

    def _slide(self, images: np.ndarray, name: str) -> np.ndarray:
        """The mean over overlapping windows, placed as mmseg places them."""
        (tall, broad), (down, across) = self.inference["crop_size"], self.inference["stride"]
        height, width = images.shape[-2:]
        total, count = None, np.zeros((1, 1, height, width), np.float32)
        for row in range(max(height - tall + down - 1, 0) // down + 1):
            for column in range(max(width - broad + across - 1, 0) // across + 1):
                bottom, right = min(row * down + tall, height), min(column * across + broad, width)
                top, left = max(bottom - tall, 0), max(right - broad, 0)
                window = images[:, :, top:bottom, left:right]
                missing = [(0, 0), (0, 0), (0, tall - window.shape[2]), (0, broad - window.shape[3])]
                result = self._window(window, missing, name)
                if self.inference["mode"] == "slide_flip":
                    flipped = self._window(window[..., ::-1], missing, name)
                    result = (result + flipped[..., ::-1]) / 2
                if total is None:
                    total = np.zeros((1, result.shape[1], height, width), np.float32)
                total[:, :, top:bottom, left:right] += result
                count[:, :, top:bottom, left:right] += 1
        assert total is not None
        return total / count

    def _window(self, window: np.ndarray, missing: list[tuple[int, int]], name: str) -> np.ndarray:
        padded = np.pad(window, missing) if any(map(any, missing)) else np.ascontiguousarray(window)
        return self.run(padded, [name])[0][:, :, : window.shape[2], : window.shape[3]]


# Results to pictures


def colours(manifest: dict[str, Any], number: int) -> np.ndarray:
    """A colour (R, G, B) for each class."""
    palette = manifest["palette"] or np.random.default_rng(0).integers(0, 256, (number, 3))
    return np.asarray(palette, np.float32)


def segmentation(graph: Graph, image: np.ndarray, manifest: dict[str, Any]) -> tuple[np.ndarray, str]:
    logits = graph.maps(prepare(image, manifest["preprocessing"]), "logits")[0].transpose(1, 2, 0)
    (height, width), inference = image.shape[:2], manifest["inference"]

    def classes_of(rows: slice) -> np.ndarray:  # of some rows: many classes take much memory
        resized = bilinear(logits, height, width, rows, inference.get("align_corners", False))
        if "threshold" in inference:  # one channel for two classes
            return (resized[..., 0] > math.log(inference["threshold"] / (1 - inference["threshold"]))).astype(int)
        return resized.argmax(-1)

    labels = np.concatenate([classes_of(slice(row, row + 64)) for row in range(0, height, 64)])
    number = max(logits.shape[-1], 2)
    shares = np.bincount(labels.ravel(), minlength=number) / labels.size
    names = manifest["classes"] or [str(index) for index in range(number)]
    found = [f"{names[index]} {shares[index]:.0%}" for index in np.argsort(-shares)[:5] if shares[index] >= 0.005]
    return (1 - OPACITY) * image + OPACITY * colours(manifest, number)[labels], ", ".join(found)


def depth(graph: Graph, image: np.ndarray, manifest: dict[str, Any]) -> tuple[np.ndarray, str]:
    depths = graph.maps(prepare(image, manifest["preprocessing"]), "depth")[0].transpose(1, 2, 0)
    align_corners = manifest["inference"].get("align_corners", False)
    depths = bilinear(depths, *image.shape[:2], align_corners=align_corners)[..., 0]
    nearness = 1 - (depths - depths.min()) / max(float(np.ptp(depths)), 1e-6)
    stops = np.float32([[0, 0, 64], [80, 0, 160], [220, 60, 60], [255, 230, 120]])  # dark to bright
    places = nearness * (len(stops) - 1)
    lower = np.minimum(places.astype(int), len(stops) - 2)
    picture = stops[lower] + (places - lower)[..., None] * (stops[lower + 1] - stops[lower])
    return picture, f"depth from {depths.min():.3g} to {depths.max():.3g}"


def classification(graph: Graph, image: np.ndarray, manifest: dict[str, Any]) -> tuple[np.ndarray, str]:
    [logits] = graph.run(prepare(image, manifest["preprocessing"]), ["logits"])
    shares = np.exp(logits[0] - logits[0].max())
    shares /= shares.sum()
    names = manifest["classes"] or [str(index) for index in range(len(shares))]
    lines = [f"{names[index]} {shares[index]:.1%}" for index in np.argsort(-shares)[:5]]
    picture = Image.fromarray(image)
    ImageDraw.Draw(picture).text((4, 4), "\n".join(lines), fill="white", stroke_width=2, stroke_fill="black")
    return np.asarray(picture), ", ".join(lines)


def detection(graph: Graph, image: np.ndarray, manifest: dict[str, Any]) -> tuple[np.ndarray, str]:
    if "boxes" not in manifest["outputs"]:
        raise Mistake("this export ends before RoIAlign, which needs mmdet: tools/test.py --backend onnx, or Predictor")
    images = prepare(image, manifest["preprocessing"])
    height, width = images.shape[-2:]
    if graph.size is not None:
        if height > graph.size[0] or width > graph.size[1]:
            raise Mistake(
                f"the picture is {height} x {width} after resizing, more than the graph's {graph.size[0]} x "
                f"{graph.size[1]}: export with --size"
            )
        images = np.pad(images, [(0, 0), (0, 0), (0, graph.size[0] - height), (0, graph.size[1] - width)])
    boxes, scores = (array[0] for array in graph.run(images, ["boxes", "scores"]))
    labels, best = scores.argmax(-1), scores.max(-1)
    inference = manifest["inference"]
    order = [index for index in np.argsort(-best)[:1000] if best[index] >= SHOWN_SCORE]
    kept: list[int] = []
    for index in order:
        rivals = [other for other in kept if labels[other] == labels[index]]
        if all(overlap(boxes[index], boxes[other]) < inference["iou_threshold"] for other in rivals):
            kept.append(index)
    scale = np.array([image.shape[1] / width, image.shape[0] / height] * 2)
    picture = Image.fromarray(image)
    draw, palette = ImageDraw.Draw(picture), colours(manifest, scores.shape[-1]).astype(int)
    names = manifest["classes"] or [str(index) for index in range(scores.shape[-1])]
    for index in kept[: inference["most_boxes"]]:
        left, top, right, bottom = np.clip(boxes[index] * scale, 0, [*image.shape[1::-1]] * 2)
        color = tuple(palette[labels[index]])
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=color, width=2)
        text = f"{names[labels[index]]} {best[index]:.2f}"
        draw.text((left + 2, top + 2), text, fill=color, stroke_width=1, stroke_fill="black")
    return np.asarray(picture), f"{len(kept)} boxes"


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    areas = [float(np.prod(np.maximum(box[2:] - box[:2], 0))) for box in (one, other)]
    return shared / max(sum(areas) - shared, 1e-9)


TASKS = dict(segmentation=segmentation, depth=depth, classification=classification, detection=detection)


def predict(args: argparse.Namespace) -> None:
    manifest = read_manifest(args.folder)
    stitch = choose(args.folder, manifest, args)
    image = read_image(args.image)
    graph = Graph(args.folder, manifest, stitch)
    start = time.perf_counter()
    picture, text = TASKS[manifest["task"]](graph, image, manifest)
    seconds = time.perf_counter() - start
    try:
        temporary = args.out.with_name(f".{os.getpid()}-{args.out.name}")  # an old picture stays if there is no room
        try:
            Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8)).save(temporary)
            temporary.replace(args.out)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise Mistake(f"--out {args.out} cannot be written ({error})") from None
    print(f"{args.out}: stitch {stitch['name']}, {stitch['flops'] / 1e9:.3g} GFLOPs, {1000 * seconds:.0f} ms: {text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that tools/deployment/export.py wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="PICTURE", help="the picture to write")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--stitch", help="id or name (default: the costliest)")
    choice.add_argument("--max-gflops", type=float, metavar="X", help="the best stitch of at most X GFLOPs")
    choice.add_argument("--max-latency-ms", type=float, metavar="X", help="the best stitch of at most X ms")
    try:
        predict(parser.parse_args())
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
