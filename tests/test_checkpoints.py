"""What counts as a whole folder, and what becomes of checkpoints that do not count."""

import json
import shutil
from pathlib import Path

import pytest

from qilin_med.artifact import MANIFEST, commit_folder, digest, read_manifest, verify_folder
from qilin_med.errors import UserError
from qilin_med.train.checkpoints import COMPLETE, newest_complete, prune_checkpoints
from qilin_med.train.metrics import checkpoint_cost


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "weights").write_bytes(b"abc")
    facts = {"created": "2026-11-24 甲", "counts": {10: 1, 9: (2, 0.1)}, "metrics": {"loss": 1.25e-7}, "commit": None}
    commit_folder(tmp_path / "part", MANIFEST, facts)
    return (tmp_path / "part").rename(tmp_path / "whole")


def test_a_published_folder_says_what_it_was_given(folder):
    contents = verify_folder(folder)
    assert contents["counts"] == {"10": 1, "9": [2, 0.1]}
    # sha256 of b"abc", FIPS 180-2, appendix B.1
    assert contents["files"]["weights"] == {
        "size": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }  # fmt: skip


def test_no_flipped_bit_of_a_marker_passes(folder):
    marker = folder / MANIFEST
    whole, meant = marker.read_bytes(), verify_folder(folder)
    passed = []
    for position in range(len(whole)):
        for bit in (0, 5):  # another digit or letter, another case
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            marker.write_bytes(flipped)
            try:
                assert read_manifest(folder) == meant
                passed.append(bytes(flipped[position - 4 : position + 1]))
            except UserError as error:
                assert str(folder) in str(error) and "\n" not in str(error)
    assert passed == [b"1.25E"]  # 1.25e-07 in capitals: the same number


def write_marker(folder: Path, contents: dict) -> None:
    (folder / MANIFEST).write_text(json.dumps({**contents, "digest": digest(contents)}))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret"])
def test_a_marker_may_not_name_files_outside_its_folder(folder, name):
    (folder.parent / "secret").write_bytes(b"abc")
    contents = read_manifest(folder)
    write_marker(folder, {**contents, "files": {name: contents["files"]["weights"]}})
    with pytest.raises(UserError, match="lies outside the folder"):
        verify_folder(folder)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '{"files": []}', '{"files": {"weights": 3}}', "[" * 10**6, '"\\ud800"']
)
def test_a_marker_of_another_shape_is_damaged(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="damaged"):
        verify_folder(folder)


def test_a_marker_without_a_digest_is_of_an_earlier_version(folder):
    (folder / MANIFEST).write_text(json.dumps(read_manifest(folder)))
    with pytest.raises(UserError, match=r"earlier version.*make the folder again"):
        verify_folder(folder)


def make_checkpoint(folder: Path, step: int, complete: bool = True) -> None:
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    (folder / f"checkpoint-{step}" / "weights").write_bytes(bytes(step))
    if complete:
        commit_folder(folder / f"checkpoint-{step}", COMPLETE, {"job": "ours"})


def names(folder: Path) -> list[str]:
    return sorted(path.name.split("-2")[0] for path in folder.iterdir())


def test_unfinished_checkpoints_never_pile_up(tmp_path):
    make_checkpoint(tmp_path, 3)
    for _attempt in range(3):
        make_checkpoint(tmp_path, 6, complete=False)
        newest, (line,) = newest_complete(tmp_path, "ours")
        assert newest == tmp_path / "checkpoint-3" and "COMPLETE is missing" in line
        assert names(tmp_path) == ["checkpoint-3", "checkpoint-6.incomplete"]
    make_checkpoint(tmp_path, 5)
    prune_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-5"]


def test_what_a_killed_deletion_left_goes_but_evidence_stays(tmp_path):
    make_checkpoint(tmp_path, 1, complete=False)  # its marker went first
    for step in (2, 3, 4):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 5, complete=False)  # another rank has begun to write it
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-9.foreign-1")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-8.damaged-1")
    prune_checkpoints(tmp_path, keep=2)
    kept = ["checkpoint-3", "checkpoint-4", "checkpoint-5", "checkpoint-8.damaged-1", "checkpoint-9.foreign-1"]
    assert names(tmp_path) == kept


def test_cost_of_checkpoints_by_hand():
    saved = [{"seconds": 10.0 + cost, "checkpoint_seconds": cost} for cost in (4.0, 6.0)]
    rows = [{"seconds": 10.0}, *saved]
    assert checkpoint_cost(rows) == {"number": 2, "seconds": 10.0, "share": 0.25}
    assert checkpoint_cost([]) == {"number": 0, "seconds": 0, "share": 0}
