import argparse
import re
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.registry import DefaultScope

from mmsnnet.apis import load_config
from mmsnnet.cli.arguments import DictAction
from mmsnnet.errors import SettingError, UserError

WriteConfig = Callable[[str], Path]
Uninstall = Callable[..., None]
REPOSITORY = Path(__file__).parents[2]
STITCHED = REPOSITORY / "configs/quickstart/stitched-vit-s-l_setr_shapes-64x64.py"


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    """``write_config(text)``: the path of a config file with this text."""

    def write(text: str) -> Path:
        path = tmp_path / "config.py"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def uninstall(monkeypatch: pytest.MonkeyPatch) -> Uninstall:
    """``uninstall(*packages)`` hides these packages from ``load_config``."""

    def remove(*packages: str) -> None:
        def find(name: str, package: str | None = None) -> ModuleSpec | None:
            return None if name in packages else find_spec(name, package)

        monkeypatch.setattr("mmsnnet.apis.config.find_spec", find)

    return remove


@pytest.mark.parametrize("as_type", [str, Path])
def test_reads_a_config_with_its_base_files(as_type: type) -> None:
    config = load_config(as_type(STITCHED))
    assert [anchor["depth"] for anchor in config.model.backbone.anchors] == [6, 12]
    assert config.model.type == "mmsnnet.EncoderDecoder" and config.optim_wrapper.optimizer.lr == 1e-3
    assert config.optim_wrapper.paramwise_cfg == dict(anchor_lr_mult=0.1)
    assert Path(config.filename) == STITCHED


def test_makes_the_toolbox_ready() -> None:
    load_config(STITCHED)
    scope = DefaultScope.get_current_instance()
    assert scope is not None and scope.scope_name == "mmseg"


def test_options_override_settings() -> None:
    options = {
        "work_dir": "elsewhere",
        "model.backbone.rank": 4,
        "model.backbone.anchors.1.pretrained": "large.pth",
        "custom_hooks": [],
    }
    config, plain = load_config(STITCHED, options), load_config(STITCHED)
    assert (config.work_dir, config.model.backbone.rank, config.custom_hooks) == ("elsewhere", 4, [])
    small, large = config.model.backbone.anchors
    assert large.pretrained == "large.pth" and small == plain.model.backbone.anchors[0]
    assert plain.model.backbone.rank == 8 and len(plain.custom_hooks) == 3
    assert options["model.backbone.rank"] == 4 and len(options) == 4


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("a.kinds.0", "S"),
        ("a.kinds.0.b", 1),
        ("a.kinds.b", 1),
        ("a.list.1.b", 1),
        ("a.list.0", 1),
        ("a.list.0.b.c", 1),
        ("a.list", {"x": 1}),
        ("rank.low", 1),
    ],
)
def test_an_option_inside_what_is_no_dict(option: str, value: object, write_config: WriteConfig) -> None:
    path = write_config("rank = 8\na = dict(kinds=['S', 'L'], list=[dict(b=3)])\nnest = [[dict(b=1)]]")
    text = f"--cfg-options: the config has no place for {option}: a key leads through dicts"
    with pytest.raises(SettingError, match=f"^{re.escape(text)}"):
        load_config(path, {"nest.0.0.b": 2, "a.list.0.b": 4, option: value})
    assert load_config(path, {"nest.0.0.b": 2, "a.list.0.b": 4}).nest == [[dict(b=2)]]


def test_one_option_moves_all_data_sets(write_config: WriteConfig) -> None:
    """Also those inside wrappers, but not those in another folder."""
    path = write_config(
        """
data_root = "data/a"
plain = dict(type="BaseSegDataset", data_root=data_root)
train_dataloader = dict(dataset=dict(type="RepeatDataset", times=2, dataset=plain))
val_dataloader = dict(dataset=dict(type="ConcatDataset", datasets=[plain, dict(plain, data_root="data/b")]))
test_dataloader = dict(dataset=plain)
"""
    )
    config = load_config(path, {"data_root": "data/new"})
    assert config.train_dataloader.dataset.dataset.data_root == "data/new"
    assert [d.data_root for d in config.val_dataloader.dataset.datasets] == ["data/new", "data/b"]
    assert (config.test_dataloader.dataset.data_root, config.data_root) == ("data/new", "data/new")
    one = load_config(path, {"data_root": "data/new", "test_dataloader.dataset.data_root": "data/c"})
    assert one.test_dataloader.dataset.data_root == "data/c"
    assert load_config(path, {"work_dir": "w"}).test_dataloader.dataset.data_root == "data/a"


