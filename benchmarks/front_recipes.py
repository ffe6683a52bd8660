"""The recipes and the regimes that benchmarks/front.py compares."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

TREE = dict(stitches_per_step=3)
OUTPUTS = dict(outputs=1.0, teacher="L")


@dataclass(frozen=True)
class Recipe:
    """One way to get stitches.

    Attributes:
        changes: settings of the stitched config. A teacher called ``"L"`` is the large anchor, as it was before.
        anchors: which anchors, by letter; one letter trains this anchor on, alone.
        budget: its part of the training cost of the recipe "published".
        refine: the second stage of the initialisation is on.
        trains: False evaluates what the initialisation gives.
        narrow: draw only stitches within this distance of the front, from a validation after each third of training.
        recalibrates: evaluate each stitch with batch norm statistics of its own.
        weights_of: take the weights that this recipe has trained with the same seed.
        polish: extract this stitch of ``weights_of``, and train it alone, taught by the whole model.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    anchors: str = "sl"
    budget: float = 1.0
    refine: bool = False
    trains: bool = True
    narrow: float | None = None
    recalibrates: bool = False
    weights_of: str | None = None
    polish: str | None = None


def loop(**settings: Any) -> dict[str, Any]:
    return dict(train_cfg=settings)


def drawn(**choice: Any) -> dict[str, Any]:
    return dict(model=dict(backbone=dict(draw_from=choice)))


def anchor_rate(factor: float) -> dict[str, Any]:
    return dict(optim_wrapper=dict(paramwise_cfg=dict(anchor_lr_mult=factor)))


def slow_norms(**backbone: Any) -> dict[str, Any]:
    """Heads whose batch norms average over some hundred draws, not ten."""
    head = dict(norm_cfg=dict(type="BN", requires_grad=True, momentum=0.01))
    return dict(model=dict(backbone=backbone, decode_head=head, auxiliary_head=head))


THIRD, FIFTH = anchor_rate(0.3), anchor_rate(0.2)
EQUAL = dict(equal_flops=True)


RECIPES: dict[str, Recipe] = {
    "published": Recipe(),
    "alone-s": Recipe(anchors="s"),
    "alone-l": Recipe(anchors="l"),
    "alone-m": Recipe(anchors="m"),
    "distilled-s": Recipe(loop(distill=OUTPUTS), anchors="s"),
    "recalibrated": Recipe(weights_of="published", recalibrates=True),
    "three-stitches": Recipe(loop(**TREE)),
    "in-place-outputs": Recipe(loop(**TREE, distill=dict(outputs=1.0))),
    "in-place-features": Recipe(loop(**TREE, distill=dict(features=1.0))),
    "teacher": Recipe(loop(distill=OUTPUTS)),
    "teacher-features": Recipe(loop(distill=OUTPUTS | dict(features=1.0))),
    "initialised": Recipe(trains=False),
    "refined-initialised": Recipe(trains=False, refine=True),
    "refined": Recipe(refine=True),
    "third-rates": Recipe(THIRD),
    "equal-rates": Recipe(anchor_rate(1.0)),
    "equal-flops-third-rates": Recipe(drawn(**EQUAL) | THIRD),
    "equal-flops-fifth-rates": Recipe(drawn(**EQUAL) | FIFTH),
    "no-lsl": Recipe(drawn(kinds=["S", "L", "SL", "LS", "SLS"])),
    "one-crossing": Recipe(drawn(max_crossings=1)),
    "equal-flops": Recipe(drawn(**EQUAL)),
    "narrowed": Recipe(narrow=1.0),
    "equal-flops-narrowed": Recipe(drawn(**EQUAL), narrow=1.0),
    "three-anchors": Recipe(anchors="sml"),
    "three-anchors-equal-flops": Recipe(drawn(**EQUAL), anchors="sml"),
    "slow-norms": Recipe(slow_norms()),
    "equal-flops-slow-norms": Recipe(slow_norms(draw_from=EQUAL)),
    "half-s": Recipe(anchors="s", budget=0.5),
    "half-l": Recipe(anchors="l", budget=0.5),
    # What each of seven sizes would get: stitches of S and L fall into seven bins of FLOPs in shapes.
    "seventh-s": Recipe(anchors="s", budget=1 / 7),
    "seventh-m": Recipe(anchors="m", budget=1 / 7),
    "seventh-l": Recipe(anchors="l", budget=1 / 7),
    "polished-s": Recipe(weights_of="published", polish="S", budget=0.25),
    "longer-s": Recipe(anchors="s", budget=1.25),
}


