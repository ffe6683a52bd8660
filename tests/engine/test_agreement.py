"""Numbers that are set in several places are compared before the first iteration."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import DefaultSampler, pseudo_collate
from mmengine.registry import init_default_scope
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import DATASETS, MODELS
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from mmsnnet.apis import load_config
from mmsnnet.apis.model import build_without_weights
from mmsnnet.datasets import write_shapes
from mmsnnet.engine.agreement import check_loader, check_same_classes, sizes_explained
from mmsnnet.errors import DataError, MissingFileError, SettingError

CLASSES = tuple("abcdefgh")
PIPELINE = [
    dict(type="mmsnnet.LoadImage"),
    dict(type="mmsnnet.LoadSegLabels", num_classes=8),
    dict(type="PackSegInputs"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("set"), "shapes", train=6, val=2, size=(32, 32))


@pytest.fixture
def make_loader(root: Path) -> Callable[..., DataLoader]:
    """``make_loader(**changes)``: a loader of six images of 32 x 32 with eight classes; changes are the data set's."""

    def make(
        batch_size: int = 2, drop_last: bool = False, wrapper: str | None = None, num_classes: int = 8, **changes: Any
    ) -> DataLoader:
        init_default_scope("mmseg")
        pipeline = [PIPELINE[0], PIPELINE[1] | dict(num_classes=num_classes), PIPELINE[2]]
        config = dict(
            type="BaseSegDataset",
            data_root=str(root),
            metainfo=dict(classes=CLASSES),
            reduce_zero_label=True,
            data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
            pipeline=pipeline,
        )
        config |= changes
        if wrapper == "RepeatDataset":
            config = dict(type=wrapper, times=2, dataset=config)
        if wrapper == "ConcatDataset":
            config = dict(type=wrapper, datasets=[config, config])
        dataset = DATASETS.build(config)
        sampler = DefaultSampler(dataset, shuffle=False)
        return DataLoader(dataset, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=pseudo_collate)

    return make


@pytest.fixture
def make_model(segmentor_config: Callable[..., dict[str, Any]]) -> Callable[..., nn.Module]:
    def make(backbone: dict[str, Any] | None = None, **changes: Any) -> nn.Module:
        init_default_scope("mmseg")
        config = segmentor_config(**(backbone or {}))
        for place, value in changes.items():
            part, name = place.split("__")
            config[part][name] = value
        return MODELS.build(ConfigDict(config))

    return make


@pytest.mark.parametrize("wrapper", [None, "RepeatDataset", "ConcatDataset"])
def test_what_agrees_passes(
    wrapper: str | None, make_model: Callable[..., nn.Module], make_loader: Callable[..., DataLoader]
) -> None:
    """The checks draw nothing from the global generators."""
    model, loader = make_model(), make_loader(wrapper=wrapper)
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    for training in (True, False):
        check_loader(model, loader, "train_dataloader", training)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.random.get_rng_state(), before[1])


@pytest.mark.parametrize("wrapper", [None, "RepeatDataset", "ConcatDataset"])
@pytest.mark.parametrize("number", [7, 9, 150])
@pytest.mark.parametrize("head", ["decode_head", "auxiliary_head"])
def test_classes_of_heads(
    head: str,
    number: int,
    wrapper: str | None,
    make_model: Callable[..., nn.Module],
    make_loader: Callable[..., DataLoader],
) -> None:
    with pytest.raises(SettingError, match=rf"8 classes \(a, b, c .*, and model\.{head}\.num_classes is {number}"):
        check_loader(make_model(**{f"{head}__num_classes": number}), make_loader(wrapper=wrapper), "val_dataloader")


def test_classes_of_the_label_loader(
    make_model: Callable[..., nn.Module], make_loader: Callable[..., DataLoader]
) -> None:
    with pytest.raises(SettingError, match=r"dataset: .* 8 classes .* LoadSegLabels\.num_classes .* is 9"):
        check_loader(make_model(), make_loader(num_classes=9), "train_dataloader")


