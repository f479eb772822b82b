"""Weights files: round trips, laziness, planted faults and hostile pickles."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from safelight.errors import WeightsError
from safelight.store.weights import (
    StateDict,
    load_into,
    read_weights,
    save_safetensors,
    sha256,
)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "a.bias": torch.randn(3, generator=generator).half(),
        "b": torch.randn(2, 2, generator=generator).bfloat16(),
        "ids": torch.arange(7),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_safetensors_round_trip_both_ways(tmp_path):
    path = tmp_path / "deep" / "x.safetensors"
    save_safetensors(path, tensors(), {"note": "é"})
    assert_same(read_weights(path), tensors())
    assert_same(safetensors.torch.load_file(path), tensors())
    assert read_weights(path).extra == {"format": "pt", "note": "é"}
    safetensors.torch.save_file(tensors(), tmp_path / "theirs.safetensors")
    assert_same(read_weights(tmp_path / "theirs.safetensors"), tensors())
    assert os.listdir(path.parent) == ["x.safetensors"]


def test_saving_is_reproducible_and_unshares(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    one = {"x": base.T, "y": base, "z": base[1]}
    save_safetensors(tmp_path / "1", one, {"b": "1", "a": "2"})
    save_safetensors(tmp_path / "2", dict(reversed(one.items())), {"a": "2", "b": "1"})
    assert sha256(tmp_path / "1") == sha256(tmp_path / "2")
    assert_same(safetensors.torch.load_file(tmp_path / "1"), one)


def test_reading_is_lazy_mapped_and_private(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, {"x": torch.zeros(1000), "y": torch.ones(10)})
    state = read_weights(path)
    first, second = state["x"], state["x"]
    assert first.data_ptr() == second.data_ptr(), "one mapping, no copy"
    before = sha256(path)
    first.add_(1)
    assert sha256(path) == before


def test_misaligned_tensors_are_read(tmp_path):
    # The format allows a header of any length; early writers did not pad it.
    header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    text += b" " * ((3 - len(text)) % 8)
    path = tmp_path / "x.safetensors"
    data = np.array([1.5, -2], dtype="<f4").tobytes()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert (8 + len(text)) % 4 == 3
    assert read_weights(path)["x"].tolist() == [1.5, -2]


def header_of(records, data=b"", pad=0):
    text = json.dumps(records).encode()
    return len(text).to_bytes(8, "little") + text + data + b"\0" * pad


def record(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not safetensors"),
        (b"\xff" * 20, "not safetensors"),
        ((10).to_bytes(8, "little") + b"{" * 10, "broken safetensors header"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer"),
        (header_of({"x": record(0, 4)}), "promises"),
        (header_of({"x": record(0, 4)}, bytes(9)), "promises"),
        (header_of({"x": record(0, 4), "y": record(2, 6)}, bytes(6)), "overlapping bytes at y"),
        (header_of({"x": record(0, 4), "y": record(8, 12)}, bytes(12)), "stray bytes at y"),
        (header_of({"x": record(0, 8)}, bytes(8)), "gives x 8 bytes"),
        (header_of({"x": record(-4, 0)}, bytes(8)), "describes x wrongly"),
        (header_of({"x": record(0, 4, dtype="F31")}, bytes(4)), "describes x wrongly"),
        (header_of({"x": record(0, 4, shape=(1.0,))}, bytes(4)), "describes x wrongly"),
        (header_of({"x": 3}), "describes x wrongly"),
        (header_of([1]), "broken"),
    ],
)
def test_broken_safetensors_name_the_file_and_the_key(tmp_path, content, match):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=match) as error:
        read_weights(path)
    assert str(path) in str(error.value)


def test_duplicate_names_are_refused(tmp_path):
    text = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    text += b'"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    with pytest.raises(WeightsError, match="twice"):
        read_weights(tmp_path / "x.safetensors")


def test_every_truncation_and_every_flipped_header_byte_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    module = nn.Linear(3, 2)
    save_safetensors(path, module.state_dict())
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    spaces = len(good[:end]) - len(good[:end].rstrip(b" "))
    label = good.index(b'"__metadata__"')
    for cut in range(len(good)):
        path.write_bytes(good[:cut])
        with pytest.raises(WeightsError):
            load_into(nn.Linear(3, 2, device="meta"), read_weights(path))
    for at in range(end - spaces):
        if label <= at < label + len(b'"__metadata__":{"format":"pt"}'):
            continue  # a label may say anything
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(WeightsError):
            load_into(nn.Linear(3, 2, device="meta"), read_weights(path))


def test_missing_file(tmp_path):
    with pytest.raises(WeightsError, match="cannot be read"):
        read_weights(tmp_path / "absent.safetensors")


def shards(tmp_path, suffix="safetensors"):
    parts = [dict(list(tensors().items())[:3]), dict(list(tensors().items())[3:])]
    weight_map = {}
    for i, part in enumerate(parts, 1):
        name = f"m-0000{i}-of-00002.{suffix}"
        if suffix == "bin":
            torch.save(part, tmp_path / name)
        else:
            save_safetensors(tmp_path / name, part)
        weight_map |= dict.fromkeys(part, name)
    index = tmp_path / f"m.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index, weight_map


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path, suffix):
    index, _ = shards(tmp_path, suffix)
    assert_same(read_weights(index), tensors())


@pytest.mark.parametrize("fault", ["absent", "escape", "lacks", "not json"])
def test_shard_faults(tmp_path, fault):
    index, weight_map = shards(tmp_path)
    if fault == "absent":
        (tmp_path / "m-00002-of-00002.safetensors").unlink()
    elif fault == "escape":
        weight_map["a.bias"] = "../m-00001-of-00002.safetensors"
    elif fault == "lacks":
        weight_map["other"] = "m-00001-of-00002.safetensors"
    index.write_text("{" if fault == "not json" else json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match=r"m[-.]"):
        read_weights(index)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(tmp_path, zipped):
    path = tmp_path / "x.bin"
    base = torch.arange(20.0)
    state = OrderedDict(tensors())
    state["shared"], state["strided"] = base, base[3:15].reshape(4, 3).T
    state["parameter"] = nn.Parameter(torch.ones(2))
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    found = read_weights(path)
    assert found.entries["strided"].shape == (3, 4)
    assert_same(found, {**state, "parameter": torch.ones(2)})


def test_pickled_module_state_and_nested_checkpoints(tmp_path):
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    checkpoint = {
        "epoch": 3,
        "global_step": 875000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": {"state_dict": module.state_dict(), "global_step": 7},
        "optimizer_states": [{"state": defaultdict(dict), "param_groups": [{"lr": 1e-4}]}],
        "best": np.float64(0.25),
        "sizes": torch.Size([1, 2]),
        "dtype": torch.float16,
    }
    torch.save(checkpoint, tmp_path / "x.ckpt")
    found = read_weights(tmp_path / "x.ckpt")
    assert_same(found, module.state_dict())
    assert found.extra["global_step"] == 7
    assert found.extra["best"] == 0.25


def test_trainer_classes_become_empty_records(tmp_path, monkeypatch):
    import sys
    import types

    library = types.ModuleType("pytorch_lightning")

    class ModelCheckpoint(dict):
        pass

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = library.__name__, "ModelCheckpoint"
    library.ModelCheckpoint = ModelCheckpoint
    monkeypatch.setitem(sys.modules, library.__name__, library)
    instance = ModelCheckpoint(a=1)
    instance.best = "path"
    content = {"callbacks": {ModelCheckpoint: instance}, "state_dict": {"x": torch.ones(2)}}
    torch.save(content, tmp_path / "x.ckpt")
    monkeypatch.delitem(sys.modules, library.__name__)
    assert_same(read_weights(tmp_path / "x.ckpt"), {"x": torch.ones(2)})


class Attack:
    """Runs ``function(*args)`` when unpickled by the usual reader."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def attacks(tmp_path):
    target = str(tmp_path / "owned")
    return {
        "system": Attack(os.system, f"touch {target}"),
        "eval": Attack(eval, f"open({target!r}, 'w')"),
        "open": Attack(open, target, "w"),
        "getattr": Attack(getattr, "x", "upper"),
        "torch": Attack(torch.load, target),
        "numpy": Attack(np.zeros, (1,)),
        "storage": Attack(torch.UntypedStorage.from_file, target, True, 8),
    }


