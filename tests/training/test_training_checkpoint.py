"""Checkpoints of a real engine on two ranks: complete or absent, written during training, verified before they are read."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import write_config
from distributed_ranks import on_ranks
from engines import CELLS, CPU, embed_text, full_state, new_engine, train_stage, train_steps

from distill.run.collectives import barrier, rank
from distill.run.files import read_json, write_json
from distill.training import fragments
from distill.training.checkpoint import Checkpoints
from distill.training.fragments import copy_owned

MUST_MATCH = {"seed": 0, "ckd": {"global_batch": 12}}
CELL = "zero2"


def checkpoints_in(directory, must_match=MUST_MATCH):
    return Checkpoints(directory, keep=1, device=CPU, must_match=must_match)


def save_three(directory):
    """Steps 2, 4 and 6, of which the last two are kept; the state after 2, 4, 6 and 8 steps."""
    engine = new_engine(CELL, directory)
    checkpoints = checkpoints_in(directory / "checkpoints")
    found = {}
    for step in (2, 4, 6):
        train_steps(engine, range(step - 2, step))
        found[step] = full_state(engine)
        checkpoints.save(engine, step, {"step": step, "best_score": 0.5})
    train_steps(engine, range(6, 8))  # while step 6 is being written
    found[8] = full_state(engine)
    checkpoints.wait()
    return found


def resume(directory, must_match=MUST_MATCH):
    """What a fresh engine has restored, and its state after the steps to 8."""
    engine = new_engine(CELL, directory.parent, seed=2)
    state = checkpoints_in(directory, must_match).load(engine)
    train_steps(engine, range(state["step"] if state else 0, 8))
    return state, full_state(engine)


def same(found, expected):
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    states, others = on_ranks(2, save_three, directory)
    assert same(states[8], others[8])
    return directory / "checkpoints", states


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    return tmp_path / "checkpoints", saved[1]


def test_the_newest_and_the_one_before_it_are_kept_and_nothing_half_written(saved):
    assert sorted(path.name for path in saved[0].iterdir()) == ["step-00000004", "step-00000006"]
    files = ["COMPLETE.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert all(sorted(path.name for path in folder.iterdir()) == files for folder in saved[0].iterdir())


def test_a_resumed_engine_continues_as_if_it_had_never_stopped(copy):
    directory, states = copy
    for state, found in on_ranks(2, resume, directory):
        assert state == {"step": 6, "best_score": 0.5} and same(found, states[8])


def save_one(directory, cell):
    engine = new_engine(cell, directory)
    checkpoints = checkpoints_in(directory / "checkpoints")
    train_steps(engine, range(2))
    checkpoints.save(engine, 2, {"step": 2})
    checkpoints.wait()


def count_opened(directory, cell):
    """The files of a checkpoint that this rank opens to continue from it."""
    opened, safe_open = [], fragments.safe_open
    fragments.safe_open = lambda path, **options: opened.append(path.name) or safe_open(path, **options)
    assert checkpoints_in(directory / "checkpoints").load(new_engine(cell, directory, seed=2))
    return sorted(set(opened))


@pytest.mark.parametrize("cell", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2")), "zero3"])
def test_a_rank_reads_its_own_file_and_that_of_rank_0_where_the_number_of_ranks_is_the_same(tmp_path, cell):
    on_ranks(3, save_one, tmp_path, cell)
    names = [f"rank-0000{number}.safetensors" for number in range(3)]
    assert on_ranks(3, count_opened, tmp_path, cell) == [names[:1], names[:2], [names[0], names[2]]]
    assert on_ranks(2, count_opened, tmp_path, cell) == [names, names]


def save_below_a_later_one(directory):
    engine = new_engine(CELL, directory)
    checkpoints = checkpoints_in(directory / "checkpoints")
    for step in (2, 4, 6):
        checkpoints.save(engine, step, {"step": step})
    checkpoints.wait()


def save_one_where_absence_is_cached(directory):
    """As on NFS: what was not there when it was first asked for is not there for a while; a listing is up to date."""
    for name in ("exists", "is_file"):
        ask = getattr(Path, name)
        setattr(Path, name, lambda path, ask=ask, **options: not path.match("rank-*.json") and ask(path, **options))
    save_one(directory, CELL)


def test_a_checkpoint_is_complete_as_soon_as_the_listing_of_its_folder_has_all_files(tmp_path):
    on_ranks(2, save_one_where_absence_is_cached, tmp_path)
    assert (tmp_path / "checkpoints/step-00000002/COMPLETE.json").is_file()


def test_a_damaged_checkpoint_of_a_later_step_does_not_count_among_those_that_are_kept(tmp_path):
    for step in (8, 10):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step:08d}/COMPLETE.json").write_text("{}")
    on_ranks(1, save_below_a_later_one, tmp_path)
    assert sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir()) == [4, 6, 8, 10]


def damage(folder, how):
    files = sorted(folder.glob("*.safetensors"))
    if how == "flipped":
        data = bytearray(files[1].read_bytes())
        data[len(data) // 2] ^= 1
        files[1].write_bytes(data)
    elif how == "truncated":
        files[1].write_bytes(files[1].read_bytes()[:-1])
    elif how == "missing":
        files[1].unlink()
    elif how == "description":
        (folder / "COMPLETE.json").write_text((folder / "COMPLETE.json").read_text()[:-20])
    elif how == "value":
        text = (folder / "COMPLETE.json").read_text()
        (folder / "COMPLETE.json").write_text(text.replace('"best_score": 0.5', '"best_score": 0.7'))
    elif how == "step":
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("step-00000004"), folder)
    elif how in ("list", "empty"):
        (folder / "COMPLETE.json").write_text("[]" if how == "list" else "{}")
    elif how == "incomplete":
        (folder / "COMPLETE.json").unlink()


MESSAGES = {
    "flipped": "step-00000006 is damaged and is passed over: rank-00001.safetensors does not match its checksum",
    "truncated": "step-00000006 is damaged and is passed over: rank-00001.safetensors does not match its checksum",
    "missing": "step-00000006 is damaged and is passed over: rank-00001.safetensors is missing",
    "description": "step-00000006 is damaged and is passed over: COMPLETE.json: Expecting",
    "value": "step-00000006 is damaged and is passed over: COMPLETE.json: it was changed after it was written",
    "step": "step-00000006 is damaged and is passed over: COMPLETE.json is of step 4",
    "list": "step-00000006 is damaged and is passed over: COMPLETE.json: it is not a JSON object",
    "empty": "step-00000006 is damaged and is passed over: COMPLETE.json: it was changed after it was written",
    "incomplete": "step-00000006 is damaged and is passed over: COMPLETE.json is missing",
}


@pytest.mark.parametrize("how", MESSAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over_for_the_older_one(copy, how, capfd):
    directory, states = copy
    damage(directory / "step-00000006", how)
    for state, found in on_ranks(2, resume, directory):
        assert state["step"] == 4 and same(found, states[8])
    printed = capfd.readouterr().err
    assert printed.count("passed over") == 1 and MESSAGES[how] in printed
    assert (directory / "step-00000006.damaged").exists()


def test_without_a_valid_checkpoint_the_stage_begins_again(copy):
    directory, states = copy
    for folder in directory.iterdir():
        damage(folder, "flipped")
    for state, found in on_ranks(2, resume, directory):
        assert state is None and not same(found, states[8])


def test_what_a_killed_run_left_half_written_is_no_checkpoint_and_is_removed(copy):
    directory, _ = copy
    (directory / "step-00000006").rename(directory / "step-00000006.part")
    shutil.copytree(directory / "step-00000004", directory / "step-00000002.deleted.part")
    for state, _ in on_ranks(2, resume, directory):
        assert state["step"] == 4
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000004"]


def test_a_checkpoint_of_other_settings_is_refused_and_the_differences_are_named(copy):
    directory, _ = copy
    other = {"seed": 1, "ckd": {"global_batch": 16}}
    named = r"saved with other settings \(ckd.global_batch: 12 -> 16; seed: 0 -> 1\): restore them to continue it, use another"
    with pytest.raises(AssertionError, match=named):
        on_ranks(2, resume, directory, other)
    changed = read_json(directory / "step-00000006/COMPLETE.json")
    changed["must_match"]["parameters"]["projection.bias"] = [4]
    write_json(directory / "step-00000006/COMPLETE.json", changed)
    with pytest.raises(AssertionError, match=r"\(parameters.projection.bias: \[4\] -> \[3\]\)"):
        on_ranks(2, resume, directory)


def keep_students(directory):
    """Checkpoints after 2, 4 and 6 steps, of which the second and third name the same best student; a later one after them."""
    engine, student = new_engine(CELL, directory), directory / "student"
    checkpoints = checkpoints_in(directory / "checkpoints")
    for step, best in ((2, 2), (4, 4), (6, 4), (8, 8)):
        if step == best:
            shutil.rmtree(student, ignore_errors=True)
            (student / "tokenizer").mkdir(parents=True)
            (student / "tokenizer/words.txt").write_text(f"of step {best}")
        if step < 8:
            checkpoints.save(engine, step, {"step": step, "best_step": best}, student)
    checkpoints.wait()


def student_after_a_load(directory):
    state = checkpoints_in(directory / "checkpoints").load(new_engine(CELL, directory), directory / "student")
    words = directory / "student/tokenizer/words.txt"
    return state and state["best_step"], words.read_text() if words.exists() else None


def test_the_best_student_is_restored_from_the_newest_valid_checkpoint(tmp_path):
    on_ranks(1, keep_students, tmp_path)
    words = "student/tokenizer/words.txt"
    newest, older = (tmp_path / f"checkpoints/step-0000000{step}" for step in (6, 4))
    places = {path.stat().st_ino for path in (newest / words, older / words, tmp_path / words)}
    assert len(places) == 3, "a damaged file is damaged in one place"
    (tmp_path / "student").rename(tmp_path / "student.old")  # a kill between the two renames
    assert on_ranks(1, student_after_a_load, tmp_path) == [(4, "of step 4")]
    assert not list(tmp_path.glob("student.*"))
    (newest / words).unlink()
    (newest / words).write_text("of step 5")
    assert on_ranks(1, student_after_a_load, tmp_path) == [(4, "of step 4")]
    assert newest.with_suffix(".damaged").exists()
    shutil.rmtree(tmp_path / "checkpoints")
    assert on_ranks(1, student_after_a_load, tmp_path) == [(None, None)], "a stage that begins again has no student yet"


def changes_in_two_steps(directory, cell):
    """Trains two more steps; the kinds of tensors whose earlier copies have changed, and those whose values have."""
    engine = new_engine(cell, directory)
    train_steps(engine, range(2))
    copied = copy_owned(engine)
    before = {name: values.clone() for name, values in copied.items()}
    train_steps(engine, range(2, 4))
    later = copy_owned(engine)
    engine.destroy()
    changed = {name.split("/")[0] for name in copied if not copied[name].equal(before[name])}
    return changed, {name.split("/")[0] for name in copied if not later[name].equal(copied[name])}


def copies_of_all_cells(directory):
    return {cell: changes_in_two_steps(directory, cell) for cell in CELLS}


def test_what_is_written_is_a_copy_that_later_steps_do_not_change(tmp_path):
    for found in on_ranks(2, copies_of_all_cells, tmp_path):
        assert all(found[cell] == (set(), {"master", "exp_avg", "exp_avg_sq"}) for cell in CELLS)


def run_out_of_space(directory, when):
    """Limits the size of files on rank 1. Returns the errors that this rank raised, and the checkpoint that can be loaded."""
    engine = new_engine(CELL, directory)
    checkpoints = checkpoints_in(directory / "checkpoints")
    checkpoints.save(engine, 1, {"step": 1})
    checkpoints.wait()
    if rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    checkpoints.save(engine, 2, {"step": 2})
    checkpoints._writer.written.wait()
    raised = {}
    for call in ("check", "wait") if when == "check" else ("save",):
        try:
            getattr(checkpoints, call)(*((engine, 3, {"step": 3}) if call == "save" else ()))
        except OSError as error:
            raised[call] = f"{error.filename}: {error.strerror}" if error.strerror else str(error)
    barrier()
    return raised, checkpoints_in(directory / "checkpoints").load(engine)


@pytest.mark.parametrize("when", ["check", "save"])
def test_an_error_in_the_background_ends_the_run_on_every_rank_and_the_last_checkpoint_stays(tmp_path, when):
    (healthy, state), (full, other_state) = on_ranks(2, run_out_of_space, tmp_path, when)
    part = tmp_path / "checkpoints/step-00000002.part"
    of_rank_1 = f"{part}/rank-00001.safetensors: File too large"
    of_rank_0 = f"{part}: rank 1 could not write its part of the checkpoint"
    assert full == ({"check": of_rank_1, "wait": of_rank_1} if when == "check" else {"save": of_rank_1})
    assert healthy == ({"wait": of_rank_0} if when == "check" else {"save": of_rank_0})
    assert state == other_state == {"step": 1}


def train_with_little_space(path, limit):
    """The system refuses files above `limit` bytes: students and records are smaller, a checkpoint with its moments is not."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    train_stage(path, "ckd", ["ckd.dev_every=100", "ckd.save_every=5"])


def test_a_full_disk_ends_the_run_before_the_next_save(tmp_path, tiny_encoder):
    config = embed_text(write_config(tmp_path, tiny_encoder))
    with pytest.raises(AssertionError, match=r"step-00000005.part/rank-00000.safetensors") as raised:
        on_ranks(1, train_with_little_space, config, (tiny_encoder / "model.safetensors").stat().st_size * 5 // 4)
    assert "in check" in str(raised.value) and "File too large" in str(raised.value)