def test_classes_of_detectors_and_classifiers(make_loader: Callable[..., DataLoader]) -> None:
    """Region proposals and class-agnostic masks have one class with any data set."""
    loader = DataLoader(Listed([dict()], classes=("x", "y")), batch_size=1)

    def detector(box: int, mask: int, class_agnostic: bool = False) -> nn.Module:
        model, roi = nn.Module(), nn.Module()
        model.rpn_head, model.roi_head, roi.mask_head = nn.Module(), roi, nn.Module()
        roi.bbox_head = nn.ModuleList([nn.Module(), nn.Module()])
        model.rpn_head.num_classes, roi.mask_head.num_classes = 1, mask
        roi.bbox_head[0].num_classes, roi.bbox_head[1].num_classes = 2, box
        roi.mask_head.class_agnostic = class_agnostic
        return model

    check_loader(detector(2, 2), loader, "val_dataloader")
    check_loader(detector(2, 80, class_agnostic=True), loader, "val_dataloader")
    with pytest.raises(SettingError, match=r"model\.roi_head\.bbox_head\.1\.num_classes is 80: set it to 2"):
        check_loader(detector(80, 2), loader, "val_dataloader")
    with pytest.raises(SettingError, match=r"model\.roi_head\.mask_head\.num_classes is 80"):
        check_loader(detector(2, 80), loader, "val_dataloader")
    classifier = nn.Module()
    classifier.num_classes = 1000
    with pytest.raises(SettingError, match=r"2 classes \(x, y\), and model\.num_classes is 1000"):
        check_loader(classifier, loader, "val_dataloader")


@pytest.mark.parametrize("name", ["vit-s_setr_shapes-64x64", "stitched-vit-s-l_setr_shapes-64x64"])
@pytest.mark.parametrize(("classes", "refused"), [(8, False), (2, True)])
def test_heads_of_real_configs(name: str, classes: int, refused: bool) -> None:
    model = build_without_weights(load_config(REPOSITORY / f"configs/quickstart/{name}.py"))
    loader = DataLoader(Listed([dict()], classes=tuple("abcdefgh"[:classes])), batch_size=1)
    with pytest.raises(SettingError) if refused else nullcontext():
        check_loader(model, loader, "val_dataloader", load=False)


@pytest.mark.parametrize("task", ["mask-rcnn", "faster-rcnn", "rtmdet"])
def test_heads_of_real_detectors(task: str) -> None:
    model = build_without_weights(
        load_config(REPOSITORY / f"configs/coco/stitched-deit3-s-l_{task}_8xb8-100e_coco-1024x1024.py")
    )
    loader = DataLoader(Listed([dict()], classes=tuple(map(str, range(80)))), batch_size=1)
    check_loader(model, loader, "val_dataloader", load=False)
    other = DataLoader(Listed([dict()], classes=("cat", "dog")), batch_size=1)
    with pytest.raises(SettingError, match=r"2 classes \(cat, dog\), and model\.\S+head\S*num_classes is 80"):
        check_loader(model, other, "val_dataloader", load=False)


def test_heads_that_may_have_other_numbers(make_model: Callable[..., nn.Module]) -> None:
    """One output for two classes; heads for some of the classes; an auxiliary head with a loss of its own; depth."""
    two = DataLoader(Listed([dict()], classes=("background", "road")), batch_size=1)
    binary = dict(num_classes=2, out_channels=1, threshold=0.3, loss_decode=BINARY)
    binary = {f"{head}__{key}": value for head in ("decode_head", "auxiliary_head") for key, value in binary.items()}
    check_loader(make_model(**binary), two, "val_dataloader", load=False)
    with pytest.raises(SettingError, match=r"decode_head\.num_classes is 8"):
        check_loader(make_model(), two, "val_dataloader", load=False)
    panoptic = make_model()
    panoptic.semantic_head = nn.Identity()
    check_loader(panoptic, two, "val_dataloader", load=False)

    class Edges(FCNHead):
        def loss_by_feat(self, *args: Any) -> dict[str, Any]:
            return {}

    model = make_model(decode_head__num_classes=2)
    model.auxiliary_head = Edges(in_channels=48, channels=8, num_classes=1, out_channels=1)
    check_loader(model, two, "val_dataloader", load=False)
    depth = load_config(REPOSITORY / "configs/nyu/stitched-deit3-s-l_dpt_8xb2-24e_nyu-416x544.py")
    check_loader(build_without_weights(depth), two, "val_dataloader", load=False)


