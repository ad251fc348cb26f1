"""Kept features: exact up to float16, whole or not there, shared by runs, within a limit."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from polyfocal.errors import UserError
from polyfocal.features import FeatureStore

SHAPES = [(3, 4, 5), (2, 2, 3)]
KEYS = [f"{number:02d}" + 62 * "a" for number in range(4)]


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [100 * torch.randn(shape, generator=generator) for shape in SHAPES]


def never():
    raise AssertionError("it is kept already")


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_was_computed_is_read_again_in_float16(tmp_path):
    made = features()
    for compute in (lambda: made, never):
        found = FeatureStore(tmp_path, 2**20).get(KEYS[0], SHAPES, compute)
        assert all(torch.equal(one, other.half()) for one, other in zip(found, made, strict=True))
    (file,) = files(tmp_path)
    assert file.stat().st_size == 2 * (60 + 12) + 4


def test_values_beyond_float16_become_its_largest(tmp_path):
    made = [torch.full(shape, 1e6) for shape in SHAPES]
    found = FeatureStore(tmp_path, 2**20).get(KEYS[0], SHAPES, lambda: made)
    assert found[0].max() == 65504


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "other size"])
def test_a_damaged_file_is_computed_anew(damage, tmp_path):
    FeatureStore(tmp_path, 2**20).get(KEYS[0], SHAPES, features)
    (file,) = files(tmp_path)
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    shapes = [(3, 4, 4), (2, 2, 3)] if damage == "other size" else SHAPES
    file.write_bytes({"cut": content[:50], "empty": b""}.get(damage, bytes(content)))
    store = FeatureStore(tmp_path, 2**20)
    assert not store.has(KEYS[0], shapes)
    made = [torch.ones(shape) for shape in shapes]
    for compute in (lambda: made, never):
        assert torch.equal(store.get(KEYS[0], shapes, compute)[1], made[1].half())


def test_a_run_that_is_killed_while_it_writes_leaves_nothing_wrong(tmp_path):
    """Killed in the middle of a file, after another one."""
    script = f"""
import os, time, torch
from pathlib import Path
from polyfocal.features import FeatureStore
store = FeatureStore(Path({str(tmp_path)!r}), 2**20)
store.get({KEYS[0]!r}, {SHAPES}, lambda: [torch.ones(s) for s in {SHAPES}])
def halfway(path, content):
    with path.open("wb") as stream:
        stream.write(content[:40])
        stream.flush()
        print("halfway", flush=True)
        time.sleep(60)
Path.write_bytes = halfway
store.get({KEYS[1]!r}, {SHAPES}, lambda: [torch.ones(s) for s in {SHAPES}])
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"halfway\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = FeatureStore(tmp_path, 2**20)
    assert store.has(KEYS[0], SHAPES) and not store.has(KEYS[1], SHAPES)
    made = features(1)
    for compute in (lambda: made, never):
        assert torch.equal(store.get(KEYS[1], SHAPES, compute)[0], made[0].half())


def test_two_runs_share_a_folder(tmp_path):
    """Each finds what the other has written, also where both write the same file at once."""
    one, other = FeatureStore(tmp_path, 2**20), FeatureStore(tmp_path, 2**20)

    def meanwhile():
        other.get(KEYS[0], SHAPES, features)
        return features()

    found = one.get(KEYS[0], SHAPES, meanwhile)
    assert torch.equal(found[0], features()[0].half())
    assert torch.equal(other.get(KEYS[0], SHAPES, never)[0], found[0])
    assert len(files(tmp_path)) == 1


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    size = 2 * (60 + 12) + 4
    store = FeatureStore(tmp_path, 3 * size)
    for age, key in enumerate(KEYS[:3]):
        store.get(key, SHAPES, features)
        os.utime(store._file(key), (time.time() - 100 + age,) * 2)
    FeatureStore(tmp_path, 3 * size).get(KEYS[0], SHAPES, never)  # is the newest now
    FeatureStore(tmp_path, 3 * size).make_room([KEYS[3]], size)
    assert [store.has(key, SHAPES) for key in KEYS[:3]] == [True, False, True]
    with pytest.raises(UserError, match="train without --freeze"):
        store.make_room(KEYS, 4 * size)
    assert [store.has(key, SHAPES) for key in KEYS[:3]] == [True, False, True]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "00").write_text("no folder")
    with pytest.raises(UserError, match="00.* cannot be written"):
        FeatureStore(tmp_path, 2**20).get(KEYS[0], SHAPES, features)
