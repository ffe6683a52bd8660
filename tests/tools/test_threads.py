"""The tools set the waiting of OpenMP's threads before torch is loaded."""

import ast
import os
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.parametrize("name", ["train", "test", "analysis_tools/benchmark"])
@pytest.mark.parametrize(
    "given", [{}, {"OMP_NUM_THREADS": "2"}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}], ids=str
)
def test_a_tool_sets_it_first_unless_the_user_has(
    name: str, given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MMSNNET_LAUNCHER"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    before = os.environ.copy()
    body = ast.parse((TOOLS / f"{name}.py").read_text()).body
    imports = [index for index, part in enumerate(body) if isinstance(part, ast.Import | ast.ImportFrom)]
    assert ast.unparse(body[imports[0]]) == "import os"
    exec(compile(ast.Module(body[: imports[1]], []), name, "exec"), {})
    chosen = {} if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & given.keys() else {"GOMP_SPINCOUNT": "4000"}
    if name in ("train", "test"):  # whose launcher may be killed while they import
        chosen["MMSNNET_LAUNCHER"] = str(os.getppid())
    try:
        assert dict(os.environ) == before | chosen
    finally:
        for variable in chosen:
            del os.environ[variable]
