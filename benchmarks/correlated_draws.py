"""Count what a training step of several stitches costs, when its draws are independent and when they are correlated.

A step runs L, S and drawn stitches as a tree. Correlated draws take one uniform number for the whole step: each draw
picks its own bin, and in this bin the stitch at that part of the route order, so that routes of a step start alike.
Each stitch keeps its probability. Nothing is trained; costs are multiply-accumulates of the backbone, over those of L.

    python benchmarks/correlated_draws.py [CONFIG] [--stitches 3 4 8] [--steps 2000]
"""

import argparse
from random import Random
from statistics import mean

from mmsnnet.apis import build_uninitialized, load_config
from mmsnnet.models import find_stitched_backbone

CONFIG = "configs/ade20k/stitched-deit3-s-l_setr-naive_8xb2-160k_ade20k-512x512.py"


def independent(bins: list[list[int]], number: int, random: Random) -> list[int]:
    return [random.choice(random.choice(bins)) for _ in range(number)]


def correlated(bins: list[list[int]], number: int, random: Random) -> list[int]:
    place, chosen = random.random(), [random.choice(bins) for _ in range(number)]
    return [bin_[int(place * len(bin_))] for bin_ in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=CONFIG)
    parser.add_argument("--stitches", nargs="+", type=int, default=[3, 4, 8])
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    if min(args.stitches) < 3:
        parser.error("a step has L, S and one drawn stitch or more")
    backbone = find_stitched_backbone(build_uninitialized(load_config(args.config)))
    space, sampler, counted = backbone.space, backbone.sampler(), backbone.cost_model()
    order = {stitch.id: place for place, stitch in enumerate(backbone.prefix_order(space))}
    bins = [sorted(bin_, key=lambda id_: order[id_]) for bin_ in sampler.bins]
    largest, smallest = bins[-1][-1], bins[0][0]
    costs = backbone.training_costs()
    print(f"{args.config}, {args.steps} steps of seed 0\n")
    print("| stitches | apart | tree, independent draws | tree, correlated draws |\n|---|---|---|---|")
    for number in args.stitches:
        cells = []
        for draw in (independent, correlated):
            random = Random(0)
            steps = [[largest, smallest, *draw(bins, number - 2, random)] for _ in range(args.steps)]
            trees = [counted.tree([space[id_] for id_ in ids], backbone.out_indices).flops for ids in steps]
            cells.append((mean(sum(costs[id_].flops for id_ in ids) for ids in steps), mean(trees)))
        (apart, first), (_, second) = cells
        shown = " | ".join(f"{value / costs[largest].flops:.2f}" for value in (apart, first, second))
        print(f"| {number} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
