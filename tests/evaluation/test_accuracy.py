"""Top-k accuracy: against counting by hand, over ranks, and what it refuses."""

from typing import Any

import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmsnnet.registry import METRICS


def sample(logits: Tensor | list[float], label: int) -> BaseDataElement:
    return BaseDataElement(logits=torch.as_tensor(logits), gt_label=label)


def evaluate(samples: list[BaseDataElement], batch_size: int = 2, **settings: Any) -> dict[str, float]:
    evaluator = Evaluator(METRICS.build(dict(type="mmsnnet.Accuracy", **settings)))
    for first in range(0, len(samples), batch_size):
        evaluator.process(samples[first : first + batch_size])
    return evaluator.evaluate(len(samples))


def test_against_counting_by_hand() -> None:
    logits = [0.1, 0.5, 0.3, 0.2]  # in order of likelihood: 1, 2, 3, 0
    samples = [sample(logits, label) for label in (1, 2, 2, 3, 0)]
    assert evaluate(samples, topk=(1, 2, 4)) == {"top1": 20.0, "top2": 60.0, "top4": 100.0}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_do_not_matter(batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 10, generator=generator)
    labels = torch.randint(0, 10, (50,), generator=generator).tolist()
    # The place of the label among the logits, counted without a sort.
    places = [int((row > row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    expected = {f"top{k}": 2.0 * sum(place < k for place in places) for k in (1, 5)}
    samples = [sample(row, label) for row, label in zip(logits, labels, strict=True)]
    assert evaluate(samples, batch_size) == pytest.approx(expected)


def test_one_k_will_do() -> None:
    assert evaluate([sample([0.0, 1.0], 1)], topk=1) == {"top1": 100.0}


def test_images_that_fill_up_the_last_batch_of_a_rank_are_not_counted() -> None:
    """With several ranks, the sampler repeats images to give each rank as many."""
    metric = METRICS.build(dict(type="mmsnnet.Accuracy", topk=1))
    right, wrong = sample([0.0, 1.0], 1).to_dict(), sample([0.0, 1.0], 0).to_dict()
    metric.process(None, [right, wrong, wrong])
    assert metric.evaluate(2) == {"top1": 50.0}


def test_more_than_there_are_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top-5 .* the model has 3: set topk of val_evaluator and test_evaluator"):
        evaluate([sample([0.0, 1.0, 2.0], 1)])


@pytest.mark.parametrize("topk", [0, (), (1, 0)])
def test_k_is_at_least_one(topk: Any) -> None:
    with pytest.raises(ValueError, match="at least 1; got"):
        METRICS.build(dict(type="mmsnnet.Accuracy", topk=topk))