BINARY = dict(type="CrossEntropyLoss", use_sigmoid=True)
REPOSITORY = Path(__file__).parents[2]


def test_files_elsewhere_are_not_looked_for(
    make_model: Callable[..., nn.Module], make_loader: Callable[..., DataLoader]
) -> None:
    loader = make_loader()
    for dataset in (loader.dataset,):
        dataset.data_list = [info | dict(img_path="gone.jpg") for info in map(dataset.get_data_info, range(6))]
        dataset.serialize_data = False
    with pytest.raises(MissingFileError, match=r"6 of 12 files are missing, such as 'gone\.jpg'"):
        check_loader(make_model(), loader, "train_dataloader", load=False)
    loader.dataset.backend_args = dict(backend="petrel", path_mapping={"./": "s3://bucket"})
    check_loader(make_model(), loader, "train_dataloader", load=False)


def test_errors_of_batches_of_another_kind_pass(make_model: Callable[..., nn.Module]) -> None:
    """Those of test-time augmentation are lists of lists."""
    batch = dict(inputs=[[torch.zeros(3, 8, 8)], [torch.zeros(3, 8, 8)]], data_samples=[[None], [None]])
    for error in (RuntimeError("out of memory"), SettingError("said already")):
        with pytest.raises(type(error), match=str(error)), sizes_explained(make_model(), batch, False, "x"):
            raise error


class Listed:
    """A data set of given samples."""

    def __init__(self, samples: list[Any], **metainfo: Any) -> None:
        self.samples, self.metainfo = samples, metainfo

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


