"""The comparison of fronts gives every recipe the same training cost."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import front
from front import Run, check_settings, fingerprint
from front_costs import narrowed_draws, narrowed_steps, spending
from front_files import store
from front_recipes import RECIPES, REGIMES, Recipe, lacking, quick

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
    for name in ("published", "in-place-outputs", "no-lsl", "alone-s", "equal-flops-slow-norms"):
        config = load_config(Run(regime, name, 1, tmp_path).config(5))
        assert config.model.backbone.seed == config.randomness.seed == 1 and config.train_cfg.max_iters == 5
        letters = [Path(anchor.pretrained).parent.name for anchor in config.model.backbone.anchors]
        assert letters == list(RECIPES[name].anchors)
        assert config.train_cfg.get("stitches_per_step", 1) == (3 if name == "in-place-outputs" else 1)
        assert ("draw_from" in config.model.backbone) == (name in ("no-lsl", "equal-flops-slow-norms"))
        momenta = {config.model[head].norm_cfg.get("momentum") for head in ("decode_head", "auxiliary_head")}
        assert momenta == {0.01 if name == "equal-flops-slow-norms" else None}


def test_a_longer_regime_starts_from_the_same_anchors(tmp_path: Path) -> None:
    short, long = (Run(REGIMES[name], "published", 0, tmp_path) for name in ("shapes", "shapes-long"))
    assert long.anchor_checkpoint("l") == short.anchor_checkpoint("l") and long.folder != short.folder
    assert long.of("teacher").root == long.root and long.regime.iterations == 4 * short.regime.iterations
    tried = [Run(quick(run.regime), "published", 0, tmp_path) for run in (short, long)]
    assert len({run.anchors for run in (short, *tried)}) == 3


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


def entry(recipe: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    points = [
        dict(name="S", kind="S", gflops=1.0, quality=40.0),
        dict(name="S0-L2", kind="SL", gflops=2.0, quality=43.0),
        dict(name="L", kind="L", gflops=5.0, quality=46.0),
    ]
    run = fingerprint(Run(REGIMES["shapes"], recipe, seed, Path())) if recipe in RECIPES else "0"
    training = dict(iterations=9, training_tflops_per_image=2.0, training_seconds=1)
    return dict(recipe=recipe, seed=seed, settings=run, points=points) | training | changes


def table(*runs: dict[str, Any]) -> dict[str, Any]:
    return dict(anchors=dict(s=39.0, l=45.0), runs=list(runs))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The recipes of each call of run_grid, which trains nothing."""
    calls: list[list[str]] = []
    monkeypatch.setattr(front, "run_grid", lambda regime, recipes, *_: calls.append(list(recipes)))
    return calls


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as caught:
        front.main(list(map(str, arguments)))
    printed = capsys.readouterr()
    assert not printed.out
    line = caught.value.code if isinstance(caught.value.code, str) else printed.err.splitlines()[-1]
    assert "\n" not in line
    return line


