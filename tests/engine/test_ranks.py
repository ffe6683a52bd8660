"""What all ranks have to agree on: the sizes of their data, and the buffers that they validate with."""

from collections.abc import Callable
from pathlib import Path

import torch

PROGRAM = """
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from mmengine.logging import MessageHub
from torch import nn
from torch.utils.data import DataLoader

from mmsnnet.engine.hooks.validation_hook import ValidationHook
from mmsnnet.engine.ranks import compare_loaders
from mmsnnet.errors import SettingError

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
model.register_buffer("transposed", torch.zeros(2, 3).T)
model.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
model.register_buffer("rotations", torch.zeros(2, dtype=torch.complex64))
model.register_buffer("nothing", torch.zeros(0))
with torch.no_grad():
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.copy_(torch.full_like(tensor, bool(rank)) if tensor.dtype == torch.bool else tensor + 1 + rank)
model[1](torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(rank)))
runner = SimpleNamespace(model=model, train_loop=None, iter=3, message_hub=MessageHub("ranks"))
states = {"before": {name: value.clone() for name, value in model.state_dict().items()}}
hook = ValidationHook()
for point in (hook.before_val_epoch, hook.before_checkpoint):
    point(runner)
    states[point.__name__] = {name: value.clone() for name, value in model.state_dict().items()}
    model[1].running_mean += rank

errors = []
for sizes, same_batches in (((40, 39), False), ((40, 40), True), ((40, 40), False)):
    loader = DataLoader(range(sizes[rank]), batch_size=2 + 2 * rank)  # 20 batches and 10
    try:
        compare_loaders(loader, "train_dataloader", same_batches)
        errors.append(None)
    except SettingError as error:
        errors.append(str(error))
torch.save((states, errors), folder / f"found_{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_ranks_get_the_buffers_of_the_first_and_compare_their_data(
    run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    run_ranks("-c", PROGRAM, tmp_path)
    (first, errors), (second, others) = (torch.load(tmp_path / f"found_{rank}.pt") for rank in range(2))
    assert not any(
        torch.equal(value, second["before"][name]) for name, value in first["before"].items() if value.numel()
    )
    for point in ("before_val_epoch", "before_checkpoint"):
        for name, value in first["before"].items():
            assert torch.equal(first[point][name], value)  # those that rank 0's checkpoint has
            is_parameter = name in ("0.weight", "0.bias", "1.weight", "1.bias")
            assert torch.equal(second[point][name], second["before"][name] if is_parameter else value)
    assert errors == others
    assert errors == [
        "train_dataloader: some ranks have 39 samples and some 40: give all the same files",
        "train_dataloader: some ranks have 10 batches and some 20: set train_dataloader.sampler.round_up=True",
        None,
    ]
