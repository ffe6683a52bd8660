"""The reading of checkpoints from wherever they are: what loads, and what is refused without being run."""

import argparse
import errno
import io
import json
import pickle
import threading
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from hashlib import sha1
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from torch import Tensor

from mmsnnet.errors import DataError
from mmsnnet.files.reading import (
    HUB_FILES,
    describe_mismatch,
    extract_weights,
    join_names,
    read_checkpoint,
    tensor_shapes,
)
from tests.conftest import RunsCode

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Publish = Callable[[bytes, str], str]


class Hub(SimpleHTTPRequestHandler):
    """Serves files; those below ``resolve`` as the Hugging Face hub does."""

    def end_headers(self) -> None:
        if "/resolve/" in self.path:
            self.send_header("ETag", f'"{sha1(self.path.encode()).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Error-Code", "EntryNotFound" if "/known/" in self.path else "RepoNotFound")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def weights() -> dict[str, Tensor]:
    return {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3)}


def saved(content: Any, suffix: str = ".pth", **kwargs: Any) -> bytes:
    """A checkpoint as the bytes of its file."""
    if suffix == ".safetensors":
        return safetensors.torch.save(content)
    file = io.BytesIO()
    torch.save(content, file, **kwargs)
    return file.getvalue()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a server of the files in ``tmp_path / 'www'``; what is fetched is kept in ``tmp_path / 'home'``."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    (tmp_path / "www").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tmp_path / "www"))) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        yield url
        httpd.shutdown()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of ``owner/name`` that were fetched from the hub before, which is now out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    return repository / "snapshots" / COMMIT


@pytest.fixture(params=["file", "folder", "URL", "hub", "hub offline"])
def publish(request: pytest.FixtureRequest, tmp_path: Path) -> Publish:
    """``publish(content, suffix)``: puts a file somewhere and gives the name that it is read by."""

    def put(content: bytes, suffix: str) -> str:
        name = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
        if request.param == "URL":
            url = request.getfixturevalue("server")
            (tmp_path / "www" / f"w{suffix}").write_bytes(content)
            return f"{url}/w{suffix}?download=true"
        if request.param == "hub":
            request.getfixturevalue("server")
            folder = tmp_path / "www" / "known" / "name" / "resolve" / "main"
            source = "hf-hub:known/name"
        elif request.param == "hub offline":
            folder, source = request.getfixturevalue("offline"), "hf-hub:owner/name"
        elif request.param == "folder":
            folder, source = tmp_path / "folder", str(tmp_path / "folder")
        else:
            folder, name, source = tmp_path, f"w{suffix}", str(tmp_path / f"w{suffix}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return source

    return put


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_arrive_from_everywhere(suffix: str, publish: Publish) -> None:
    expected = weights()
    source = publish(saved(expected, suffix), suffix)
    assert same(read_checkpoint(source), expected)
    assert same(read_checkpoint(source), expected)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "pickle of protocol 4"])
