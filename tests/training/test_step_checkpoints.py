"""A step checkpoint that is empty, torn, changed or of another fine-tune is removed with a warning,
and training goes on from the previous checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch

from ftsec_ray.training import step_checkpoints as module
from ftsec_ray.training.setup import Step
from ftsec_ray.training.step_checkpoints import KEPT, newest_checkpoint, save_checkpoint

STEPS = 20
WEIGHTS = {"a": torch.zeros(3, 2), "b": torch.ones(4)}


def tensors(index):
    found = {f"t/{name}": torch.tensor(float(index)) for name in WEIGHTS}
    for part in ("weight", "m", "v"):
        found |= {f"{part}/{name}": value + index for name, value in WEIGHTS.items()}
    return found


def save(folder, index, *, total=STEPS):
    step = Step(index, total)
    step.memory["kept"] = torch.tensor([index])
    save_checkpoint(folder, tensors(index), step, losses=[0.5] * index, tokens=7 * index)


def newest(folder):
    return newest_checkpoint(folder, STEPS, WEIGHTS)


@pytest.fixture
def folder(tmp_path):
    for index in (4, 8, 12):
        save(tmp_path, index)
    return tmp_path


def test_the_two_newest_checkpoints_are_kept_and_the_last_is_read(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-00000008", "step-00000012"]
    assert len(names) == KEPT
    saved = newest(folder)
    assert (saved.state["index"], saved.state["tokens"]) == (12, 84)
    assert torch.equal(saved.tensors["m/a"], WEIGHTS["a"] + 12)
    assert saved.tensors["memory/kept"].tolist() == [12]


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def renamed(last):
    last.rename(last.with_name("step-00000013"))


def linked(last):
    last.rename(last.with_name("elsewhere"))
    last.symlink_to(last.with_name("elsewhere"))


def put(name, make):
    def change(last):
        (last / name).unlink()
        make(last / name)

    return change


DAMAGES = {
    "both files empty": lambda last: [path.write_bytes(b"") for path in last.iterdir()],
    "no files": lambda last: [path.unlink() for path in last.iterdir()],
    "a file": lambda last: (shutil.rmtree(last), last.write_text("x")),
    "a link": linked,
    "another name": renamed,
    **{
        f"{name}: {what}": lambda last, name=name, change=change: change(last / name)
        for name in ("state.json", "state.safetensors")
        for what, change in {
            "empty": lambda path: path.write_bytes(b""),
            "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
            "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
            "a bit flipped": flip,
            "the first bit flipped": lambda path: flip(path, 0),
            "zeros": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
            "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
            "gone": lambda path: path.unlink(),
        }.items()
    },
    **{
        f"{name}: {what}": put(name, make)
        for name in ("state.json", "state.safetensors")
        for what, make in {
            "a pipe": os.mkfifo,
            "a folder": lambda path: path.mkdir(),
            "an endless link": lambda path: path.symlink_to("/dev/zero"),
        }.items()
    },
    "deep": lambda last: (last / "state.json").write_text("[" * 200_000),
    "a list": lambda last: (last / "state.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_removed_and_the_one_before_it_is_read(folder, damage, caplog):
    damage(folder / "step-00000012")
    assert newest(folder).state["index"] == 8
    (warning,) = caplog.messages
    assert warning.startswith("warning: a step checkpoint is damaged and was removed: '")
    assert "the previous checkpoint" in warning
    assert [path.name for path in folder.glob("step-*")] == ["step-00000008"]
    save(folder, 12)
    assert newest(folder).state["index"] == 12


def forged(last, **changes):
    state = json.loads((last / "state.json").read_text())
    del state["state"]
    state |= changes
    text = json.dumps({**state, "state": module._checksum(state)})
    (last / "state.json").write_text(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"total": 21},
        {"index": 13},
        {"index": 0},
        {"index": -1},
        {"index": "12"},
        {"index": True},
        {"losses": []},
        {"losses": [0.5] * 11 + ["x"]},
        {"losses": [0.5] * 11 + [float("nan")]},
        {"losses": {}},
        {"tokens": None},
        {"tensors": "0"},
        {"tensors": 3},
    ],
    ids=repr,
)
def test_a_checkpoint_that_says_what_cannot_be_is_removed(folder, changes, caplog):
    forged(folder / "step-00000012", **changes)
    assert newest(folder).state["index"] == 8
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("name", ["weight/a", "m/b", "v/a", "t/b"])
def test_a_checkpoint_of_other_weights_is_removed(folder, name):
    held = tensors(16)
    if name.startswith("t/"):
        del held[name]
    else:
        held[name] = torch.zeros(9)
    save_checkpoint(folder, held, Step(16, STEPS), losses=[0.5] * 16, tokens=1)
    assert newest(folder).state["index"] == 12


def test_without_a_whole_checkpoint_training_starts_anew(folder, tmp_path, caplog):
    for path in folder.glob("step-*/state.json"):
        path.write_bytes(b"")
    assert newest(folder) is None
    assert len(caplog.messages) == 2
    assert list(folder.glob("step-*")) == []
    assert newest(tmp_path / "not there") is None


def test_a_disk_with_room_for_one_checkpoint_keeps_the_newest(folder, monkeypatch):
    real, left = module.settle, [OSError(errno.ENOSPC, "No space left on device")]

    def settle(aside, final):
        if left:
            raise left.pop()
        real(aside, final)

    monkeypatch.setattr(module, "settle", settle)
    save(folder, 16)
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000012", "step-00000016"]
    left += [OSError(errno.ENOSPC, "No space left on device")] * 2
    with pytest.raises(OSError, match="No space left"):
        save(folder, 18)
    assert newest(folder).state["index"] == 16
    assert not list(folder.glob(".*")), "nothing half-written stays"


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "settle", lambda aside, final: seen.append((aside, final)))
    save(tmp_path, 4)
    assert seen == [(tmp_path / ".step-00000004.part", tmp_path / "step-00000004")]
