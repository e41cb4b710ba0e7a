"""`efficient-lm verify`: statuses, tables, and what is refused."""

import shutil

import numpy as np

from efficient_lm.verification.findings import State
from efficient_lm.verification.resume_proof import _compare_arrays


def test_an_audit_and_its_status(run, plain, tmp_path):
    status, out, _ = run("verify", f"run={plain}")
    assert status == 0 and "checkpoint 3" in out and "0 fault" in out
    copy = shutil.copytree(plain, tmp_path / "copy")
    (copy / "tokenizer" / "byte_tokenizer.json").unlink()
    status, out, _ = run("verify", f"run={copy}")
    assert status == 4 and "1 fault" in out


def test_resuming_is_proven_for_a_config(run, on_numbers):
    status, out, err = run("verify", *on_numbers, "steps=1")
    assert status == 0, err
    table = out.split("1 + 1 steps against 2 in one go\n")[1]
    assert "losses              ok       2 steps are equal to the bit" in table
    assert "parameters, step 2  ok " in table and "optimizer, step 2   ok " in table and "0 fault" in table


def test_what_cannot_be_verified(run, plain, tmp_path):
    for keys, status, words in (
        ((f"run={plain}", "model.width=32"), 2, "model.width=32: with run= the run's own config is verified"),
        ((f"run={plain}", "steps=2"), 2, "steps: 2 and as many again are more than train.steps=3; at most 1"),
        ((f"run={plain}", "steps=few"), 2, "steps: "),
        ((f"run={tmp_path}",), 4, "neither a run directory"),
        ((str(plain),), 2, "not an override"),
    ):
        found, _, err = run("verify", *keys)
        assert found == status and words in err, err


def test_what_differs_is_named_first_and_by_how_much():
    whole = {"a": np.ones(3, np.float32), "b.mu": np.arange(4.0), "c": np.float32(np.nan)}
    halves = {**whole, "b.mu": np.array([0.0, 1.0, 2.5, 3.0])}
    assert _compare_arrays("optimizer", whole, whole).state == State.OK
    found = _compare_arrays("optimizer", whole, halves)
    assert found.state == State.FAULT
    assert found.text == "'b.mu' differs in 1 of 4 values, by 0.5 at most (values are up to 3)"
    other = _compare_arrays("optimizer", whole, {name: whole[name] for name in ("a", "b.mu")})
    assert other.text == "'c' is in one of them alone"