@pytest.mark.parametrize(
    ("classes", "refused", "warned"),
    [("ab", False, 0), ("ba", True, 0), ("abc", True, 0), ("aB", False, 1)],
)
def test_classes_of_training_and_validation(
    classes: str, refused: bool, warned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same names in another order would count right predictions as wrong; other names give a warning."""
    warnings: list[str] = []
    monkeypatch.setattr("mmsnnet.engine.agreement.print_log", lambda text, **_: warnings.append(text))
    train, val = (DataLoader(Listed([dict()], classes=tuple(names))) for names in ("ab", classes))
    with (
        pytest.raises(SettingError, match=r"train_dataloader\.dataset and val_dataloader") if refused else nullcontext()
    ):
        check_same_classes(train, val)
    assert len(warnings) == warned


@pytest.mark.parametrize("classes", [None, "road"])
def test_classes_are_a_list_of_names(
    classes: Any, make_model: Callable[..., nn.Module], make_loader: Callable[..., DataLoader]
) -> None:
    with pytest.raises(SettingError, match=r"train_dataloader\.dataset\.metainfo\.classes must be a list of names"):
        check_loader(
            make_model(), make_loader(metainfo=dict(classes=classes) if classes else dict()), "train_dataloader"
        )


@pytest.mark.parametrize(
    ("test_cfg", "right"),
    [
        (dict(mode="whole"), True),
        (dict(mode="slide", crop_size=(32, 32), stride=(21, 32)), True),
        (dict(mode="foo"), False),
        (dict(mode="slide_flip", crop_size=(32, 32), stride=(16, 16)), False),
        (dict(mode="slide"), False),
        (dict(mode="slide", crop_size=32, stride=16), False),
        (dict(mode="slide", crop_size=(32, 32), stride=(0, 16)), False),
        (dict(mode="slide", crop_size=(16, 16), stride=(24, 24)), False),
    ],
)
def test_how_a_segmentor_infers(
    test_cfg: dict[str, Any],
    right: bool,
    make_model: Callable[..., nn.Module],
    make_loader: Callable[..., DataLoader],
) -> None:
    model = make_model()
    model.test_cfg = test_cfg
    with nullcontext() if right else pytest.raises(SettingError, match=r"model\.test_cfg"):
        check_loader(model, make_loader(), "val_dataloader")


def test_weights_of_classes(make_model: Callable[..., nn.Module], make_loader: Callable[..., DataLoader]) -> None:
    loss = dict(type="CrossEntropyLoss", class_weight=[1.0, 2.0])
    with pytest.raises(SettingError, match=r"decode_head\.loss_decode\.class_weight has 2 values: give 8"):
        check_loader(make_model(decode_head__loss_decode=loss), make_loader(), "train_dataloader")


def test_training_images_need_a_size_to_be_padded_to(
    make_model: Callable[..., nn.Module], make_loader: Callable[..., DataLoader]
) -> None:
    model = make_model(data_preprocessor__size=None)
    check_loader(model, make_loader(), "val_dataloader")
    with pytest.raises(SettingError, match="neither size nor size_divisor"):
        check_loader(model, make_loader(), "train_dataloader", training=True)


def test_one_output_needs_a_sigmoid(make_model: Callable[..., nn.Module]) -> None:
    two = DataLoader(Listed([dict()], classes=("background", "road")), batch_size=1)
    model = make_model(decode_head__num_classes=2, decode_head__out_channels=1, decode_head__threshold=0.5)
    with pytest.raises(SettingError, match=r"decode_head has one output, .*loss_decode\.use_sigmoid=True"):
        check_loader(model, two, "val_dataloader", load=False)


@pytest.mark.parametrize("values", [2, 4])
def test_channels_of_preprocessor_and_anchors(
    values: int, make_model: Callable[..., nn.Module], make_loader: Callable[..., DataLoader]
) -> None:
    model = make_model()
    model.data_preprocessor.mean = torch.zeros(values, 1, 1)
    with pytest.raises(SettingError, match=rf"mean has {values} values, and the anchors take images of 3"):
        check_loader(model, make_loader(), "train_dataloader")


def test_channels_of_images(make_model: Callable[..., nn.Module], make_loader: Callable[..., DataLoader]) -> None:
    four = dict(in_chans=4)
    model = make_model(
        backbone=dict(small=four, large=four), data_preprocessor__mean=[0.0], data_preprocessor__std=[1.0]
    )
    with pytest.raises(SettingError, match=r"val_dataloader: its images have 3 channels, and the anchors take 4"):
        check_loader(model, make_loader(), "val_dataloader")


def test_a_loader_without_a_batch(make_model: Callable[..., nn.Module], make_loader: Callable[..., DataLoader]) -> None:
    with pytest.raises(SettingError, match=r"train_dataloader has no batch: .* 6 samples, batch_size=7"):
        check_loader(make_model(), make_loader(batch_size=7, drop_last=True), "train_dataloader")


@pytest.mark.parametrize("binary", [True, False])
def test_masks_of_0_and_255_are_warned_of(
    binary: bool,
    tmp_path: Path,
    make_model: Callable[..., nn.Module],
    make_loader: Callable[..., DataLoader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: list[str] = []
    monkeypatch.setattr("mmsnnet.engine.agreement.print_log", lambda text, **_: logged.append(text))
    root = write_shapes(tmp_path / "set", "shapes", train=3, val=1, size=(32, 32))
    for path in (root / "annotations/training").iterdir():
        labels = np.zeros((32, 32), np.uint8)
        labels[8:24] = 255
        labels[:, 0] = 0 if binary else 3
        Image.fromarray(labels).save(path)
    check_loader(make_model(), make_loader(data_root=str(root)), "train_dataloader", training=True)
    assert len(logged) == binary and all("train_dataloader" in text and "values=(0, 255)" in text for text in logged)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ADE_train_00000001\n\n", "has an empty line: remove it"),
        ("ADE_train_00000001\n   \nADE_train_00000002", "has an empty line: remove it"),
        ("\ufeffADE_train_00000001\n", "starts with a byte order mark"),
        ("ADE_train_00000001.jpg\n", "names files with their suffix"),
        ("ADE_train_00000001\nADE_train_99999999\n", "2 of 4 files are missing"),
    ],
)
def test_lists_of_images(
    text: str, why: str, tmp_path: Path, make_model: Callable[..., nn.Module], make_loader: Callable[..., DataLoader]
) -> None:
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    with pytest.raises(MissingFileError, match=why):
        check_loader(make_model(), make_loader(ann_file=str(tmp_path / "list.txt"), batch_size=1), "train_dataloader")
    (tmp_path / "list.txt").write_text("ADE_train_00000001\nADE_train_00000002\n")
    check_loader(make_model(), make_loader(ann_file=str(tmp_path / "list.txt")), "train_dataloader")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Five images, the fourth of another size."""
    root = write_shapes(tmp_path / "mixed", "shapes", train=5, val=1, size=(32, 32))
    for path in sorted(root.glob("*/training/*4.*")):
        Image.open(path).crop((0, 0, 40, 24)).save(path)
    return root


@pytest.mark.slow
def test_sizes_of_images(
    mixed: Path, make_model: Callable[..., nn.Module], make_loader: Callable[..., DataLoader]
) -> None:
    loader = make_loader(data_root=str(mixed))
    with pytest.raises(SettingError, match=r"val_dataloader: .*4\.jpg is 24 x 40 .* 32 x 32, .* set batch_size=1"):
        check_loader(make_model(), loader, "val_dataloader")
    check_loader(make_model(), make_loader(data_root=str(mixed), batch_size=1), "val_dataloader")
    with pytest.raises(SettingError, match=r"4\.jpg is 24 x 40 .*data_preprocessor\.size=\(32, 32\).*RandomCrop"):
        check_loader(make_model(), loader, "train_dataloader", training=True)
    check_loader(make_model(data_preprocessor__size=(40, 40)), loader, "train_dataloader", training=True)
    divided = make_model(data_preprocessor__size=None, data_preprocessor__size_divisor=16)
    check_loader(divided, loader, "train_dataloader", training=True)
    crop = make_loader(
        data_root=str(mixed), pipeline=[*PIPELINE[:2], dict(type="RandomCrop", crop_size=(32, 32)), PIPELINE[2]]
    )
    check_loader(make_model(), crop, "train_dataloader", training=True)


PIPELINE = [
    dict(type="mmsnnet.LoadImage"),
    dict(type="mmsnnet.LoadSegLabels", num_classes=8),
    dict(type="PackSegInputs"),
]


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_that_cannot_be_stacked_is_explained(
    training: bool, mixed: Path, make_model: Callable[..., nn.Module], make_loader: Callable[..., DataLoader]
) -> None:
    """The checks before an evaluation do not open every image of a large set."""
    model = make_model()
    (batch,) = make_loader(data_root=str(mixed), batch_size=5)
    with pytest.raises(DataError, match=r"4\.jpg"), sizes_explained(model, batch, training, "x_dataloader"):
        model.data_preprocessor(batch, training)
    (batch,) = make_loader(batch_size=6)
    with pytest.raises(RuntimeError, match="of another kind"), sizes_explained(model, batch, training, "x_dataloader"):
        raise RuntimeError("of another kind")


@pytest.mark.slow
def test_few_files_of_a_large_set_are_opened(
    tmp_path: Path, make_model: Callable[..., nn.Module], make_loader: Callable[..., DataLoader], root: Path
) -> None:
    """The set is as large as ADE20K; an audit hook counts every opened file."""
    for part, suffix in (("images", ".jpg"), ("annotations", ".png")):
        (tmp_path / f"{part}/training").mkdir(parents=True)
        source = root / f"{part}/training/ADE_train_00000001{suffix}"
        for number in range(20_000):
            (tmp_path / f"{part}/training/{number:05}{suffix}").hardlink_to(source)
    loader, model = make_loader(data_root=str(tmp_path)), make_model()
    opened: list[str] = []

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).startswith(str(tmp_path)):
            opened.append(str(args[0]))

    watching.append(watch)
    try:
        check_loader(model, loader, "train_dataloader", training=True)
    finally:
        watching.clear()
    assert 0 < len(opened) <= 100


# Python keeps a hook for its audit events for good.
watching: list[Callable[[str, tuple[Any, ...]], None]] = []
sys.addaudithook(lambda event, args: watching[0](event, args) if watching else None)
