"""Without a package of the extra ``viz``, one line names the extra."""

import sys
from pathlib import Path

import pytest

from mmsnnet.errors import MissingPackageError
from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.stitching import StitchSpace
from mmsnnet.visualization import (
    draw_route,
    operating_points_table,
    pareto_figure,
    plot_pareto,
    plot_routes,
    print_table,
)

SPACE = StitchSpace.two_way((2, 4))
RUN = OperatingPoints(None, None, "d", (8, 8), None, (OperatingPoint(0, "S", "S", 1, 1, {"mIoU": 1.0}),))
CALLS = {
    "picture": ("matplotlib", lambda folder: plot_pareto([RUN], "mIoU", folder / "a.png")),
    "page": ("plotly", lambda folder: plot_pareto([RUN], "mIoU", folder / "a.html")),
    "figure": ("plotly", lambda folder: pareto_figure([RUN])),
    "route": ("matplotlib", lambda folder: draw_route(SPACE, SPACE[0])),
    "routes": ("matplotlib", lambda folder: plot_routes(SPACE, [0], folder / "a.png")),
    "table": ("rich", lambda folder: operating_points_table(RUN)),
    "printed table": ("rich", print_table),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_package_is_an_error_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    package, function = CALLS[call]
    for name in [name for name in sys.modules if name.partition(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=rf"^{package} is missing: pip install 'mmsnnet\[viz\]'$"):
        function(tmp_path)
    assert list(tmp_path.iterdir()) == []