@dataclass(frozen=True)
class Regime:
    """Anchors, data and the size of a comparison.

    Attributes:
        anchors: by letter, smallest first: the config under configs/, and the iterations of each round of training. The
            first round starts from random weights, and each has a schedule of its own.
        widths: other widths than in the configs, by letter.
        stitched: the stitched configs, by the letters of their anchors.
        iterations: of the recipe "published"; its cost is the budget of all recipes.
        images: the numbers of procedural images to train on and to validate on; None for a real data set.
        data: the folder of the data.
        size: of procedural images (height, width).
        layout: of procedural images.
        refine_steps: of the second stage of the initialisation.
        narrowing_images, recalibration_images: how many training images these take.
        windows: of an image in slide inference.
        anchor_seed: of the anchors' training. All recipes and seeds start from the same anchors.
        anchors_of: the regime whose trained anchors these are; None for this one.
    """

    name: str
    anchors: Mapping[str, tuple[str, tuple[int, ...]]]
    stitched: Mapping[str, str]
    iterations: int
    images: tuple[int, int] | None
    data: str
    size: tuple[int, int] = (64, 64)
    layout: str = "shapes"
    refine_steps: int = 100
    narrowing_images: int = 200
    recalibration_images: int = 256
    windows: int = 1
    anchor_seed: int = 0
    anchors_of: str | None = field(default=None, repr=False)  # not a part of the settings of kept runs
    widths: Mapping[str, int] = field(default_factory=dict)


REGIMES = {
    "shapes": Regime(
        "shapes",
        dict(
            s=("quickstart/vit-s_setr_shapes-64x64.py", (4000,)),
            m=("quickstart/vit-m_setr_shapes-64x64.py", (3000,)),
            l=("quickstart/vit-l_setr_shapes-64x64.py", (3000, 2000)),
        ),
        dict(
            sl="quickstart/stitched-vit-s-l_setr_shapes-64x64.py",
            sml="quickstart/stitched-vit-s-m-l_setr_shapes-64x64.py",
        ),
        iterations=600,
        images=(6000, 1000),
        data="work_dirs/front/shapes_data",
        widths=dict(s=24),
    ),
    "camvid": Regime(
        "camvid",
        dict(
            s=("camvid/vit-s_setr_1k_camvid-256x256.py", (1000,)),
            l=("camvid/vit-l_setr_1k_camvid-256x256.py", (1000,)),
        ),
        dict(sl="camvid/stitched-vit-s-l_setr_1k_camvid-256x256.py"),
        iterations=300,
        images=None,
        data="data/camvid",
        size=(360, 480),
        layout="camvid",
        narrowing_images=20,
        windows=4,
    ),
}
REGIMES["shapes-long"] = replace(REGIMES["shapes"], name="shapes-long", iterations=2400, anchors_of="shapes")


def lacking(name: str, regime: Regime) -> str | None:
    """What a regime lacks that a recipe needs, or None if the recipe can run in it."""
    recipe = RECIPES[name]
    for letter in recipe.anchors:
        if letter not in regime.anchors:
            return f"no anchor {letter!r}"
    if len(recipe.anchors) > 1 and recipe.anchors not in regime.stitched:
        return f"no stitched config of the anchors {recipe.anchors!r}"
    return lacking(recipe.weights_of, regime) if recipe.weights_of else None


def quick(regime: Regime) -> Regime:
    """A comparison of minutes, whose figures mean nothing, to try the program."""
    return replace(
        regime,
        name=f"{regime.name}-quick",
        anchors_of=None,
        anchors={letter: (config, (6,)) for letter, (config, _) in regime.anchors.items()},
        iterations=12,
        images=(32, 16),
        data=f"{regime.data}_quick",
        refine_steps=1,
        narrowing_images=2,
        recalibration_images=16,
    )