def test_code_is_not_run(how: str, publish: Publish, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    hostile = {"state_dict": weights(), "args": RunsCode(mark)}
    content = {
        "zip": lambda: saved(hostile),
        "legacy": lambda: saved(hostile, _use_new_zipfile_serialization=False),
        "pickle": lambda: pickle.dumps(hostile, protocol=2),
        "pickle of protocol 4": lambda: pickle.dumps(hostile, protocol=4),
    }[how]()
    source = publish(content, ".pth")
    with pytest.raises(ValueError, match=r"refused.*could run code.*torch\.save\(.*safetensors") as caught:
        read_checkpoint(source)
    assert source in str(caught.value) and "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's own message says how to run it all the same
    assert not mark.exists()
    pickle.loads(pickle.dumps(hostile["args"]))  # the check can fail: unpickled, it does make the file
    assert mark.exists()


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    torch.save({"args": tmp_path}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"asks for pathlib\S*\.{type(tmp_path).__name__}, which could"):
        read_checkpoint(tmp_path / "w.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="refused: it is a TorchScript archive"):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_cut_short_is_not_taken_for_a_hostile_one(suffix: str, keep: float, publish: Publish) -> None:
    content = saved(weights(), suffix)
    source = publish(content[: int(keep * len(content))], suffix)
    with pytest.raises(ValueError, match=r"cut short or no checkpoint \(.+\)$") as caught:
        read_checkpoint(source)
    assert source in str(caught.value) and "refused" not in str(caught.value)


def test_a_legacy_file_cut_anywhere(tmp_path: Path) -> None:
    content = saved({"model": weights()}, _use_new_zipfile_serialization=False)
    path = tmp_path / "w.pth"
    for size in range(0, len(content), 3):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="cut short or no checkpoint") as caught:
            read_checkpoint(path)
        assert "refused" not in str(caught.value)


@pytest.mark.parametrize("start", [b"hello world\n", b"<!DOCTYPE html>", b"X\xff\x00\x00\x00"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_checkpoint_at_all(start: bytes, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"w{suffix}").write_bytes(start)
    with pytest.raises(ValueError, match=rf"w{suffix}' cannot be read"):
        read_checkpoint(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {1: 2}])
def test_weights_come_by_name(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth' should be a dict of weights by name, got a"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_records_beside_weights(module: bytes, tmp_path: Path) -> None:
    """Command-line arguments, arrays and scalars, as programs on NumPy 1 and NumPy 2 wrote them."""
    records = {
        "args": argparse.Namespace(lr=0.1, name="deit"),
        "losses": [np.float64(0.5), np.float32(0.25), np.int64(7), np.bool_(True)],
        "array": np.arange(6.0).reshape(2, 3),
        "mask": np.array([True, False]),
        "cut": slice(1, 3),
    }
    with zipfile.ZipFile(io.BytesIO(saved(records))) as old, zipfile.ZipFile(tmp_path / "w.pth", "w") as new:
        for name in old.namelist():
            data = old.read(name).replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", module)
            new.writestr(name, data)
            assert not name.endswith("data.pkl") or data.count(module + b".multiarray") == 2
    read = read_checkpoint(tmp_path / "w.pth")
    assert read["args"] == records["args"] and read["cut"] == records["cut"]
    assert read["losses"] == records["losses"]
    assert [type(loss) for loss in read["losses"]] == [np.float64, np.float32, np.int64, np.bool_]
    assert np.array_equal(read["array"], records["array"]) and np.array_equal(read["mask"], records["mask"])


def test_a_program_may_allow_more(tmp_path: Path) -> None:
    """What it puts in the place of a name that the file has is for this one reading."""
    torch.save({"third": Fraction}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"asks for fractions\.Fraction"):
        read_checkpoint(tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth", [(dict, "fractions.Fraction")])["third"] is dict
    with pytest.raises(ValueError, match=r"asks for fractions\.Fraction"):
        read_checkpoint(tmp_path / "w.pth")


def test_what_torch_was_told_to_trust_stays_trusted(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "w.pth")
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_checkpoint(tmp_path / "w.pth")
        assert set(torch.serialization.get_safe_globals()) == before | {argparse.Namespace}
    read_checkpoint(tmp_path / "w.pth")
    assert set(torch.serialization.get_safe_globals()) == before


def test_no_attribute_stands_before_a_method(tmp_path: Path) -> None:
    """Attributes of dicts and tensors come from a pickle; torch's versions of modules are the only ones that stay."""
    shadowed = OrderedDict(a=torch.zeros(1), deep=[(Counter(b=1), OrderedDict(c=2))])
    shadowed.__dict__["get"] = slice
    shadowed["deep"][0][0].__dict__["items"] = slice
    shadowed["deep"][0][1].__dict__["pop"] = slice
    shadowed["weight"] = torch.nn.Parameter(torch.ones(2))
    shadowed["weight"].clone = slice
    shadowed._metadata = OrderedDict({"": {"version": 2}})
    shadowed._metadata.__dict__["get"] = slice
    torch.save({"state_dict": shadowed}, tmp_path / "w.pth")
    found = read_checkpoint(tmp_path / "w.pth")["state_dict"]
    counter, inner = found["deep"][0]
    assert vars(found) == {"_metadata": {"": {"version": 2}}}
    assert [vars(one) for one in (found._metadata, counter, inner, found["weight"])] == [{}] * 4
    assert (counter, inner) == (Counter(b=1), OrderedDict(c=2))
    assert torch.equal(found["weight"].clone(), torch.ones(2))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"state_dict": None}, "has a NoneType as 'state_dict'"),
        ({"state_dict": [1]}, "has a list as 'state_dict'"),
        ({"state_dict": torch.zeros(2)}, "has a Tensor as 'state_dict'"),
        ({"state_dict": {1: torch.zeros(2)}}, "should have weights by name, got keys that are not strings: 1$"),
        ({"model": {"epoch": 3}}, "has no weights$"),
        ({}, "has no weights$"),
    ],
)
def test_weights_come_by_name_out_of_their_wrapping_too(content: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^checkpoint 'w.pth' {says}"):
        extract_weights(content, "checkpoint 'w.pth'")


def test_wrappings_lie_in_one_another() -> None:
    expected = weights()
    for wrapped in (expected, {"model": expected, "epoch": 3}, {"state_dict": {"module": expected}, "model": "vit"}):
        assert same(extract_weights(wrapped, "w.pth"), expected)
    # A program that looks in one place finds what lies there.
    assert extract_weights({"state_dict": {"model": expected}}, "w.pth", ("state_dict",)) == {"model": expected}
    endless: dict[str, Any] = {}
    endless["model"] = endless
    assert extract_weights(endless, "w.pth") == endless


def test_what_does_not_fit_is_said_by_name_and_shape() -> None:
    given = {"a": (1,), "b": (2, 3), "c": (4,)}
    assert describe_mismatch(given, given) == ""
    assert (
        describe_mismatch(given, {"a": (1,), "b": (3, 2), "d": (5,)})
        == "missing: d (5,); left over: c (4,); of another shape: b (2, 3) instead of (3, 2)"
    )
    assert join_names(["a", "b", "c", "d"], 2) == "a, b and 2 more" and join_names(["a", "b"], 2) == "a, b"


def test_numbers_of_another_kind_are_said() -> None:
    saved = tensor_shapes(
        {"a": torch.zeros(2, dtype=torch.int8), "b": torch.zeros(()), "c": {}, "d": torch.ones(3).half()}
    )
    model = tensor_shapes(
        {"a": torch.zeros(2), "b": torch.zeros((), dtype=torch.int64), "c": torch.zeros(1), "d": torch.ones(3)}
    )
    expected = "of another kind: a (2,) int8 in place of (2,), b () in place of () int64, c dict in place of (1,)"
    assert describe_mismatch(saved, model) == expected


# Files that are damaged, or made to cost more than their size


@pytest.mark.parametrize("checksums", [True, False])
def test_every_flipped_byte_is_found_or_harmless(checksums: bool, tmp_path: Path) -> None:
    """Without checksums, as ``torch.serialization.set_crc32_options(False)`` writes a file, it is still read."""
    expected, path = weights(), tmp_path / "w.pth"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    try:
        content = bytearray(saved(expected))
    finally:
        torch.serialization.set_crc32_options(before)
    path.write_bytes(content)
    assert same(read_checkpoint(path), expected)
    for at in range(0, len(content), 3 if checksums else len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            assert same(read_checkpoint(path), expected), at
        except DataError as error:
            assert "\n" not in str(error) and str(path) in str(error)


@pytest.mark.parametrize("how", ["deflated", "overlapping", "of one name"])
def test_records_that_unfold_are_refused(how: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(io.BytesIO(saved({"w": torch.zeros(2**20)}))) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED if how == "deflated" else zipfile.ZIP_STORED)
        if how == "of one name":
            with pytest.warns(UserWarning, match="Duplicate"):
                new.writestr(name, b"3")
        elif how == "overlapping":
            copy = new.getinfo(f"{name.split('/')[0]}/data/0")
            for index in range(1, 9):
                other = zipfile.ZipInfo(copy.filename[:-1] + str(index))
                other.file_size, other.compress_size, other.CRC = copy.file_size, copy.compress_size, copy.CRC
                other.header_offset = copy.header_offset
                new.filelist.append(other)
    with pytest.raises(DataError, match=r"records are compressed or overlap"):
        read_checkpoint(path)


def test_a_header_larger_than_the_weights_is_refused(tmp_path: Path) -> None:
    entries = {f"w{i}": {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]} for i in range(20_000)}
    header = json.dumps(entries).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DataError, match=r"its header takes 1,\d+,\d+ of its 1,\d+,\d+ bytes"):
        read_checkpoint(tmp_path / "w.safetensors")


