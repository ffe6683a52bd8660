"""Compare training recipes by the fronts that they give, at equal training cost.

Every figure comes from the ordinary tools: the anchors are trained alone first, each recipe then trains the stitched
model from them, and tools/test.py evaluates all stitches. All recipes of a regime get the same training cost: FLOPs of
all forward and backward passes (a backward pass counts as two forward passes), heads, teachers and the second stage of
the initialisation included. The number of iterations follows from it. Finished runs are kept in a JSON file, which
belongs to the repository; a second call goes on with what is missing.

    python benchmarks/front.py run [--regime shapes] [--recipes R,R,...] [--seeds 0,1,2] [--jobs 2] [--quick]
    python benchmarks/front.py report [--regime shapes] [--picture FILE.png]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from itertools import accumulate, count
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from front_figures import report  # noqa: E402
from mmengine.config import Config  # noqa: E402

from mmsnnet.apis import build_uninitialized, load_config  # noqa: E402
from mmsnnet.datasets import write_shapes  # noqa: E402
from mmsnnet.evaluation import OperatingPoints  # noqa: E402
from mmsnnet.files.writing import write_atomically  # noqa: E402
from mmsnnet.models import find_stitched_backbone, model_costs  # noqa: E402

RESULTS = Path(__file__).parent / "front_results"
IN_PLACE = dict(stitches_per_step=3)
# What a recipe changes in the stitched config. Recipes with "anchor" train that anchor alone.
RECIPES: dict[str, dict[str, Any]] = {
    "published": {},
    "equal-rates": dict(optim_wrapper=dict(paramwise_cfg=dict(anchor_lr_mult=1.0))),
    "three-stitches": dict(train_cfg=IN_PLACE),
    "in-place-outputs": dict(train_cfg=IN_PLACE | dict(distill=dict(outputs=1.0))),
    "in-place-features": dict(train_cfg=IN_PLACE | dict(distill=dict(features=1.0))),
    "teacher": dict(train_cfg=dict(distill=dict(outputs=1.0, teacher="L"))),
    "teacher-features": dict(train_cfg=dict(distill=dict(outputs=1.0, features=1.0, teacher="L"))),
    "refined": dict(refine=True),
    "no-lsl": dict(model=dict(backbone=dict(draw_from=dict(kinds=["S", "L", "SL", "LS", "SLS"])))),
    "one-crossing": dict(model=dict(backbone=dict(draw_from=dict(max_crossings=1)))),
    "teacher-refined": dict(train_cfg=dict(distill=dict(outputs=1.0, teacher="L")), refine=True),
    "alone-s": dict(anchor="s"),
    "alone-l": dict(anchor="l"),
}


@dataclass(frozen=True)
class Regime:
    """Anchors, data and the size of a comparison.

    Attributes:
        configs: the small anchor, the large anchor, and the stitched model, under configs/.
        anchor_iterations: of the small and the large anchor, from random weights.
        iterations: of the recipe "published"; its cost is the budget of all recipes.
        images: the numbers of procedural images to train on and to validate on; None for a real data set.
        data: the folder of the data.
        refine_steps: of the second stage of the initialisation.
    """

    name: str
    configs: tuple[str, str, str]
    anchor_iterations: tuple[int, int]
    iterations: int
    images: tuple[int, int] | None
    data: str
    refine_steps: int = 300


REGIMES = {
    "shapes": Regime(
        "shapes",
        (
            "quickstart/vit-s_setr_shapes-64x64.py",
            "quickstart/vit-l_setr_shapes-64x64.py",
            "quickstart/stitched-vit-s-l_setr_shapes-64x64.py",
        ),
        anchor_iterations=(4000, 3000),
        iterations=1500,
        images=(6000, 1000),
        data="work_dirs/front/shapes_data",
    ),
    "camvid": Regime(
        "camvid",
        (
            "camvid/vit-s_setr_1k_camvid-256x256.py",
            "camvid/vit-l_setr_1k_camvid-256x256.py",
            "camvid/stitched-vit-s-l_setr_1k_camvid-256x256.py",
        ),
        anchor_iterations=(1000, 1000),
        iterations=600,
        images=None,
        data="data/camvid",
    ),
}


def quick(regime: Regime) -> Regime:
    """A comparison of minutes, whose figures mean nothing, to try the program."""
    return replace(
        regime,
        name=f"{regime.name}-quick",
        anchor_iterations=(20, 20),
        iterations=12,
        images=(64, 16),
        data=f"{regime.data}_quick",
        refine_steps=2,
    )


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
                end=iterations,
                T_max=iterations - warm_up,
                by_epoch=False,
            ),
        ],
        train_cfg=dict(max_iters=iterations, val_interval=iterations),
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
        seed: of weights, data order and draws; the anchors of a seed are shared by all recipes.
        folder: of all runs.
    """

    def __init__(self, regime: Regime, recipe: str, seed: int, folder: Path) -> None:
        self.regime, self.recipe, self.seed = regime, recipe, seed
        self.root = folder / regime.name / f"seed{seed}"
        self.folder = self.root / recipe

    def anchor_checkpoint(self, which: str) -> Path:
        iterations = self.regime.anchor_iterations["sl".index(which)]
        return self.root / f"anchor-{which}" / f"iter_{iterations}.pth"

    def write_config(self, name: str, base: str, changes: Mapping[str, Any]) -> Path:
        """Write a config that changes another one."""
        path = self.root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"_base_ = {str(REPOSITORY / 'configs' / base)!r}\n" + Config(dict(changes)).pretty_text
        write_atomically(path, text.encode())
        return path

    def train_anchor(self, which: str) -> None:
        """Train an anchor from random weights, unless its checkpoint is there."""
        place = "sl".index(which)
        if self.anchor_checkpoint(which).exists():
            return
        changes = schedule(self.regime.anchor_iterations[place], self.seed, self.regime)
        config = self.write_config(f"anchor-{which}", self.regime.configs[place], changes)
        tool("train.py", config, "--work-dir", self.root / f"anchor-{which}", "--resume")

    def config(self, iterations: int = 1) -> Path:
        """The config of the recipe."""
        changes = {**RECIPES[self.recipe]}
        which = changes.pop("anchor", None)
        heads = {
            head: dict(
                init_cfg=dict(
                    type="Pretrained", checkpoint=str(self.anchor_checkpoint(which or "l")), prefix=f"{head}."
                )
            )
            for head in ("decode_head", "auxiliary_head")
        }
        base = load_config(REPOSITORY / "configs" / self.regime.configs["sl".index(which) if which else 2])
        anchors = [dict(anchor) for anchor in base.model.backbone.anchors]
        for anchor, name in zip(anchors, which or "sl", strict=True):
            anchor["pretrained"] = str(self.anchor_checkpoint(name))
        settings = Config(schedule(iterations, self.seed, self.regime))
        settings.merge_from_dict(dict(model=dict(backbone=dict(anchors=anchors, seed=self.seed), **heads)))
        # The anchor alone goes on at the rate that it has inside the stitched model.
        settings.merge_from_dict(dict(optim_wrapper=dict(paramwise_cfg=dict(anchor_lr_mult=0.1))))
        if changes.pop("refine", False):
            init = dict(
                type="mmsnnet.StitchInitHook", num_images=50, batch_size=8, refine=dict(steps=self.regime.refine_steps)
            )
            hooks = [hook for hook in base.custom_hooks if hook["type"] != "mmsnnet.StitchInitHook"]
            settings.merge_from_dict(dict(custom_hooks=[init, *hooks]))
        settings.merge_from_dict(changes)
        if settings.train_cfg.get("distill", {}).get("teacher") == "L":
            teacher = str(self.root / "anchor-l.py")
            settings.train_cfg.distill.teacher = dict(config=teacher, checkpoint=str(self.anchor_checkpoint("l")))
        return self.write_config(
            self.recipe,
            self.regime.configs["sl".index(which) if which else 2],
            settings.to_dict(),
        )

    def iterations(self, budget: float | None) -> tuple[int, float]:
        """The number of iterations that ``budget`` pays, and their cost for one image, in FLOPs."""
        if budget is None:
            steps = costs(self.config(), self.regime)
            return self.regime.iterations, sum(next(steps) for _ in range(self.regime.iterations))
        totals = accumulate(costs(self.config(), self.regime))
        paid = 0.0
        for number, total in enumerate(totals):
            if total > budget:
                return number, paid
            paid = total
        raise AssertionError("costs never end")

    def run(self, budget: float) -> dict[str, Any]:
        """Train and evaluate; returns the entry of the results."""
        iterations, cost = self.iterations(budget)
        config, start = self.config(iterations), time.monotonic()
        checkpoint = self.folder / f"iter_{iterations}.pth"
        if not checkpoint.exists():
            tool("train.py", config, "--work-dir", self.folder, "--resume")
        trained = time.monotonic()
        points_file = self.folder / "points.json"
        tool("test.py", config, checkpoint, "--out", points_file, "--work-dir", self.folder / "test")
        points = OperatingPoints.load(points_file)
        return dict(
            recipe=self.recipe,
            seed=self.seed,
            iterations=iterations,
            training_tflops_per_image=round(cost / 1e12, 4),
            training_seconds=round(trained - start),
            points=[
                dict(name=p.name, kind=p.kind, gflops=round(p.flops / 1e9, 6), quality=round(p.metric("mIoU"), 3))
                for p in points
            ],
        )