@pytest.mark.parametrize("top", ["", "data_root = 'data/b'"])
def test_an_option_must_move_a_data_set(top: str, write_config: WriteConfig) -> None:
    path = write_config(f"{top}\ntest_dataloader = dict(dataset=dict(data_root='data/b'))")
    if top:
        assert load_config(path, {"data_root": "data/new"}).test_dataloader.dataset.data_root == "data/new"
    else:
        with pytest.raises(SettingError, match=r"--cfg-options: data_root='data/new' is not the root of any data set"):
            load_config(path, {"data_root": "data/new"})
    assert load_config(write_config("model = dict()"), {"data_root": "data/new"}).data_root == "data/new"


BASE = """
data_root = "data/base/"
train_dataloader = dict(dataset=dict(data_root=data_root, ann_file=data_root + "train.json"))
test_dataloader = dict(dataset=dict(type="ConcatDataset", datasets=[dict(data_root=data_root + "part")]))
test_evaluator = [dict(ann_file=data_root + "test.json", format="base/x")]
"""
CHILDREN = {
    "plain.py": "_base_ = 'config.py'\ndata_root = '/new'",
    "annotated.py": "_base_ = 'config.py'\ndata_root: str = '/new'",
    "conditional.py": "_base_ = ['config.py']\nif True:\n    data_root = '/new'",
    "unpacked.py": "_base_ = 'config.py'\ndata_root, work_dir = '/new', 'w'",
    "config.json": '{"_base_": "config.py", "data_root": "/new"}',
    "config.yaml": "_base_: config.py\ndata_root: /new",
}


@pytest.mark.parametrize("generations", [1, 2, 3])
@pytest.mark.parametrize("name", CHILDREN)
def test_a_root_in_any_form_of_config(name: str, generations: int, write_config: WriteConfig) -> None:
    folder = write_config(BASE).parent
    (folder / name).write_text(CHILDREN[name])
    for generation in range(1, generations):  # only the first one sets the root
        (folder / f"child{generation}.py").write_text(f"_base_ = {name!r}\nwork_dir = 'w'")
        name = f"child{generation}.py"
    config = load_config(folder / name)
    assert config.data_root == "/new"
    assert config.train_dataloader.dataset.data_root == "/new"
    assert config.train_dataloader.dataset.ann_file == "/new/train.json"
    assert config.test_dataloader.dataset.datasets[0].data_root == "/new/part"
    assert config.test_evaluator[0] == dict(ann_file="/new/test.json", format="base/x")


def test_roots_that_change_from_child_to_child(write_config: WriteConfig) -> None:
    folder = write_config(BASE).parent
    (folder / "second.py").write_text("_base_ = 'config.py'\ndata_root = '/second'")
    (folder / "third.json").write_text('{"_base_": "second.py", "data_root": "/third"}')
    for name, expected in (("second.py", "/second"), ("third.json", "/third")):
        assert load_config(folder / name).train_dataloader.dataset.data_root == expected
    assert load_config(folder / "third.json", {"data_root": "/o"}).test_evaluator[0].ann_file == "/o/test.json"


def test_a_root_without_a_data_set_is_refused(write_config: WriteConfig) -> None:
    """A flat file, such as one that mmengine writes, does not tell which value was changed."""
    path = write_config("data_root = '/new'\ntrain_dataloader = dict(dataset=dict(data_root='/old'))")
    with pytest.raises(SettingError, match=r"config.py: data_root='/new' is not the root of any data set"):
        load_config(path)