KINDS = {
    "int8": torch.zeros(2, 3, dtype=torch.int8),
    "bool": torch.zeros(2, 3, dtype=torch.bool),
    "complex64": torch.zeros(2, 3, dtype=torch.complex64),
    "quint8": torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.quint8),
    "sparse_coo float32": torch.eye(3).to_sparse(),
    "sparse_csr float32": torch.eye(3).to_sparse_csr(),
    "meta float32": torch.empty(2, 3, device="meta"),
    "nested float32": torch.nested.as_nested_tensor([torch.zeros(2), torch.zeros(3)]),
}


@pytest.mark.parametrize("wrapper", [None, "model", "ema_state_dict"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_dense_floats(kind: str, wrapper: str | None, tmp_path: Path) -> None:
    named = {"blocks.0.attn.qkv.weight": KINDS[kind], "norm.bias": torch.zeros(3)}
    torch.save({wrapper: named} if wrapper else named, tmp_path / "w.pth")
    with pytest.raises(DataError, match=rf"of another kind: blocks\.0\.attn\.qkv\.weight {kind} in place of float32$"):
        read_checkpoint(tmp_path / "w.pth")


def test_floats_of_any_width_and_integers_beside_weights_are_read(tmp_path: Path) -> None:
    floats = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)
    expected = {f"{index}.weight": torch.ones(2).to(dtype) for index, dtype in enumerate(floats)}
    expected |= {"n": torch.tensor(3), "mask": torch.ones(2).bool(), "freqs": torch.ones(2, dtype=torch.complex64)}
    expected |= {"tied": expected["0.weight"], "p.weight": torch.nn.Parameter(torch.ones(2))}
    torch.save(expected, tmp_path / "w.pth")
    found = read_checkpoint(tmp_path / "w.pth")
    assert {name: one.dtype for name, one in found.items()} == {name: one.dtype for name, one in expected.items()}


BIG = torch.zeros(10_000)
FOLDED: dict[str, Callable[[], Any]] = {
    "an expanded tensor": lambda: {"w": torch.zeros(1).expand(10**6, 10**6)},
    "many views": lambda: {f"v{index}": BIG[index:] for index in range(100)},
    "one tensor under many names": lambda: {f"v{index}": BIG for index in range(100)},
    "many dicts of one tensor": lambda: {"a": [{"w": BIG} for _ in range(100)]},
}


@pytest.mark.parametrize("how", FOLDED)
def test_tensors_take_no_more_than_the_file(how: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {"norm.weight": torch.zeros(3)} | FOLDED[how]()}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"has larger tensors than memory for them, such as [vw]\d*: save"):
        read_checkpoint(tmp_path / "w.pth")


