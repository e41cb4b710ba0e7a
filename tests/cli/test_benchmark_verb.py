"""The verb `benchmark`: a table, a file of figures, and faults."""

import json

import pytest


def test_operators_are_measured(run, tmp_path):
    status, out, err = run(
        "benchmark", "op=linear_recurrence", "shapes=tiny", "rounds=1", "peers=[pallas,xla,reference,fla]",
        "dtype=float32", f"output={tmp_path}",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "linear_recurrence, B2 T75 D128, float32, forward and backward" in out and "fla is not installed" in out
    figures = json.loads((tmp_path / "linear_recurrence_cpu_float32.json").read_text())
    assert [row["peer"] for row in figures["rows"]] == ["pallas", "xla", "reference", "fla"] * 2
    assert {"pallas", "fla"} == {row["peer"] for row in figures["rows"] if "why" in row}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["op=atention"], "op: no operator 'atention'; did you mean 'attention'? valid: attention"),
        (["tune=linear_atention"], "tune: no operator 'linear_atention'; did you mean 'linear_attention'?"),
        (["peers=[xal]"], "peers: no peer 'xal'; did you mean 'xla'?"),
        (["op=attention", "shapes=peers", "only=T9999"], "only: no case of attention has 'T9999' in its name; valid: "),
        (
            ["op=short_convolution", "shapes=peers"],
            "shapes: short_convolution has none called peers; valid: models, tiny",
        ),
        (["shapes=small"], "shapes: 'small' is not valid; valid: models, peers, tiny"),
        (["tune=attention"], "tune=attention: no kernel for backend cpu (Pallas kernels run on TPUs"),
    ],
)
def test_faults(arguments, said, run):
    status, _, err = run("benchmark", *arguments)
    assert status == 2 and said in err and err.count("\n") == 1
