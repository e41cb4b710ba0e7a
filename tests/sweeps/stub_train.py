"""Stands in for ``train``: has its arguments, its files, its signals and its exit statuses, and none of its work.

``loss=``, ``steps=`` and ``seconds=`` (of a step) say what it does; ``fail=3`` ends it with that status at its third
step, unless a file `fixed` lies beside the sweep; ``kill=N`` kills it at its first N starts.
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

asked = dict(text.lstrip("+").split("=", 1) for text in sys.argv[2:])
folder = Path(asked["run.dir"].strip("'"))
steps, pause = int(asked.get("steps", 6)), float(asked.get("seconds", 0.01))
loss = float(asked.get("loss", 3)) + 0.01 * int(asked.get("run.seed", 0))
stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))


def write(name, value):
    half = folder / f".{name}.half"
    half.write_text(json.dumps(value))
    half.replace(folder / name)


lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print(f"error: run.dir: {folder} is in use by another run")
    sys.exit(4)
(folder / "pid").write_text(str(os.getpid()))
with open(folder / "starts", "a") as starts:
    starts.write("start\n")
if len((folder / "starts").read_text().splitlines()) <= int(asked.get("kill", 0)):
    os.kill(os.getpid(), signal.SIGKILL)
saved = folder / "checkpoints"
saved.mkdir(exist_ok=True)
begun = max((int(path.name) for path in saved.iterdir()), default=0)
write("config.yaml", {"overrides": [text for text in sys.argv[2:] if not text.startswith("run.")]})
metrics = folder / "metrics.jsonl"
rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
half = folder / ".metrics.half"
half.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= begun))
half.replace(metrics)
step = begun
while step < steps and not stopped:
    time.sleep(pause)
    step += 1
    if "fail" in asked and step == 3 and not (folder.parents[1] / "fixed").exists():
        print("Traceback (most recent call last):\nerror: the loss was not a number\nafterwards")
        sys.exit(int(asked["fail"]))
    with open(metrics, "a") as file:
        file.write(json.dumps({"step": step, "val_loss": loss + 1 / step}) + "\n")
    (saved / str(step)).mkdir(exist_ok=True)
summary = {"run": str(folder), "step": step, "seconds": 1.0, "val_loss": loss + 1 / max(step, 1), "parameters": 7}
write("summary.json", summary | ({"stopped_by": "SIGTERM"} if step < steps else {}))
sys.exit(128 + signal.SIGTERM if step < steps else 0)