def costs(config: Path, regime: Regime) -> Iterator[float]:
    """Yield the FLOPs of each training step for one image."""
    settings = load_config(config)
    model = build_uninitialized(settings)
    backbone = find_stitched_backbone(model)
    backbone.stitches_per_step = k = settings.train_cfg.get("stitches_per_step", 1)
    # The auxiliary head is like the decode head, and evaluation does not count it.
    some = backbone.space.stitches[0].id
    heads = 2 * (model_costs(model)[some].flops - backbone.costs()[some].flops)
    distill = settings.train_cfg.get("distill") or {}
    teacher = 0
    if distill.get("teacher"):
        frozen = build_uninitialized(load_config(distill["teacher"]["config"]))
        teacher = model_costs(frozen)[find_stitched_backbone(frozen).stitch.id].flops
    sampler, counted = backbone.sampler(), backbone.cost_model()
    for hook in settings.custom_hooks:
        if hook.get("refine"):  # targets of all anchors, and routes that share nothing
            mean = sum(cost.flops for cost in backbone.costs().values()) / len(backbone.space)
            anchors = sum(backbone.costs()[anchor.id].flops for anchor in backbone.space.anchors)
            share = hook["batch_size"] / settings.train_dataloader.batch_size
            yield hook["refine"]["steps"] * (anchors + 4 * 3 * mean) * share
    for step in count():
        stitches = [backbone.space[sampler.draw(number)] for number in range(step * k, (step + 1) * k)]
        yield 3 * (counted.tree(stitches, backbone.out_indices).flops + k * heads) + teacher


