from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from mmsnnet.errors import SettingError
from mmsnnet.registry import MODELS

ERASING_MODES = ("const", "rand", "pixel")


@MODELS.register_module()
class StitchedClassifier(BaseModel):
    """Image classifier: each stitch ends in the norm and head of its last anchor.

    Images (B, 3, H, W) give logits (B, K) (SN-Netv2, arXiv 2307.00154). The loss is the cross entropy against targets
    (B, K), which label smoothing and mixing (CutMix, arXiv 1905.04899; mixup, arXiv 1710.09412) make soft.

    Args:
        backbone: an ``mmsnnet.StitchedViT``, the same dict as in a segmentor or a detector.
        num_classes: K, as in the data set.
        mixing: arguments of ``timm.data.Mixup``, such as ``dict(mixup_alpha=0.0, cutmix_alpha=1.0,
            label_smoothing=0.1)``; None for hard labels. Its draws are a function of the backbone's ``seed`` and
            number of draws and of the rank, so that a resumed run repeats them.
        erasing: arguments of ``timm.data.random_erasing.RandomErasing`` (arXiv 1708.04896), such as
            ``dict(probability=0.25, mode="pixel")``. It erases boxes of normalised images, before mixing, and draws
            them as mixing draws; the values of pixels come from torch's generator. ``num_splits=2`` spares the first
            half of each batch.
        data_preprocessor, init_cfg: as of any mmengine model.

    Raises:
        ValueError: ``mixing`` has a probability above 0, but no alpha above 0; or ``erasing`` has another mode or
            probability than timm knows.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        num_classes: int = 1000,
        mixing: Mapping[str, Any] | None = None,
        erasing: Mapping[str, Any] | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.backbone = MODELS.build({**backbone, "num_classes": num_classes})
        self.num_classes = num_classes
        self.mixing = None if mixing is None else Mixup(**mixing, num_classes=num_classes)
        if self.mixing and self.mixing.mix_prob > 0 >= max(self.mixing.mixup_alpha, self.mixing.cutmix_alpha):
            raise SettingError(
                f"mixing needs mixup_alpha or cutmix_alpha above 0, or prob=0.0 for label smoothing alone; got {mixing}"
            )
        if erasing is not None:
            mode, probability = erasing.get("mode", "const"), erasing.get("probability", 0.5)
            if mode not in ERASING_MODES or not 0 <= probability <= 1:
                raise SettingError(
                    f"erasing needs mode {', '.join(ERASING_MODES[:-1])} or {ERASING_MODES[-1]}, and a probability "
                    f"from 0 to 1; got {dict(erasing)}"
                )
        self.erasing = None if erasing is None else RandomErasing(**erasing)
        self.criterion = nn.CrossEntropyLoss() if mixing is None else SoftTargetCrossEntropy()

    def forward(
        self, inputs: Tensor, data_samples: Sequence[BaseDataElement] | None = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[BaseDataElement]:
        """Logits (B, K) in mode ``'tensor'``, :meth:`loss` in mode ``'loss'``, :meth:`predict` in ``'predict'``."""
        if mode == "loss":
            return self.loss(inputs, data_samples or ())
        if mode == "predict":
            return self.predict(inputs, data_samples)
        if mode == "tensor":
            return self.backbone(inputs)
        raise ValueError(f"mode must be 'loss', 'predict' or 'tensor', got {mode!r}")

    def loss(self, inputs: Tensor, data_samples: Sequence[BaseDataElement]) -> dict[str, Tensor]:
        """The loss of images (B, 3, H, W) with the samples' ``gt_label``.

        Erasing and mixing change the images in place.

        Raises:
            ValueError: the data set has another number of classes, or mixing gets an odd batch.
        """
        self._check(data_samples)
        if self.mixing and len(inputs) % 2:
            raise SettingError(
                f"mixing needs batches of an even size, got {len(inputs)} images: change train_dataloader.batch_size, "
                "or set train_dataloader.drop_last=True"
            )
        labels = torch.tensor([sample.gt_label for sample in data_samples], pin_memory=inputs.is_cuda)
        targets = labels.to(inputs.device, non_blocking=True)
        with self._drawing(inputs.device) if self.erasing or self.mixing else nullcontext():
            if self.erasing:
                self.erasing.device = inputs.device
                inputs = self.erasing(inputs)
            if self.mixing:
                inputs, targets = self.mixing(inputs, targets)
        return dict(loss=self.criterion(self.backbone(inputs), targets))

    def predict(self, inputs: Tensor, data_samples: Sequence[BaseDataElement] | None = None) -> list[BaseDataElement]:
        """The samples, or new ones, with ``logits`` (K,) and a scalar ``pred_label``.

        Raises:
            ValueError: the data set has another number of classes.
        """
        if data_samples is None:
            data_samples = [BaseDataElement() for _ in inputs]
        self._check(data_samples)
        logits = self.backbone(inputs)
        for sample, row, label in zip(data_samples, logits, logits.argmax(dim=1), strict=True):
            sample.logits, sample.pred_label = row, label
        return list(data_samples)

    def _check(self, data_samples: Sequence[BaseDataElement]) -> None:
        for sample in data_samples:
            classes = sample.get("num_classes", self.num_classes)
            if classes != self.num_classes:
                raise SettingError(
                    f"the data set has {classes} classes ({sample.get('img_path')} is one of its images), the model "
                    f"{self.num_classes}: set model.num_classes, or data_root to the right folder"
                )

    @contextmanager
    def _drawing(self, device: torch.device) -> Iterator[None]:
        """Seed the generators from which timm draws boxes, shares and noise, and restore them afterwards.

        mmengine seeds Python's and NumPy's global generators equally on all ranks and does not resume them. The draws
        are the same for all stitches of a step, which share one batch.
        """
        backbone = self.backbone
        step = backbone.draws - backbone.draws % backbone.stitches_per_step
        place = [backbone.seed % 2**32, step, dist.get_rank()]
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            random.seed(str(place))
            np.random.seed(place)
            seed = random.Random(str(place)).getrandbits(63)
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
            try:
                yield
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])
