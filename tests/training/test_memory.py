"""Beginning from a checkpoint never holds a first state besides the one that is read: peaks of a process of its own."""

import json

import jax
import jax.numpy as jnp
import pytest

from efficient_lm.training import staging
from efficient_lm.training.checkpoints import Checkpoints, restore_from

MEASURED = """
    import json, re, sys
    from pathlib import Path
    import jax
    from efficient_lm.api import load
    from efficient_lm.config import load_run_config, save_config
    from efficient_lm.training.checkpoints import Checkpoints
    from efficient_lm.training.resuming import resume_or_start
    from efficient_lm.training.run_directory import RunDirectory
    from efficient_lm.training.setup import prepare

    def memory(name):
        return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

    def peak(work):
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        kept = work()
        return memory("VmHWM") - before

    def setup(name, *more):
        keys = ["train.sequence_length=32", f"run.dir={folder}/{name}", "train.steps=10", *more]
        return prepare(load_run_config(keys))

    def begin(made):
        with made.layout.active(), RunDirectory(made.config.run.dir) as run:
            checkpoints = Checkpoints(run.checkpoints)
            state, _ = resume_or_start(made, run, checkpoints)
            jax.block_until_ready(state)
            checkpoints.close()
        return state

    folder = Path(sys.argv[1])
    first = setup("first", "model.width=768", "model.layout=[layer,layer,layer]", "mixer.heads=4", "tokenizer=bytes")
    with first.layout.active():
        state = first.fresh_state()
    sizes = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(state[name])) for name in ("parameters", "optimizer")}
    checkpoints = Checkpoints(folder / "first" / "checkpoints")
    rest = {name: value for name, value in state.items() if name != "parameters"}
    record = {"step": 5, "tokens": 5, "seconds": 1.0, **first.provenance}
    checkpoints.save(5, {"parameters": state["parameters"], "optimizer": rest}, record)
    checkpoints.close()
    save_config(folder / "first" / "config.yaml", first.config)
    first.tokenizer.save(folder / "first" / "tokenizer")
    del state, rest
    source = f"init_from={folder}/first"
    runs = {"resumed": first, "branched": setup("branched", source, "init_state=all"), "begun": setup("begun", source)}
    peaks = {name: peak(lambda: begin(made)) for name, made in runs.items()}
    peaks["loaded"] = peak(lambda: load(folder / "first"))
    print(json.dumps(sizes | peaks))
"""


@pytest.mark.slow
def test_a_state_is_read_into_its_place(on_devices, tmp_path):
    code = MEASURED.replace("sys.argv[1]", repr(str(tmp_path)))
    found = json.loads(on_devices(1, code).splitlines()[-1])
    state = found["parameters"] + found["optimizer"]
    assert state > 150e6, "large beside what compiling and reading need"
    # Half of it for what is on its way; a second state would be twice as much, and more while it is read.
    assert found["resumed"] < 1.5 * state, found
    assert found["branched"] < 1.5 * state, found
    assert found["begun"] < 1.5 * state, found
    assert found["loaded"] < 1.75 * found["parameters"], found


@pytest.mark.parametrize("going_on", [False, True])
def test_what_is_being_written_is_not_overwritten(going_on, tmp_path, monkeypatch):
    """Steps that donate the state go on while it is written; what is on disk is what was saved."""
    monkeypatch.setattr(staging, "SMALLEST", 0)
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"parameters": {"weight": jnp.zeros((8, 1 << 20))}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {"step": 1}, going_on)
    for _ in range(5):
        state = jax.block_until_ready(step(state))
    checkpoints.close()
    place = jax.ShapeDtypeStruct((8, 1 << 20), jnp.float32, sharding=state["parameters"]["weight"].sharding)
    (items, _), now = restore_from(tmp_path, {"parameters": {"weight": place}}), state["parameters"]["weight"]
    assert float(jnp.abs(items["parameters"]["weight"]).max()) == 0 and float(now.min()) == 5