def test_the_root_of_a_new_style_config(write_config: WriteConfig) -> None:
    """Its bases are modules: mmengine does not tell which of two values is newer."""
    folder = write_config(BASE).parent
    base = "from mmengine.config import read_base\nwith read_base():\n    from .config import *\n"
    (folder / "same.py").write_text(f"{base}work_dir = 'w'")
    assert load_config(folder / "same.py").data_root == "data/base/"
    (folder / "changed.py").write_text(f"{base}data_root = '/new'")
    with pytest.raises(SettingError, match=r"changed.py: data_root='/new' is not the root of any data set"):
        load_config(folder / "changed.py")
    (folder / "both.py").write_text(f"{base}data_root = '/new'\ntrain_dataloader.dataset.data_root = data_root")
    assert load_config(folder / "both.py").train_dataloader.dataset.data_root == "/new"


def test_data_sets_that_a_child_puts_elsewhere(write_config: WriteConfig) -> None:
    """The base's root, which no data set uses any more, is not written to the config that a run writes."""
    base = write_config("data_root = 'data/a'\ntrain_dataloader = dict(dataset=dict(data_root=data_root))")
    child = base.with_name("child.py")
    child.write_text("_base_ = 'config.py'\ntrain_dataloader = dict(dataset=dict(data_root='data/b'))")
    config = load_config(child)
    assert "data_root" not in config and config.train_dataloader.dataset.data_root == "data/b"
    config.dump(base.with_name("printed.py"))
    assert load_config(base.with_name("printed.py")).train_dataloader.dataset.data_root == "data/b"


@pytest.mark.parametrize("options", [{}, {"data_root": "data/option"}])
def test_a_root_in_a_config_file_moves_the_data_sets_of_its_bases(
    options: dict[str, str], write_config: WriteConfig
) -> None:
    base = write_config(
        """
data_root = "data/base"
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root="data/b"))
"""
    )
    child = base.with_name("child.py")
    child.write_text(
        "_base_ = 'config.py'\ndata_root = 'data/child'\nval_dataloader = dict(dataset=dict(data_root='v'))"
    )
    config = load_config(child, options)
    roots = [config[f"{split}_dataloader"].dataset.data_root for split in ("train", "val", "test")]
    assert roots == [options.get("data_root", "data/child"), "v", "data/b"]
    untouched = base.with_name("grandchild.py")
    untouched.write_text("_base_ = 'config.py'\ntrain_dataloader = dict(dataset=dict(data_root='t'))")
    assert load_config(untouched).train_dataloader.dataset.data_root == "t"


def test_the_root_of_a_real_config_in_a_file_of_ones_own(write_config: WriteConfig) -> None:
    real = REPOSITORY / "configs/ade20k/stitched-deit3-s-l_setr-naive_8xb2-160k_ade20k-512x512.py"
    config = load_config(write_config(f"_base_ = {str(real)!r}\ndata_root = '/datasets/ade'"))
    assert {config[f"{split}_dataloader"].dataset.data_root for split in ("train", "val", "test")} == {"/datasets/ade"}


@pytest.mark.parametrize(
    ("name", "text", "output"),
    [
        ("c.py", "x = (", "SyntaxError"),
        ("c.py", "a = 1\nb = c", "NameError: name 'c' is not defined, line 2"),
        ("c.json", "{", "JSONDecodeError"),
        ("c.yaml", "a: [1", "line 1: expected ',' or ']'"),
        ("c.py", "_base_ = 'nowhere.py'", "nowhere.py"),
    ],
)
def test_configs_that_cannot_be_read_are_named(name: str, text: str, output: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_config(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and output in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "object:os.mkdir", "name:os.mkdir", "module:os", "tuple"]
)
@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
@pytest.mark.parametrize("generations", [[], ["b.py"], ["b.json"], ["b.yaml", "c.py"], ["b.py", "c.yaml", "d.json"]])
def test_yaml_runs_no_code(generations: list[str], suffix: str, tag: str, tmp_path: Path) -> None:
    """Neither in a config nor in a base of any generation, even if a variable names the base."""
    path = (tmp_path / "a").with_suffix(suffix)
    path.write_text(f"work_dir: w\nother: !!python/{tag} [{tmp_path / 'made'}]\n")
    child = path
    for number, name in enumerate(generations):
        base = child.name if number % 2 else f"{{{{ fileDirname }}}}/{child.name}"
        child = tmp_path / name
        texts = {".py": "_base_ = '{}'", ".json": '{{"_base_": "{}"}}', ".yaml": "_base_: '{}'"}
        child.write_text(texts[child.suffix].format(base))
    with pytest.raises(
        SettingError, match=rf"^config '{path}', line 2: .*!?python/{tag}.*plain data, which runs no code$"
    ):
        load_config(child)
    assert not (tmp_path / "made").exists()


