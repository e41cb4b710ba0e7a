"""Models that were not trained to be smaller, cut from the command line and from Python."""

import numpy as np
import pytest

import efficient_lm as elm


def down(model):
    return np.asarray(model.params["stack"]["segment_0"]["layer_0"]["ffn"]["inner"]["down"]["weight"])


def test_the_most_active_units_are_extracted(run, plain, numbers, tmp_path):
    model, found = elm.load(plain), {}
    for name, keys in {"left_out": [], "active": ["order=activation"], "first": ["order=none"]}.items():
        arguments = ["extract", f"checkpoint={plain}", f"output={tmp_path / name}", "ffn=0.5", "limit=4", *keys]
        status, _, err = run(*arguments)
        assert status == 0, err
        found[name] = down(elm.load(tmp_path / name))
    np.testing.assert_array_equal(found["first"], down(model)[:, :16])
    np.testing.assert_array_equal(found["left_out"], found["active"])
    assert not np.array_equal(found["active"], found["first"])
    np.testing.assert_array_equal(down(model.extract(ffn=0.5, rows=4)), found["active"])
    heavy = down(model.extract(ffn=0.5, order="weight", text=str(numbers)))
    rows = {tuple(row) for row in down(model)[0]}
    assert {tuple(row) for row in heavy[0]} < rows and heavy.shape == found["active"].shape
    assert model.extract(layers=0.5, rows=4).config.model.numbering.layers in ((0,), (1,))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["ffn=0.5", "order=activations"], "order: "),
        (["experts=[0]", "order=weight"], "order: it says which units a part of an axis keeps"),
        (["ffn=0.5", "order=none", "text=missing.txt"], "text: nothing is measured; it is for a number of experts"),
        (["ffn=0.5", "text=missing.txt"], "missing.txt"),
        (["ffn=0.5", "uneven=true"], "uneven: nothing is measured"),
    ],
)
def test_faults_write_nothing(run, plain, tmp_path, keys, said):
    status, _, err = run("extract", f"checkpoint={plain}", f"output={tmp_path / 'new'}", *keys)
    assert status != 0 and said in err and not (tmp_path / "new").exists()