def test_a_regime_runs_the_recipes_that_it_has_anchors_for(trained: list[list[str]], tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    store(out, table(entry("published")))
    middle = {name for name, recipe in RECIPES.items() if "m" in recipe.anchors}
    assert {"alone-m", "three-anchors"} < middle
    for regime, lacks in (("shapes", set()), ("camvid", middle)):
        front.main(["run", "--regime", regime, "--out", str(out)])
        assert set(RECIPES) - set(trained[-1]) == lacks
        front.main(["run", "--quick", "--regime", regime, "--out", str(out)])
        assert trained[-1] == trained[-2]


def test_a_recipe_needs_what_the_recipe_of_its_weights_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(weights_of="three-anchors", recalibrates=True)
    monkeypatch.setitem(RECIPES, "recalibrated-three-anchors", recipe)
    assert lacking("recalibrated-three-anchors", REGIMES["shapes"]) is None
    assert lacking("recalibrated-three-anchors", REGIMES["camvid"]) == "no anchor 'm'"


def test_a_recipe_without_its_anchors_is_refused(
    trained: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = refused(
        capsys, "run", "--regime", "camvid", "--recipes", "published,three-anchors", "--out", tmp_path / "new.json"
    )
    assert line.endswith("the recipe 'three-anchors' cannot run in the regime 'camvid', which has no anchor 'm'")
    assert not trained


def test_a_regime_without_its_data_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "run", "--regime", "camvid", "--out", tmp_path / "new.json")
    assert line == f"{tmp_path}/data/camvid: no such folder: the regime 'camvid' reads its data there"


@pytest.mark.parametrize(
    ("option", "value", "cure"),
    [
        ("--seeds", "a", "give whole numbers"),
        ("--seeds", "0,,1", "give whole numbers"),
        ("--jobs", "0", "at least 1"),
        ("--jobs", "two", "at least 1"),
        ("--picture", "missing/fronts.png", "no folder 'missing': create it"),
        ("--picture", "fronts.abc", "end the name in .png"),
        ("--recipes", "publish", "no recipe 'publish'; there are published"),
    ],
)
def test_a_wrong_option_is_refused(
    option: str, value: str, cure: str, trained: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = refused(capsys, "run", "--out", tmp_path / "new.json", option, value)
    assert cure in line and (option in line or option == "--recipes")
    assert not trained


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "not readable as JSON"),
        ('{"anchors": {"s": 1', "not readable as JSON"),
        ("[]", "list instead of an object"),
        ("{}", "no 'anchors'"),
        (json.dumps(dict(anchors={}, runs=[entry("published")])), "no 's' in 'anchors'"),
        (json.dumps(table(dict(recipe="published"))), "no 'seed' in run 1"),
        (json.dumps(table(entry("published"), entry("gone", seed="0"))), "wrong 'seed' in run 2"),
        (json.dumps(table(entry("gone", points=[]))), "wrong 'points' in run 1"),
        (json.dumps(table(entry("gone", points=[dict(name="S")]))), "no 'kind' in 'points' in run 1"),
    ],
)
def test_a_file_that_has_no_results_is_refused(
    content: str, fault: str, trained: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    out.write_text(content)
    for action in ("run", "report"):
        line = refused(capsys, action, "--out", out)
        assert line.startswith(f"{out}: ") and fault in line and "--out" in line
    assert not trained and out.read_text() == content


def test_a_report_needs_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    assert refused(capsys, "report", "--out", out).startswith(f"{out}: no such file: use the action run first")
    store(out, dict(anchors=dict(s=39.0, l=45.0), runs=[]))  # the anchors alone are trained
    assert refused(capsys, "report", "--out", out).startswith(f"{out}: no runs in this file: use the action run first")
    store(out, table(entry("published")))
    line = refused(capsys, "report", "--out", out, "--recipes", "teacher")
    assert line == f"{out}: no runs of teacher: name some of published with --recipes"


def test_runs_of_a_recipe_that_is_gone_stay(
    trained: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    store(out, table(entry("published"), entry("gone")))
    for arguments in (["report"], ["report", "--recipes", "gone"], ["run"]):
        front.main([*arguments, "--out", str(out)])
        assert "| gone | 1 | 9 |" in capsys.readouterr().out
    assert "gone" not in trained[0]


def test_a_report_has_the_order_of_the_recipes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Those that are gone come last."""
    out = tmp_path / "results.json"
    store(out, table(entry("gone"), entry("teacher", seed=1), entry("published", seed=1), entry("teacher")))
    front.main(["report", "--out", str(out)])
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.split("\n\n")[1].splitlines()]
    assert rows[2:] == ["| published", "| teacher", "| gone"]


@pytest.mark.parametrize("path", sorted(front.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_page_has_the_tables_of_the_results(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    front.main(["report", "--out", str(path)])
    tables = capsys.readouterr().out.partition("\n\n")[2].strip()
    page = (Path(__file__).parents[2] / "docs/front.md").read_text()
    _, found, after = page.partition(f"<!-- table of {path.stem} -->\n")
    assert found and after.partition("\n<!-- end of table -->")[0] == tables


def test_the_logs_say_what_is_left_to_draw(tmp_path: Path) -> None:
    """What a resumed run says at its start is no validation."""
    text = "NarrowDrawsHook: 2 of 4 stitches lie within 1.0 of the front of mIoU, or are anchors; training draws S, L\n"
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        start = "NarrowDrawsHook: the resumed run had narrowed its draws; training draws S, L, S0-L2\n" * (number - 1)
        (tmp_path / str(number) / "a.log").write_text(start + text.replace("S, L", "S, L-" + str(number)))
    assert narrowed_draws(tmp_path) == [["S", "L-1"], ["S", "L-2"]]