def test_yaml_with_variables_and_exclamation_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBER", "3")
    (tmp_path / "base.yaml").write_text("data_root: {{ fileDirname }}/data")
    (tmp_path / "child.yaml").write_text(
        "_base_: {{ fileDirname }}/base.yaml\nmark: '!!python/name:os.mkdir'\nmarks: [a!!b, !!str 1, !!set {a, b}]\n"
        "number: {{$NUMBER:2}}\nroot: {{ _base_.data_root }}\n"
    )
    config = load_config(tmp_path / "child.yaml")
    assert (config.mark, config.marks) == ("!!python/name:os.mkdir", ["a!!b", "1", {"a", "b"}])
    assert (config.number, config.root) == (3, f"{tmp_path}/data")


def test_the_root_of_a_base_that_a_variable_names(write_config: WriteConfig) -> None:
    folder = write_config(BASE).parent
    (folder / "child.py").write_text("_base_ = '{{ fileDirname }}/config.py'\ndata_root = '/new'")
    assert load_config(folder / "child.py").train_dataloader.dataset.ann_file == "/new/train.json"


@pytest.mark.parametrize("root", ["''", "None"])
def test_an_option_for_data_sets_without_a_root_is_refused(root: str, write_config: WriteConfig) -> None:
    path = write_config(f"data_root = {root}\ntrain_dataloader = dict(dataset=dict(data_root={root}, ann_file='x'))")
    with pytest.raises(SettingError, match="data_root='/new' is not the root of any data set"):
        load_config(path, {"data_root": "/new"})


def test_roots_may_be_paths(write_config: WriteConfig) -> None:
    base = write_config(
        "from pathlib import Path\ndata_root = Path('/a')\ntrain_dataloader = dict(dataset=dict(data_root=data_root))"
    )
    assert load_config(base).train_dataloader.dataset.data_root == Path("/a")
    assert load_config(base, {"data_root": "/b"}).train_dataloader.dataset.data_root == "/b"


def test_segmentors_of_new_style_configs(write_config: WriteConfig) -> None:
    head = "from mmseg.models import EncoderDecoder\nfrom mmsnnet.models import StitchedBackbone\n"
    config = load_config(write_config(f"{head}model = dict(type=EncoderDecoder, backbone=dict(type=StitchedBackbone))"))
    assert config.model.type == "mmsnnet.EncoderDecoder"
    other = load_config(
        write_config(
            "default_scope = 'mmdet'\nmodel = dict(type='EncoderDecoder', backbone=dict(type='mmsnnet.StitchedViT'))"
        )
    )
    assert other.model.type == "EncoderDecoder"


@pytest.mark.parametrize("root", ["''", "'./'", "'.'"])
def test_a_root_that_is_the_working_folder_moves_nothing(root: str, write_config: WriteConfig) -> None:
    dataset = f"dict(data_root={root}, ann_file='', data_prefix=dict(img=''))"
    base = write_config(f"data_root = {root}\ntrain_dataloader = dict(dataset={dataset})")
    child = base.with_name("child.py")
    child.write_text("_base_ = 'config.py'\nwork_dir = 'w'")
    assert load_config(child).train_dataloader.dataset.ann_file == ""


def test_a_root_that_only_paths_use(write_config: WriteConfig) -> None:
    path = write_config(
        "data_root = '/a'\ntrain_dataloader = dict(dataset=dict(img_dir=data_root + '/img'))\n"
        "val_dataloader = dict(dataset=dict(data_root='/b'))"
    )
    assert load_config(path).val_dataloader.dataset.data_root == "/b"
    moved = load_config(path, {"data_root": "/new"})
    assert (moved.train_dataloader.dataset.img_dir, moved.val_dataloader.dataset.data_root) == ("/new/img", "/b")


