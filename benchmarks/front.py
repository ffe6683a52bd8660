"""Compare training recipes by the fronts that they give, at equal training cost.

Every figure comes from the ordinary tools: the anchors are trained alone first, each recipe then trains the stitched
model from them, and tools/test.py evaluates all stitches. All recipes of a regime get the same training cost: FLOPs of
all forward and backward passes (a backward pass counts as two forward passes), heads, teachers and the second stage of
the initialisation included. The number of iterations follows from it. Finished runs are kept in a JSON file, which
belongs to the repository; a second call goes on with what is missing.

    python benchmarks/front.py run [--regime shapes] [--recipes R,R,...] [--seeds 0,1,2] [--jobs 2] [--quick]
    python benchmarks/front.py report [--regime shapes] [--recipes R,R,...] [--picture FILE.png]
"""

import copy
import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from front_arguments import command_line  # noqa: E402
from front_costs import all_stitches, spending, spent  # noqa: E402
from front_figures import report  # noqa: E402
from front_files import load, store  # noqa: E402
from front_recipes import RECIPES, REGIMES, Regime, lacking, quick  # noqa: E402
from mmengine.config import Config  # noqa: E402

from mmsnnet.apis import load_config  # noqa: E402
from mmsnnet.datasets import write_shapes  # noqa: E402
from mmsnnet.evaluation import OperatingPoints  # noqa: E402
from mmsnnet.files.writing import write_atomically  # noqa: E402

RESULTS = Path(__file__).parent / "front_results"

# Settings


def schedule(iterations: int, seed: int, regime: Regime) -> dict[str, Any]:
    """The schedule of a run: warm-up over a tenth, cosine to the end, one checkpoint."""
    warm_up = max(1, iterations // 10)
    return dict(
        data_root=regime.data,
        randomness=dict(seed=seed),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.01, begin=0, end=warm_up, by_epoch=False),
            dict(
                type="CosineAnnealingLR",
                eta_min=1e-6,
                begin=warm_up,
                end=max(iterations, warm_up + 1),
                T_max=max(iterations - warm_up, 1),
                by_epoch=False,
            ),
        ],
        train_cfg=dict(max_iters=iterations, val_begin=iterations + 1),  # no validation
        default_hooks=dict(checkpoint=dict(interval=iterations, max_keep_ckpts=1)),
        train_dataloader=dict(num_workers=0, persistent_workers=False),
        val_dataloader=dict(num_workers=0, persistent_workers=False),
        test_dataloader=dict(num_workers=0, persistent_workers=False),
    )


