"""The comparison of fronts gives every recipe the same training cost."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from front import Run, check_settings, fingerprint
from front_costs import narrowed_steps, spending
from front_recipes import RECIPES, REGIMES, quick

from mmsnnet.apis import build_uninitialized, load_config
from mmsnnet.models import find_stitched_backbone, model_costs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "refined", "equal-flops-narrowed"])
def test_iterations_use_up_the_budget(name: str, tmp_path: Path) -> None:
    """The cost stays within that of "published", and one iteration more would exceed it."""
    regime = quick(REGIMES["shapes"])
    run = Run(regime, name, 0, tmp_path)
    for letter, (base, _) in regime.anchors.items():  # the teacher's config
        (tmp_path / regime.name / "anchors").mkdir(parents=True, exist_ok=True)
        config = Path(__file__).parents[2] / "configs" / base
        (tmp_path / regime.name / "anchors" / f"{letter}.py").write_text(f"_base_ = {str(config)!r}")
    budget = run.of("published").iterations()[1] * run.recipe.budget
    iterations, cost = run.iterations()
    beside, steps = spending(run.settings(), regime)
    assert iterations >= 1 and (beside > 0) == (name != "teacher")
    assert beside + sum(next(steps) for _ in range(iterations)) == pytest.approx(cost)
    assert cost <= budget * (1 + 1e-12) < cost + next(steps)


def test_recipes_differ_in_what_they_name(tmp_path: Path) -> None:
    """A recipe's config has its settings, and starts from the anchors that all recipes share."""
    regime = quick(REGIMES["shapes"])
    for name in ("published", "in-place-outputs", "no-lsl", "alone-s"):
        config = load_config(Run(regime, name, 1, tmp_path).config(5))
        assert config.model.backbone.seed == config.randomness.seed == 1 and config.train_cfg.max_iters == 5
        letters = [Path(anchor.pretrained).parent.name for anchor in config.model.backbone.anchors]
        assert letters == list(RECIPES[name].anchors)
        assert config.train_cfg.get("stitches_per_step", 1) == (3 if name == "in-place-outputs" else 1)
        assert ("draw_from" in config.model.backbone) == (name == "no-lsl")


def test_kept_runs_have_the_settings_of_now(tmp_path: Path) -> None:
    """Or belong to a recipe that is gone."""
    regime, out = quick(REGIMES["shapes"]), tmp_path / "results.json"
    kept = [
        dict(recipe="published", seed=1, settings=fingerprint(Run(regime, "published", 1, tmp_path))),
        dict(recipe="gone", seed=0, settings="0"),
    ]
    check_settings(dict(runs=kept), regime, tmp_path, out)
    with pytest.raises(SystemExit, match=r"results\.json: teacher with seed 0 ran with other settings"):
        check_settings(dict(runs=[*kept, dict(recipe="teacher", seed=0, settings="0")]), regime, tmp_path, out)


def test_narrowed_steps_cost_what_is_left_to_draw(tmp_path: Path) -> None:
    """All stitches until the first validation, then S alone, then L alone: the last two phases have one cost a step."""
    run = Run(quick(REGIMES["shapes"]), "narrowed", 0, tmp_path)
    settings = load_config(run.config(12))
    interval = settings.train_cfg.val_interval
    first, *alone = (narrowed_steps(settings, [["S"], ["L"]], steps * interval) for steps in (1, 2, 3))
    whole = narrowed_steps(settings, [], interval)
    _, steps = spending(settings, run.regime)
    assert first == whole == pytest.approx(sum(next(steps) for _ in range(interval)))
    model = build_uninitialized(settings)
    backbone = find_stitched_backbone(model)
    costs, wholes = backbone.training_costs(), model_costs(model)
    heads = 2 * (wholes[0].flops - backbone.costs()[0].flops)
    per_step = [3 * (costs[backbone.space[name].id].flops + heads) for name in ("S", "L")]
    assert alone[0] - first == pytest.approx(interval * per_step[0])
    assert alone[1] - alone[0] == pytest.approx(interval * per_step[1])
