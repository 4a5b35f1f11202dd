"""A model folder on disk: safetensors reads what we stream, folders are published whole or not, damage is named."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_gpt.cli import BadInput
from lit_gpt.export.hf_folder import HFWeights, require_hashes, split_into_files, write_weights

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.randn(5, generator=torch.Generator().manual_seed(1)),
    "c": torch.randn(4, 4, generator=torch.Generator().manual_seed(2)),
}


def write(
    folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, limit: int = 10**9
) -> dict:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return write_weights(folder, shapes, dtype, ((k, v.to(dtype)) for k, v in reversed(tensors.items())), limit)


def test_shards_are_filled_in_order_and_hold_one_weight_at_least() -> None:
    shapes = {"a": (10,), "b": (10,), "c": (100,), "d": (1,)}
    assert split_into_files(shapes, 4, 80) == [["a", "b"], ["c"], ["d"]]
    assert split_into_files(shapes, 2, 10**9) == [["a", "b", "c", "d"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_reads_what_was_streamed(tmp_path: Path, dtype: torch.dtype) -> None:
    hashes = write(tmp_path, TENSORS, dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor.to(dtype))
    assert (tmp_path / "model.safetensors").stat().st_size % dtype.itemsize == 0
    require_hashes(tmp_path, hashes)


def test_shards_and_index(tmp_path: Path) -> None:
    hashes = write(tmp_path, TENSORS, limit=48)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": (6 + 5 + 16) * 4}
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    weights = HFWeights(tmp_path)
    assert weights.names == {"a", "b", "c"}
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in TENSORS.items())
    require_hashes(tmp_path, hashes)


def test_a_flipped_bit_on_disk_is_found_and_named(tmp_path: Path) -> None:
    hashes = write(tmp_path, TENSORS)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"weight 'c' reads back from .* otherwise"):
        require_hashes(tmp_path, hashes)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), torch.float32, "weight 'b' holds NaN or infinity"),
        (70_000.0, torch.float16, r"weight 'b' holds a value above 65,504.*bf16"),
    ],
)
def test_a_weight_that_is_no_number_is_not_written(
    tmp_path: Path, value: float, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        write(tmp_path, TENSORS | {"b": torch.tensor([1.0, value])}, dtype)


def test_bin_files_are_read_and_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert torch.equal(HFWeights(tmp_path).read("c"), TENSORS["c"])
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(HFWeights(tmp_path).read("c"), TENSORS["c"])

    class Malice:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"a": Malice()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"pytorch_model\.bin is damaged, or holds more than weights"):
        HFWeights(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_the_files_that_transformers_reads_are_read(tmp_path: Path) -> None:
    """A single file goes before an index, safetensors before .bin."""
    other = {name: tensor + 1 for name, tensor in TENSORS.items()}
    save_file(other, tmp_path / "old.safetensors")
    index = {"weight_map": dict.fromkeys(TENSORS, "old.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({name: tensor + 2 for name, tensor in TENSORS.items()}, tmp_path / "pytorch_model.bin")
    assert torch.equal(HFWeights(tmp_path).read("a"), TENSORS["a"] + 1)
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert torch.equal(HFWeights(tmp_path).read("a"), TENSORS["a"])


def test_weights_without_checksums_are_read_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """torch has an option to write none, which must not look like damage."""
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    weights = HFWeights(tmp_path)
    assert all(torch.equal(weights.read(name), TENSORS[name]) for name in TENSORS)
    assert "pytorch_model.bin was written without checksums: damage to its weights cannot be seen" in caplog.text


def test_odd_bins_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"

    def refused(content: object, said: str) -> None:
        torch.save(content, path)
        with pytest.raises(BadInput, match=said) as caught:
            HFWeights(tmp_path).dtype  # noqa: B018 - it is read
        assert "\n" not in str(caught.value)

    refused([torch.ones(2)], "holds a list")
    refused({"a": 3}, "'a' is a int, not a weight")
    refused({3: torch.ones(2)}, "3 is no name of a weight")
    refused({"a": torch.ones(1).expand(2**40)}, "exceeds the file")
    sparse = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (2**40,))
    refused({"a": sparse}, "_rebuild_sparse_tensor, which a weights-only file does not hold")
    refused({"a": torch.ones(2, dtype=torch.int64)}, "stored as torch.int64; fp32, fp16 and bf16 are read")
    torch.save(TENSORS, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry))
    (tmp_path / "bomb").replace(path)
    with pytest.raises(BadInput, match="its parts are compressed"):
        HFWeights(tmp_path)


def test_an_index_must_name_files_beside_it(tmp_path: Path) -> None:
    for weight_map in (None, [], {"a": 3}, {"a": "../x.safetensors"}, {"a": ["x"]}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(BadInput, match="must give each weight the name of a file"):
            HFWeights(tmp_path)


def test_damaged_absent_and_incomplete_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no weights: looked for model\.safetensors"):
        HFWeights(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(BadInput, match=r"model\.safetensors is damaged"):
        HFWeights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    index = {"weight_map": dict.fromkeys([*TENSORS, "d"], "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": {"d": "x.safetensors"}}))
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="weight 'd' is in the index"):
        HFWeights(tmp_path)
    save_file({"a": torch.tensor([float("inf")])}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(BadInput, match="weight 'a' holds NaN or infinity"):
        HFWeights(tmp_path).read("a")


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 1234\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(BadInput, match="a pointer of Git LFS, not the weights; `git lfs pull` fetches them"):
        HFWeights(tmp_path)
