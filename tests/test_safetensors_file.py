"""safetensors headers: exact ranges for good files, one clear error for every kind of bad one."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_offload.errors import CheckpointError, PageReadError
from moe_offload.safetensors_file import Checkpoint, read_header

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c.scalar": torch.tensor(7, dtype=torch.int64),
    "d.empty": torch.zeros(0, 4),
}


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_ranges_and_reads_give_the_tensors_back(good: Path) -> None:
    header = read_header(good)
    assert set(header) == set(TENSORS)
    data = good.read_bytes()
    checkpoint = Checkpoint.open(good)
    for name, tensor in TENSORS.items():
        found = header[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tuple(tensor.shape))
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert data[found.offset : found.offset + found.nbytes] == raw
        assert torch.equal(checkpoint.read(name), tensor)
    assert torch.equal(checkpoint.read("a.weight", row=1), TENSORS["a.weight"][1:2])


@dataclass(frozen=True)
class BadHeader:
    """A file that must be refused, and the words its message must contain."""

    name: str
    header: object
    expect: str
    data: bytes = bytes(16)
    length: int | None = None


F32 = entry("F32", [2, 2], 0, 16)
BAD_HEADERS = [
    BadHeader("not_json", b"{not json at all", "must be JSON text"),
    BadHeader("not_utf8", b'{"\xff\xfe": 1}', "must be JSON text"),
    BadHeader("nan", b'{"a": NaN}', "NaN is not JSON"),
    BadHeader("deep_nesting", b'{"a":' + b"[" * 100_000, "must be JSON text"),
    BadHeader("a_list", b"[1, 2, 3]", "must begin with '{'"),
    BadHeader("a_pickle", b"\x80\x02}q\x00.....", "must begin with '{'"),
    BadHeader("huge_length", b"{}", "announce a header of", length=1 << 60),
    BadHeader("longer_than_file", b"{}", "does not fit in the file's", length=5000),
    BadHeader("zero_length", b"", "announce a header of 0", length=0),
    BadHeader("twice", b'{"a":{"dtype":"U8"},"a":{"dtype":"U8"}}', "'a' appears twice"),
    BadHeader("entry_is_a_number", {"a": 3}, "must have dtype, shape and data_offsets, got int"),
    BadHeader("no_shape", {"a": {"dtype": "F32", "data_offsets": [0, 16]}}, "must have dtype"),
    BadHeader("unknown_dtype", {"a": entry("F31", [2, 2], 0, 16)}, "unknown dtype 'F31'"),
    BadHeader("negative_size", {"a": entry("F32", [-2, -2], 0, 16)}, "shape [-2, -2]"),
    BadHeader("bool_size", {"a": entry("F32", [True, 4], 0, 16)}, "shape [True, 4]"),
    BadHeader("three_offsets", {"a": {**F32, "data_offsets": [0, 8, 16]}}, "expected [begin, end]"),
    BadHeader("backwards", {"a": entry("F32", [2, 2], 16, 0)}, "span -16"),
    BadHeader("wrong_size", {"a": entry("F32", [2, 3], 0, 16)}, "needs 24 bytes"),
    BadHeader("overflow", {"a": entry("F32", [1 << 62, 1 << 62], 0, 16)}, "span 16"),
    BadHeader("overlap", {"a": F32, "b": entry("F32", [2], 8, 16)}, "overlaps the one before it"),
    BadHeader("hole", {"a": entry("F32", [2], 8, 16)}, "leaves a hole"),
    BadHeader("past_the_end", {"a": entry("F32", [8], 0, 32)}, "(truncated)"),
    BadHeader("trailing", {"a": entry("F32", [2], 0, 8)}, "longer than its header says"),
    BadHeader("metadata", {"__metadata__": {"x": 1}, "a": F32}, "map strings to strings"),
]


@pytest.mark.parametrize("case", BAD_HEADERS, ids=lambda case: case.name)
def test_bad_header_is_refused_with_its_reason(case: BadHeader, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "bad.safetensors", case.header, case.data, case.length)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert case.expect in message
    assert "again" in message
    assert "\n" not in message


@pytest.mark.parametrize("keep", [0, 5, 9, 40, -16, -1])
def test_truncated_file_is_refused(good: Path, keep: int) -> None:
    good.write_bytes(good.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        read_header(good)


def test_every_header_bit_flip_is_refused_or_harmless(good: Path) -> None:
    """A flipped bit may rename a tensor or touch padding; it may never move or retype bytes."""
    original = good.read_bytes()

    def places() -> set[tuple[object, ...]]:
        found = read_header(good).values()
        return {(t.offset, t.nbytes, t.dtype_name, t.shape) for t in found if t.nbytes}

    before, refused = places(), 0
    header_end = 8 + int.from_bytes(original[:8], "little")
    for bit in range(0, header_end * 8, 3):
        flipped = bytearray(original)
        flipped[bit // 8] ^= 1 << bit % 8
        good.write_bytes(flipped)
        try:
            assert places() == before, f"bit {bit} of the file changed a range"
        except CheckpointError:
            refused += 1
    assert refused > header_end * 8 // 9


def test_missing_file_and_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing.safetensors.*does not exist"):
        read_header(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=r"is a directory"):
        read_header(tmp_path)


def sharded(folder: Path) -> Path:
    names = list(TENSORS)
    shards = {
        "model-00001-of-00002.safetensors": names[:2],
        "model-00002-of-00002.safetensors": names[2:],
    }
    for shard, part in shards.items():
        save_file({name: TENSORS[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_sharded_checkpoint_reads_like_one(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path))
    assert {name: checkpoint.read(name).tolist() for name in TENSORS} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }


def test_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors is missing"):
        Checkpoint.open(tmp_path)


def test_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["a.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"a.weight.*model-00001-of-00002"):
        Checkpoint.open(tmp_path)
    content["weight_map"]["a.weight"] = "model-00001-of-00002.safetensors"
    content["weight_map"]["z.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"z.weight.*no shard"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json"):
        Checkpoint.open(tmp_path)


def test_same_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    both = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file(TENSORS, both[1])
    with pytest.raises(CheckpointError, match=r"a.weight.* is in .*00002-of.* and in .*00001-of"):
        Checkpoint.from_files(both, str(tmp_path))


def test_folder_with_a_pickled_checkpoint_says_how_to_convert(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}.")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*save_pretrained"):
        Checkpoint.open(tmp_path)


def test_read_after_deletion_is_exact_and_after_change_is_refused(good: Path) -> None:
    checkpoint = Checkpoint.open(good)
    assert torch.equal(checkpoint.read("a.weight"), TENSORS["a.weight"])
    content = good.read_bytes()
    good.unlink()
    assert torch.equal(checkpoint.read("b.weight"), TENSORS["b.weight"])
    good.write_bytes(content)
    checkpoint.close()
    assert torch.equal(checkpoint.read("a.weight"), TENSORS["a.weight"])
    os.truncate(good, len(content) - 4)
    with pytest.raises(PageReadError, match=r"changed while in use"):
        checkpoint.read("b.weight")
