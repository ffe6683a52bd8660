"""The benchmark of an export runs its graphs in turns, with batches of each size."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from mmsnnet.apis.benchmark import BenchmarkSettings
from mmsnnet.apis.export_benchmark import benchmark_export, export_conditions
from mmsnnet.deployment.exported_model import ExportedGraphs
from mmsnnet.deployment.graphs import IMAGES
from mmsnnet.deployment.manifest import MANIFEST, ExportedStitch, Manifest
from mmsnnet.errors import SettingError
from mmsnnet.stitching import StitchSpace

STITCHES = StitchSpace.two_way((2, 4)).select("S,L")
SIZE = (8, 8)


@pytest.fixture
def make_export(tmp_path: Path) -> Callable[..., ExportedGraphs]:
    """``make_export(batch)`` exports graphs that return their images; ``batch`` is a number or the name of an axis."""

    def make(batch: int | str) -> ExportedGraphs:
        for stitch in STITCHES:
            shape = ir.Shape([batch, 3, *SIZE])
            images = ir.Value(name=IMAGES, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
            node = ir.node("Identity", [images])
            node.outputs[0].name, node.outputs[0].shape = "logits", shape
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            graph = ir.Graph([images], node.outputs, nodes=[node], opset_imports={"": 20}, name="graph")
            ir.save(ir.Model(graph, ir_version=10), tmp_path / f"{stitch.name}.onnx")
        stitches = tuple(ExportedStitch(s.id, s.name, s.kind, f"{s.name}.onnx", 1, 1) for s in STITCHES)
        manifest = Manifest("segmentation", "onnx", "fp32", SIZE, stitches, ("logits",), {}, {})
        (tmp_path / MANIFEST).write_text(manifest.to_json())
        return ExportedGraphs(tmp_path)

    return make


def test_each_stitch_is_timed_at_every_batch_size(make_export: Callable[..., ExportedGraphs]) -> None:
    result = benchmark_export(make_export("batch"), STITCHES, BenchmarkSettings((4, 1), warmup=1, repeats=3), SIZE)
    assert [latency.stitch for latency in result.latencies] == list(STITCHES)
    for latency in result.latencies:
        assert {size: len(times) for size, times in latency.times_ms.items()} == {1: 3, 4: 3}
        assert all(latency > 0 for latency in latency.latencies_ms.values()) and latency.peak_memory is None
    conditions = result.conditions
    assert (conditions["backend"], conditions["batch_size"], conditions["batch_sizes"]) == ("onnxruntime", 1, "1,4")


def test_one_batch_size_has_the_conditions_of_before(make_export: Callable[..., ExportedGraphs]) -> None:
    conditions = export_conditions(make_export("batch"), BenchmarkSettings((2,)))
    assert conditions["batch_size"] == 2 and "batch_sizes" not in conditions


def test_a_graph_of_a_fixed_batch_is_one_error_that_says_how_to_export(
    make_export: Callable[..., ExportedGraphs],
) -> None:
    graphs = make_export(1)
    for sizes in ((1, 4), (4,)):
        with pytest.raises(SettingError, match=r"S\.onnx takes batches of 1 alone: set --batch-sizes 1") as refused:
            benchmark_export(graphs, STITCHES, BenchmarkSettings(sizes, warmup=1, repeats=1), SIZE)
        assert "tools/deployment/export.py" in str(refused.value) and "\n" not in str(refused.value)
    fixed = benchmark_export(graphs, STITCHES, BenchmarkSettings(warmup=1, repeats=1), SIZE)
    assert all(list(latency.times_ms) == [1] for latency in fixed.latencies)


def test_settings_of_pytorch_are_refused(make_export: Callable[..., ExportedGraphs]) -> None:
    with pytest.raises(SettingError, match="leave out --precision"):
        export_conditions(make_export("batch"), BenchmarkSettings((1, 4), precision="bf16"))