def test_a_tilde_stands_for_the_home_folder(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    path = write_config("data_root = '~/a'\nwork_dir = '~/runs'\ntest_dataloader = dict(dataset=dict(data_root='~/a'))")
    config = load_config(path, {"load_from": "~/x.pth"})
    assert (config.work_dir, config.load_from) == ("/home/somebody/runs", "/home/somebody/x.pth")
    assert config.test_dataloader.dataset.data_root == "/home/somebody/a"


@pytest.mark.parametrize("given", ["EncoderDecoder", "mmseg.EncoderDecoder", "DepthEstimator", "CascadeEncoderDecoder"])
def test_segmentors_around_a_stitched_backbone_are_ours(given: str, write_config: WriteConfig) -> None:
    ours = f"mmsnnet.{given.removeprefix('mmseg.')}"
    for backbone, expected in (("mmsnnet.StitchedViT", ours), ("ResNet", given)):
        text = f"model = dict(type={given!r}, backbone=dict(type={backbone!r}))"
        assert load_config(write_config(text)).model.type == expected


def test_no_options_change_nothing() -> None:
    assert (
        load_config(STITCHED, {}).to_dict() == load_config(STITCHED, None).to_dict() == load_config(STITCHED).to_dict()
    )


@pytest.mark.parametrize("path", ["configs/nowhere.py", "."])
def test_a_missing_file_is_named(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        load_config(path)
    assert repr(path) in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("scope", "missing", "command"),
    [
        ("mmseg", ("mmseg",), "pip install 'mmsnnet[mminstall]'"),
        ("mmseg", ("mmcv", "mmseg"), "pip install 'mmsnnet[mminstall]'"),
        ("mmdet", ("mmdet",), "pip install 'mmsnnet[mminstall,det]'"),
        ("mmdet", ("mmcv",), "pip install 'mmsnnet[mminstall,det]'"),
    ],
)
def test_a_missing_toolbox_says_what_to_install(
    write_config: WriteConfig, uninstall: Uninstall, scope: str, missing: tuple[str, ...], command: str
) -> None:
    path = write_config(f"default_scope = {scope!r}")
    uninstall(*missing)
    with pytest.raises(ImportError) as error:
        load_config(path)
    message = str(error.value)
    assert message.endswith(command) and str(path) in message
    assert f"{' and '.join(missing)} is missing" in message


def test_the_toolbox_of_another_task_may_be_missing(uninstall: Uninstall) -> None:
    uninstall("mmdet")
    assert load_config(STITCHED).default_scope == "mmseg"


def test_a_config_without_a_scope_is_for_segmentation(write_config: WriteConfig, uninstall: Uninstall) -> None:
    path = write_config("work_dir = 'here'")
    assert load_config(path).work_dir == "here"
    uninstall("mmseg")
    with pytest.raises(ImportError, match=r"config\.py needs mmseg, and mmseg is missing"):
        load_config(path)


@pytest.mark.parametrize("name", ["README.md", "checkpoint.pth", "config"])
def test_other_files_are_refused_by_their_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("# A text")
    with pytest.raises(ValueError, match=rf"{name}' is no config: the name of a config ends in \.py"):
        load_config(tmp_path / name)


@pytest.mark.parametrize(
    ("option", "message"),
    [("foo", "'foo' is not KEY=VALUE"), ("=3", "'=3' is not KEY=VALUE"), ("a=[1,2", r"\[1,2")],
)
def test_wrong_options_end_with_one_line(capsys: pytest.CaptureFixture[str], option: str, message: str) -> None:
    command = argparse.ArgumentParser(prog="tool")
    command.add_argument("--cfg-options", nargs="+", action=DictAction)
    with pytest.raises(SystemExit, match="2"):
        command.parse_args(["--cfg-options", "b=1", option])
    assert re.fullmatch(
        rf"tool: error: argument --cfg-options: .*{message}.*", capsys.readouterr().err.splitlines()[-1]
    )
    assert command.parse_args(["--cfg-options", "b=1", "c.d=e=f"]).cfg_options == {"b": 1, "c.d": "e=f"}