@pytest.mark.parametrize("kind", ["system", "eval", "open", "getattr", "torch", "numpy", "storage"])
@pytest.mark.parametrize("layout", ["zip", "stream", "bare"])
def test_hostile_pickles_are_refused(tmp_path, kind, layout):
    path = tmp_path / "x.bin"
    content = {"x": torch.ones(2), "attack": attacks(tmp_path)[kind]}
    if layout == "bare":
        path.write_bytes(pickle.dumps(attacks(tmp_path)[kind]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(WeightsError, match="nothing was run"):
        read_weights(path)
    assert not (tmp_path / "owned").exists()


def hostile_zip(path, program: bytes, data: bytes = bytes(8)):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/data/0", data)


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ"


@pytest.mark.parametrize(
    "program",
    {
        # A tensor that reaches outside its two-element storage.
        "reach": b"\x80\x02}X\x01\0\0\0xctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + b"K\0K\x03\x85K\x01\x85\x89NtRs.",
        # Negative strides.
        "stride": b"\x80\x02}X\x01\0\0\0xctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + b"K\x01K\x02\x85J\xff\xff\xff\xff\x85\x89NtRs.",
        # Sets an attribute of a function on the list.
        "build": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x04\0\0\0callK\0s\x86b.",
        # Sets the size of a storage after it was checked.
        "storage": b"\x80\x02" + STORAGE + b"N}X\x05\0\0\0countK\x7fs\x86b.",
        # numpy's own state setter trusts its input.
        "dtype": b"\x80\x02cnumpy\ndtype\nX\x01\0\0\0O\x85R.",
    }.values(),
)
def test_hand_written_hostile_programs_are_refused(tmp_path, program):
    hostile_zip(tmp_path / "x.bin", program)
    with pytest.raises(WeightsError):
        read_weights(tmp_path / "x.bin")


def test_a_checkpoint_inside_itself_ends(tmp_path):
    checkpoint: dict = {"x": torch.ones(1)}
    checkpoint["state_dict"] = checkpoint
    torch.save(checkpoint, tmp_path / "x.ckpt")
    assert_same(read_weights(tmp_path / "x.ckpt"), {"x": torch.ones(1)})


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pickles(tmp_path, zipped):
    path = tmp_path / "x.bin"
    torch.save(tensors(), path, _use_new_zipfile_serialization=zipped)
    good = path.read_bytes()
    for cut in range(0, len(good) - 1, 37):
        path.write_bytes(good[:cut])
        with pytest.raises(WeightsError, match=str(path)):
            read_weights(path)


def test_a_pickle_is_not_taken_for_safetensors(tmp_path):
    torch.save(tensors(), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="not safetensors"):
        read_weights(tmp_path / "x.safetensors")


def meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def test_load_into_assigns(tmp_path):
    source = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    save_safetensors(tmp_path / "x", source.state_dict())
    module = meta()
    state = read_weights(tmp_path / "x")
    load_into(module, state)
    assert_same(module.state_dict(), source.state_dict())
    assert module[0].weight.data_ptr() == state["0.weight"].data_ptr(), "mapped, not copied"
    assert module[0].weight.requires_grad
    load_into(module, state, dtype=torch.float16)
    assert module[0].weight.dtype == torch.float16


def test_load_into_reports_everything_and_changes_nothing():
    module = meta()
    state = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).state_dict()
    del state["0.bias"]
    state["1.weight"] = torch.zeros(3, 3)
    state["2.extra"] = torch.zeros(1)
    read = []
    lazy = StateDict.of(state, "some/file")
    lazy.entries = {
        name: entry._replace(read=lambda name=name: read.append(name))
        for name, entry in lazy.entries.items()
    }
    with pytest.raises(WeightsError) as error:
        load_into(module, lazy)
    message = str(error.value)
    assert message.startswith("some/file: does not fit Sequential (4 tensors, 4 expected)")
    assert "1 missing: 0.bias" in message
    assert "1 unknown: 2.extra" in message
    assert "1.weight is (3, 3), expected (2, 3)" in message
    assert not read, "nothing is read before everything is checked"
    assert all(p.is_meta for p in module.parameters())


def test_load_into_allows_missing_by_pattern():
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    kept = module[1].weight.detach().clone()
    state = {"0.weight": torch.ones(3, 4), "0.bias": torch.ones(3)}
    load_into(module, state, allow_missing=("1.*",))
    assert torch.equal(module[1].weight, kept)
    assert torch.equal(module[0].weight, torch.ones(3, 4))


def test_renaming_never_loses_a_tensor():
    state = StateDict.of({"a.x": torch.ones(1), "b.x": torch.zeros(1)}, "f")
    assert list(state.under("a.")) == ["x"]
    with pytest.raises(WeightsError, match="two tensors for x"):
        state.renamed(lambda name: name[2:])