def tool(name: str, *arguments: object) -> None:
    """Run one of the tools on one thread.

    Raises:
        RuntimeError: it has failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments), "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


# Results


def load(path: Path) -> dict[str, Any]:
    """The results of a regime, or an empty table."""
    return json.loads(path.read_text()) if path.exists() else dict(anchors={}, runs=[])


def store(path: Path, results: Mapping[str, Any]) -> None:
    """Write results atomically, a run a line."""
    runs = ",\n    ".join(json.dumps(run) for run in results["runs"])
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({key: value for key, value in results.items() if key != "runs"}, indent=2)[:-2]
    write_atomically(path, f'{head},\n  "runs": [\n    {runs}\n  ]\n}}\n'.encode())


def anchor_quality(run: Run, which: str) -> float:
    """The mIoU of an anchor alone, before any stitching."""
    points = run.root / f"anchor-{which}" / "points.json"
    if not points.exists():
        tool("test.py", run.root / f"anchor-{which}.py", run.anchor_checkpoint(which), "--out", points)
    return round(next(iter(OperatingPoints.load(points))).metric("mIoU"), 3)


def run_grid(regime: Regime, recipes: Sequence[str], seeds: Sequence[int], jobs: int, folder: Path, out: Path) -> None:
    """Train and evaluate what the results lack."""
    if regime.images and not Path(regime.data).exists():
        train, val = regime.images
        write_shapes(regime.data, "shapes", train=train, val=val, size=(64, 64), seed=0)
    results = load(out)
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, one thread a run, {date.today()}"
    results["regime"] = dict(
        anchor_iterations=regime.anchor_iterations, iterations=regime.iterations, images=regime.images
    )
    with ThreadPoolExecutor(jobs) as pool:
        anchors = [(Run(regime, "published", seed, folder), which) for seed in seeds for which in "ls"]
        list(pool.map(lambda job: job[0].train_anchor(job[1]), anchors))
        for run, which in anchors:
            results["anchors"].setdefault(str(run.seed), {})[which] = anchor_quality(run, which)
        store(out, results)
        done = {(entry["recipe"], entry["seed"]) for entry in results["runs"]}
        waiting = [Run(regime, name, seed, folder) for seed in seeds for name in recipes if (name, seed) not in done]

        def finish(run: Run) -> None:
            budget = Run(regime, "published", run.seed, folder).iterations(None)[1]
            entry = run.run(budget)
            results["runs"].append(entry)  # appending is atomic
            store(out, results)
            print(f"{regime.name}, seed {run.seed}, {run.recipe}: {entry['training_seconds']} s", flush=True)

        list(pool.map(finish, waiting))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--regime", choices=REGIMES, default="shapes")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="names, separated by commas (default: all)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each on one thread")
    parser.add_argument("--quick", action="store_true", help="a comparison of minutes, without meaning")
    parser.add_argument("--folder", type=Path, default=Path("work_dirs/front"))
    parser.add_argument("--out", type=Path, help="the file of results (default: benchmarks/front_results/REGIME.json)")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    recipes = args.recipes.split(",")
    if unknown := [name for name in recipes if name not in RECIPES]:
        parser.error(f"no recipe {unknown[0]!r}; there are {', '.join(RECIPES)}")
    regime = quick(REGIMES[args.regime]) if args.quick else REGIMES[args.regime]
    out = args.out or RESULTS / f"{regime.name}.json"
    if args.action == "run":
        run_grid(regime, recipes, [int(seed) for seed in args.seeds.split(",")], args.jobs, args.folder, out)
    print(report(load(out), args.picture))


if __name__ == "__main__":
    main()