def test_a_layer_that_many_blocks_share_is_read(tmp_path: Path) -> None:
    torch.save({f"blocks.{index}.weight": BIG for index in range(24)}, tmp_path / "w.pth")
    assert len(read_checkpoint(tmp_path / "w.pth")) == 24


@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_containers_that_hold_one_another_are_refused_before_they_are_printed(kind: type, tmp_path: Path) -> None:
    nested: Any = ["x"]
    for _ in range(30):
        nested = {str(index): nested for index in range(10)} if kind is dict else kind([nested] * 10)
    torch.save({"state_dict": weights(), "meta": {"iter": nested}}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="containers that unfold to more than its size"):
        read_checkpoint(tmp_path / "w.pth")


def test_memory_that_is_not_in_the_file_is_refused(tmp_path: Path) -> None:
    class Empty:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.Tensor, (10**6,)

    torch.save({"w": Empty()}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"more memory than the file|is refused"):
        read_checkpoint(tmp_path / "w.pth")


def test_only_torchs_own_name_marks_a_program(tmp_path: Path) -> None:
    """A record deeper in the archive does not keep its others from being checked."""
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"\x80\x02}.")
        file.writestr("a/x/constants.pkl", b"")
    with pytest.raises(DataError, match="compressed or overlap"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("opened, closed", [(b"}X\x05\0\0\0model", b"s"), (b"]", b"a"), (b"", b"\x85")])
def test_what_nests_without_end_is_no_weights(opened: bytes, closed: bytes, tmp_path: Path) -> None:
    """A dict, a list and a tuple, 50 000 deep."""
    pickled = b"\x80\x02}X\x0a\0\0\0state_dict" + opened * 50_000 + b"}" + closed * 50_000 + b"s."
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as file:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            file.writestr(f"a/{name}", content)
    with pytest.raises(DataError, match=r"w\.pth' (has|should have)"):
        extract_weights(read_checkpoint(tmp_path / "w.pth"), f"checkpoint '{tmp_path / 'w.pth'}'", ())


@pytest.mark.parametrize("source", ["s3://x/y.pth", "file:///x/y.pth", "torchvision://resnet50", "a:s3://x"])
def test_no_other_storage_is_read(source: str) -> None:
    with pytest.raises(
        ValueError, match=f"checkpoint '{source}': this kind of storage is not supported; copy the file"
    ):
        read_checkpoint(source)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), r"\[Errno 13\] .*Permission denied$"),
        (OSError(errno.EIO, "Input/output error"), r"\[Errno 5\] .*Input/output error$"),
        (MemoryError(), "MemoryError$"),
    ],
)
def test_what_the_machine_is_to_blame_for(
    error: Exception, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    torch.save(weights(), tmp_path / "w.pth")
    for owner, name in ((torch, "load"), (Path, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(type(error), match=says) as caught:
                read_checkpoint(tmp_path / "w.pth")
        assert type(caught.value) is type(error) and f"checkpoint '{tmp_path}/w.pth' cannot" in str(caught.value)
        assert "cut short" not in str(caught.value)


def test_a_path_may_be_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights()
    torch.save(expected, tmp_path / "w.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert all(same(read_checkpoint(path), expected) for path in ("w.pth", "~/w.pth", tmp_path / "w.pth"))
    with pytest.raises(FileNotFoundError, match=rf"none\.pth' does not exist \(working folder {tmp_path}\)"):
        read_checkpoint("none.pth")
    with pytest.raises(TypeError, match="None"):
        read_checkpoint(None)


def test_the_files_of_a_folder_have_an_order(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        read_checkpoint(tmp_path)
    assert all(name in str(caught.value) for name in (*HUB_FILES, str(tmp_path)))
    for index, name in reversed(list(enumerate(HUB_FILES))):
        (tmp_path / name).write_bytes(saved({"index": torch.tensor(index)}, Path(name).suffix))
        assert read_checkpoint(tmp_path)["index"] == index


def test_files_of_one_name_from_two_urls(server: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / "www" / folder).mkdir()
        torch.save({"w": torch.full((1,), ord(folder))}, tmp_path / "www" / folder / "w.pth")
    assert [read_checkpoint(f"{server}/{folder}/w.pth")["w"].item() for folder in "aba"] == [97, 98, 97]
    (tmp_path / "www" / "a" / "w.pth").unlink()
    assert read_checkpoint(f"{server}/a/w.pth")["w"].item() == 97  # it was kept


@pytest.mark.parametrize("path", ["none.pth", "known/name/resolve/none.safetensors"])
def test_a_url_that_leads_nowhere(path: str, server: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{path}' cannot be downloaded \(HTTPError: .*404.*give its path"):
        read_checkpoint(f"{server}/{path}")
    assert not [kept for kept in (tmp_path / "home").rglob("*") if kept.is_file()]
    with pytest.raises(FileNotFoundError, match=r"w\.pth' cannot be downloaded \(URLError: .*refused"):
        read_checkpoint("http://127.0.0.1:1/w.pth")
    with pytest.raises(ValueError, match="should end in the name of a file"):
        read_checkpoint(server)


def test_where_a_broken_download_is_kept(server: str, tmp_path: Path) -> None:
    (tmp_path / "www" / "w.pth").write_bytes(b"<html>please log in</html>")
    with pytest.raises(ValueError, match=r"kept as (\S+) \(delete it to download it again\), cannot be read") as caught:
        read_checkpoint(f"{server}/w.pth")
    kept = Path(str(caught.value).split("kept as ")[1].split()[0])
    assert kept.read_bytes().startswith(b"<html>")


def test_a_file_on_the_hub(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "www" / "known" / "name" / "resolve" / "main"
    (folder / "sub").mkdir(parents=True)
    torch.save({"w": torch.tensor(0)}, folder / "pytorch_model.bin")
    torch.save({"w": torch.tensor(1)}, folder / "sub" / "w.pth")
    assert read_checkpoint("hf-hub:known/name")["w"] == 0
    assert read_checkpoint("hf-hub:known/name/sub/w.pth")["w"] == 1


def test_a_revision_on_the_hub(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "www" / "known" / "name" / "resolve" / "v2"
    folder.mkdir(parents=True)
    torch.save({"w": torch.tensor(1)}, folder / "model.pth")
    assert read_checkpoint("hf-hub:known/name@v2")["w"] == 1
    assert read_checkpoint("hf-hub:known/name/model.pth@v2")["w"] == 1
    with pytest.raises(FileNotFoundError, match=r"has none of model\.safetensors, .*pytorch_model\.bin"):
        read_checkpoint("hf-hub:known/name")


def test_a_repository_out_of_reach(server: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded \(RepositoryNotFoundError: .*give its path$"):
        read_checkpoint("hf-hub:unknown/name")


def test_the_hub_offline(offline: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"hf-hub:owner/name' cannot be downloaded .*HF_HUB_OFFLINE"):
        read_checkpoint("hf-hub:owner/name")
    torch.save({"w": torch.tensor(5)}, offline / "open_clip_pytorch_model.bin")
    assert read_checkpoint("hf-hub:owner/name")["w"] == 5


@pytest.mark.parametrize("source", ["hf-hub:", "hf-hub:name", "hf-hub:/name", "hf-hub:a b/c", "hf-hub:-a/c"])
def test_names_on_the_hub(source: str, offline: Path) -> None:
    with pytest.raises(ValueError, match=f"checkpoint '{source}'"):
        read_checkpoint(source)