class Run:
    """One recipe with one seed.

    Args:
        regime: anchors and data.
        recipe: a key of :data:`RECIPES`.
        seed: of the heads that start from nothing, of data order and of draws.
        folder: of all runs.
    """

    def __init__(self, regime: Regime, recipe: str, seed: int, folder: Path) -> None:
        self.regime, self.name, self.seed = regime, recipe, seed
        self.recipe = RECIPES[recipe]
        self.work = folder
        self.anchors = folder / (regime.anchors_of or regime.name) / "anchors"
        self.root = folder / regime.name / f"seed{seed}"
        self.folder = self.root / recipe

    def of(self, recipe: str) -> "Run":
        """Another recipe with the same seed."""
        return Run(self.regime, recipe, self.seed, self.work)

    def anchor_folder(self, letter: str, round_: int = -1) -> Path:
        """The work folder of a round of an anchor's training, by default the last."""
        number = range(len(self.regime.anchors[letter][1]))[round_]
        return self.anchors / f"{letter}{number + 1 if number else ''}"

    def anchor_checkpoint(self, letter: str, round_: int = -1) -> Path:
        return self.anchor_folder(letter, round_) / f"iter_{self.regime.anchors[letter][1][round_]}.pth"

    def train_anchor(self, letter: str) -> None:
        """Train an anchor from random weights, unless its checkpoint is there."""
        base, rounds = self.regime.anchors[letter]
        for number, iterations in enumerate(rounds):
            changes = schedule(iterations, self.regime.anchor_seed + number, self.regime)
            changes["default_hooks"]["checkpoint"]["interval"] = -(-iterations // 6)
            sources = [str(self.anchor_checkpoint(letter, number - 1))] if number else []
            changes["model"] = self.model(load_config(REPOSITORY / "configs" / base), letter, sources)
            folder = self.anchor_folder(letter, number)
            config = write_config(folder.with_suffix(".py"), REPOSITORY / "configs" / base, changes)
            if not self.anchor_checkpoint(letter, number).exists():
                tool("train.py", config, "--work-dir", folder, "--resume")

    def model(self, config: Config, letters: str, sources: Sequence[str]) -> dict[str, Any]:
        """The settings of a model with the regime's widths, and the anchors' checkpoints, if any.

        Heads start from the checkpoint of the largest anchor.
        """
        anchors = [dict(anchor) for anchor in config.model.backbone.anchors]
        for anchor, letter in zip(anchors, letters, strict=True):
            anchor["embed_dim"] = self.regime.widths.get(letter, anchor["embed_dim"])
        head = dict(in_channels=anchors[-1]["embed_dim"])
        model = dict(backbone=dict(anchors=anchors), decode_head=head, auxiliary_head=head)
        if sources:
            for anchor, source in zip(anchors, sources, strict=True):
                anchor["pretrained"] = source
            for name in ("decode_head", "auxiliary_head"):
                model[name] = head | dict(init_cfg=dict(type="Pretrained", checkpoint=sources[-1], prefix=f"{name}."))
        return model

    def config(self, iterations: int = 1, folder: str = "") -> Path:
        """Write the config of the recipe, below ``folder``."""
        recipe, path = self.recipe, self.root / folder / f"{self.name}.py"
        if recipe.polish:
            return write_config(path, self.extracted(), self.polishing(iterations))
        alone = len(recipe.anchors) == 1
        name = self.regime.anchors[recipe.anchors][0] if alone else self.regime.stitched[recipe.anchors]
        base = REPOSITORY / "configs" / name
        settings = Config(schedule(iterations, self.seed, self.regime))
        original = load_config(base)
        sources = [str(self.anchor_checkpoint(letter)) for letter in recipe.anchors]
        settings.merge_from_dict(dict(model=self.model(original, recipe.anchors, sources)))
        settings.merge_from_dict(dict(model=dict(backbone=dict(seed=self.seed))))
        # An anchor alone goes on at the rate that it has inside the stitched model.
        settings.merge_from_dict(dict(optim_wrapper=dict(paramwise_cfg=dict(anchor_lr_mult=0.1))))
        hooks = [hook for hook in original.custom_hooks if hook["type"] != "mmsnnet.StitchInitHook"]
        init = dict(type="mmsnnet.StitchInitHook", num_images=50, batch_size=8, seed=self.seed)
        hooks.insert(0, init | (dict(refine=dict(steps=self.regime.refine_steps)) if recipe.refine else {}))
        if recipe.narrow is not None:
            hooks.append(dict(type="mmsnnet.NarrowDrawsHook", within=recipe.narrow))
            # On training images, so that the evaluation is independent.
            images = dict(data_prefix={**original.train_dataloader.dataset.data_prefix})
            images["indices"] = self.regime.narrowing_images
            times = dict(val_begin=1, val_interval=iterations // 3 + 1)
            validation = dict(val_dataloader=dict(dataset=images), val_cfg=dict(stitches="all"), train_cfg=times)
            settings.merge_from_dict(validation)
        settings.merge_from_dict(dict(custom_hooks=hooks))
        if not recipe.trains:  # one iteration, which changes neither weights nor the statistics of batch norms
            settings.merge_from_dict(dict(optim_wrapper=dict(optimizer=dict(lr=0.0, weight_decay=0.0))))
            still = dict(norm_cfg=dict(type="BN", requires_grad=True, momentum=0.0))
            settings.merge_from_dict(dict(model=dict(decode_head=still, auxiliary_head=still)))
        settings.merge_from_dict(copy.deepcopy(dict(recipe.changes)))
        if settings.train_cfg.get("distill", {}).get("teacher") == "L":
            settings.train_cfg.distill.teacher = dict(
                config=str(self.anchor_folder("l").with_suffix(".py")), checkpoint=str(self.anchor_checkpoint("l"))
            )
        return write_config(path, base, settings.to_dict())

    def extracted(self) -> Path:
        """The config of the extracted stitch to polish."""
        folder, whole = self.root / f"{self.name}_extracted", self.of(self.recipe.weights_of)
        if not folder.exists():
            config, checkpoint = whole.trained()
            tool("deployment/extract_stitch.py", config, checkpoint, self.recipe.polish, "--out", folder)
        return folder / "config.py"

    def polishing(self, iterations: int) -> dict[str, Any]:
        """What a user adds to the config of an extracted stitch."""
        config, checkpoint = self.of(self.recipe.weights_of).trained()
        settings = schedule(iterations, self.seed, self.regime)
        settings["load_from"] = str(self.extracted().parent)
        settings["train_cfg"]["distill"] = dict(outputs=1.0, teacher=dict(config=str(config), checkpoint=checkpoint))
        return settings

    def settings(self) -> Config:
        """The config for counting costs; that of a run stays as it is."""
        return load_config(self.config(folder="costs"))

    def iterations(self) -> tuple[int, float]:
        """The number of iterations that the budget pays, and the whole cost for one image, in FLOPs.

        Raises:
            ValueError: the budget pays no iteration.
        """
        beside, steps = spending(self.settings(), self.regime)
        if self.name == "published":
            return self.regime.iterations, beside + sum(next(steps) for _ in range(self.regime.iterations))
        if not self.recipe.trains:
            return 1, beside
        budget = self.of("published").iterations()[1] * self.recipe.budget
        number, paid = 0, beside
        for step in steps:
            if paid + step > budget:
                break
            number, paid = number + 1, paid + step
        if not number:
            raise ValueError(
                f"{self.name}: refinement or validation costs {beside / budget:.1f} of the budget and leaves no "
                "iteration: lower refine_steps or narrowing_images of the regime"
            )
        return number, paid

    def trained(self) -> tuple[Path, str]:
        """The config and the checkpoint of a run; trains what is not there."""
        iterations, _ = self.iterations()
        config, checkpoint = self.config(iterations), str(self.folder / f"iter_{iterations}.pth")
        if not Path(checkpoint).exists():
            tool("train.py", config, "--work-dir", self.folder, "--resume")
        return config, checkpoint

    def run(self) -> dict[str, Any]:
        """Train and evaluate; returns the entry of the results."""
        start, other = time.monotonic(), self.recipe.weights_of
        source = self.of(other) if other and not self.recipe.polish else self
        (config, checkpoint), (iterations, cost) = source.trained(), source.iterations()
        if self.recipe.narrow is not None:
            cost = spent(self.settings(), self.regime, self.folder, iterations)
        if self.recipe.polish:
            cost += self.of(other).iterations()[1]
        trained, points_file = time.monotonic(), self.folder / "points.json"
        arguments = ["--out", points_file, "--work-dir", self.folder / "test"]
        if self.recipe.recalibrates:
            arguments += ["--recalibrate", self.regime.recalibration_images]
            cost += all_stitches(self.settings(), self.regime.recalibration_images)
        tool("test.py", config, checkpoint, *arguments)
        return dict(
            recipe=self.name,
            seed=self.seed,
            iterations=iterations,
            training_tflops_per_image=round(cost / 1e12, 4),
            training_seconds=round(trained - start),
            points=[
                dict(name=p.name, kind=p.kind, gflops=round(p.flops / 1e9, 6), quality=round(p.metric("mIoU"), 3))
                for p in OperatingPoints.load(points_file)
            ],
        )


def write_config(path: Path, base: Path, changes: Mapping[str, Any]) -> Path:
    """Write a config that changes another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"_base_ = {os.path.relpath(base, path.parent)!r}\n" + Config(dict(changes)).pretty_text
    write_atomically(path, text.encode())
    return path


def tool(name: str, *arguments: object) -> None:
    """Run one of the tools on one thread.

    Raises:
        RuntimeError: it has failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


# Results


def fingerprint(run: Run) -> str:
    """A digest of the recipe and the regime."""
    return hashlib.blake2b(repr((run.regime, run.recipe)).encode(), digest_size=6).hexdigest()


def check_settings(results: Mapping[str, Any], regime: Regime, folder: Path, out: Path) -> None:
    """Check that kept runs had the settings that their recipes have now. Runs of recipes that are gone stay.

    Raises:
        SystemExit: one had others.
    """
    for entry in results["runs"]:
        if entry["recipe"] not in RECIPES:
            continue
        if entry["settings"] != fingerprint(Run(regime, entry["recipe"], entry["seed"], folder)):
            raise SystemExit(
                f"{out}: {entry['recipe']} with seed {entry['seed']} ran with other settings of recipe or regime: "
                "delete this run, and its folder, or take another --out and --folder"
            )


def anchor_quality(run: Run, letter: str) -> float:
    """The mIoU of an anchor alone, before any stitching."""
    folder = run.anchor_folder(letter)
    points = folder / "points.json"
    if not points.exists():
        tool(
            "test.py",
            folder.with_suffix(".py"),
            run.anchor_checkpoint(letter),
            "--out",
            points,
            "--work-dir",
            folder / "test",
        )
    return round(next(iter(OperatingPoints.load(points))).metric("mIoU"), 3)


def run_grid(regime: Regime, recipes: Sequence[str], seeds: Sequence[int], jobs: int, folder: Path, out: Path) -> None:
    """Train and evaluate what the results lack."""
    if not regime.images and not Path(regime.data).is_dir():
        raise SystemExit(
            f"{Path(regime.data).absolute()}: no such folder: the regime {regime.name!r} reads its data there"
        )
    if regime.images and not Path(regime.data).exists():
        train, val = regime.images
        write_shapes(regime.data, regime.layout, train=train, val=val, size=regime.size, seed=0)
    results = load(out)
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, one thread a run, {date.today()}"
    sizes = ("anchors", "widths", "iterations", "images")
    results["regime"] = {name: getattr(regime, name) for name in sizes}
    check_settings(results, regime, folder, out)
    some = Run(regime, "published", seeds[0], folder)
    used = {letter for name in recipes for letter in "sl" + RECIPES[name].anchors}
    letters = [letter for letter in reversed(regime.anchors) if letter in used]  # the longest first
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(some.train_anchor, letters))
        qualities = pool.map(lambda letter: anchor_quality(some, letter), letters)
        measured = dict(zip(letters, qualities, strict=True))
        if any(results["anchors"].get(letter, quality) != quality for letter, quality in measured.items()):
            raise SystemExit(
                f"{out}: its runs started from anchors of {results['anchors']}, and this machine has others, of "
                f"{measured}: take another --out"
            )
        results["anchors"] |= measured
        store(out, results)
        lock = Lock()
        done = {(entry["recipe"], entry["seed"]) for entry in results["runs"]}
        waiting = [Run(regime, name, seed, folder) for seed in seeds for name in recipes if (name, seed) not in done]

        def finish(run: Run) -> None:
            entry = run.run() | dict(settings=fingerprint(run))
            with lock:
                results["runs"].append(entry)
                store(out, results)
            print(f"{regime.name}, seed {run.seed}, {run.name}: {entry['training_seconds']} s", flush=True)

        # Recipes that use the weights of others come after them.
        for derived in (False, True):
            list(pool.map(finish, [run for run in waiting if bool(run.recipe.weights_of) == derived]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    args = parser.parse_args(arguments)
    regime = quick(REGIMES[args.regime]) if args.quick else REGIMES[args.regime]
    out = args.out or RESULTS / f"{regime.name}.json"
    kept = load(out)["runs"]
    if args.action == "report" and not kept:
        reason = "no runs in this file" if out.exists() else "no such file"
        raise SystemExit(f"{out}: {reason}: use the action run first, or name another file with --out")
    known = dict.fromkeys((*RECIPES, *(entry["recipe"] for entry in kept if args.action == "report")))
    if unknown := [name for name in args.recipes or () if name not in known]:
        parser.error(f"no recipe {unknown[0]!r}; there are {', '.join(known)}")
    if args.action == "run":
        recipes = args.recipes or [name for name in RECIPES if lacking(name, regime) is None]
        for name in recipes:
            if lack := lacking(name, regime):
                parser.error(f"the recipe {name!r} cannot run in the regime {args.regime!r}, which has {lack}")
        run_grid(regime, recipes, args.seeds, args.jobs, args.folder, out)
    results = load(out)
    if args.action == "report" and args.recipes:
        results["runs"] = [entry for entry in kept if entry["recipe"] in args.recipes]
        if not results["runs"]:
            there = ", ".join(dict.fromkeys(entry["recipe"] for entry in kept))
            raise SystemExit(f"{out}: no runs of {', '.join(args.recipes)}: name some of {there} with --recipes")
    order = list(dict.fromkeys((*RECIPES, *(entry["recipe"] for entry in results["runs"]))))
    results["runs"].sort(key=lambda entry: (order.index(entry["recipe"]), entry["seed"]))
    print(report(results, args.picture))


if __name__ == "__main__":
    main()
