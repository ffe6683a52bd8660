"""Initialising stitching layers by streamed normal equations and by a pseudo-inverse of all tokens, side by side.

Tokens of 50 images at 512 x 512 (51,250 rows) at the widths of DeiT3-S and -L. They are correlated like those of a ViT:
mixed channels of falling variance, a few of them very large. Both directions of one pair of blocks are solved. Errors
are squared errors over all tokens in float64, relative to those of `torch.linalg.lstsq` in float64.

    python benchmarks/initialisation.py [--images 50] [--repeats 3]
"""

import argparse
import platform
import statistics
import time

import torch
from torch import Tensor

from mmsnnet.stitching.least_squares import solve_normal_equations, with_one

WIDTHS = (384, 1024)
TOKENS = 1025


def make_tokens(images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def mixed(rows: Tensor, width: int) -> Tensor:
        tokens = rows @ (randn(rows.shape[1], width) * torch.logspace(0, -3, rows.shape[1])[:, None])
        tokens[:, :3] *= 100
        return tokens + randn(width)

    hidden = randn(images * TOKENS, 512)
    return tuple(mixed(torch.cat([hidden, randn(images * TOKENS, 512)], 1), width) for width in WIDTHS)


def streamed(small: Tensor, large: Tensor) -> list[tuple[Tensor, Tensor]]:
    sizes = [width + 1 for width in WIDTHS]
    grams = [torch.zeros(size, size, dtype=torch.float64) for size in sizes]
    cross = torch.zeros(*sizes, dtype=torch.float64)
    for image in zip(small.split(TOKENS), large.split(TOKENS), strict=True):
        rows = [with_one(tokens) for tokens in image]
        for gram, tokens in zip(grams, rows, strict=True):
            gram.addmm_(tokens.T, tokens)
        cross.addmm_(rows[0].T, rows[1])
    return [solve_normal_equations(grams[0], cross[:, :-1]), solve_normal_equations(grams[1], cross.T[:, :-1])]


def pseudo_inverse(small: Tensor, large: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    solutions = []
    for source, target in ((small, large), (large, small)):
        rows = torch.cat([source, source.new_ones(len(source), 1)], 1).to(dtype)
        solution = torch.linalg.pinv(rows) @ target.to(dtype)
        solutions.append((solution[:-1].T, solution[-1]))
    return solutions


def residuals(solutions: list[tuple[Tensor, Tensor]], small: Tensor, large: Tensor) -> list[float]:
    errors = []
    for (weight, bias), (source, target) in zip(solutions, ((small, large), (large, small)), strict=True):
        source, target = source.double(), target.double()
        best = torch.linalg.lstsq(with_one(source), target).solution
        error = (source @ weight.double().T + bias.double() - target).square().sum()
        errors.append(float(error / (with_one(source) @ best - target).square().sum()))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    small, large = make_tokens(args.images)
    ways = {
        "streamed normal equations": lambda: streamed(small, large),
        "pseudo-inverse, float32": lambda: pseudo_inverse(small, large, torch.float32),
        "pseudo-inverse, float64": lambda: pseudo_inverse(small, large, torch.float64),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, solve in ways.items():
            start = time.perf_counter()
            solve()
            times[name].append(time.perf_counter() - start)
    print(
        f"both layers of a {WIDTHS[0]}/{WIDTHS[1]} pair, {args.images} images of {TOKENS} tokens, "
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, torch {torch.__version__}; "
        f"medians of {args.repeats}"
    )
    for name, solve in ways.items():
        worse = ", ".join(f"{value - 1:+.2%}" for value in residuals(solve(), small, large))
        print(f"{name}: {statistics.median(times[name]):.2f} s, squared error against lstsq {worse}")


if __name__ == "__main__":
    main()
