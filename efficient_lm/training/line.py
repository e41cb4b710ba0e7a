"""A line between the processes of a run: they meet, exchange small values, and notice that one of them is gone.

Process 0 listens, the others call it (TCP, a JSON object per line). A thread in each says every second that its process
lives. When one fails, dies, stops answering or makes no progress, process 0 tells the others, and each ends with a
line that names it. Nothing here runs on the devices, so a collective that will never finish cannot hold it up.
"""

import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from efficient_lm.errors import ConfigError, ResourceError
from efficient_lm.training.group import Group

BEAT_SECONDS = 1.0
PATIENCE = 5.0
"""Seconds that a process told of a failure leaves its main thread to end by itself."""
LONGEST = 1 << 20
"""Bytes of a message; whoever sends more is none of ours."""


@dataclass
class Peer:
    """What is known of another process."""

    index: int
    socket: socket.socket | None
    where: str
    heard: float = field(default_factory=time.monotonic)
    received: bytes = b""
    step: int = 0
    idle: float = 0.0
    left: bool = False
    alike: bool = True

    def __str__(self) -> str:
        return f"process {self.index} ({self.where})"


class Line:
    """The line of one process; used by `with`, after which the others may end without anybody minding.

    Args:
        group: the processes.
        fingerprint: of what must be alike in all of them, such as the config.
        start_timeout: seconds within which all must come.
        peer_timeout: seconds without a sign of life after which a process counts as gone.
        step_timeout: seconds without progress of a main thread after which the run counts as stuck.
        advice: what the last words of a process end with.
        end: ends this process; by default prints ``error: ...`` and leaves at once with the status.

    Raises:
        ResourceError: not all came in time.
        ConfigError: the fingerprints differ.
    """

    def __init__(
        self,
        group: Group,
        fingerprint: str,
        *,
        start_timeout: float,
        peer_timeout: float,
        step_timeout: float,
        advice: str = "",
        end: Callable[[str, int], None] | None = None,
    ):
        self.group, self.fingerprint, self.advice = group, fingerprint, advice
        self.start_timeout, self.peer_timeout, self.step_timeout = start_timeout, peer_timeout, step_timeout
        self.peers: dict[int, Peer] = {}
        self._end = end or leave
        self._lock, self._news = threading.RLock(), threading.Condition()
        self._said: dict[str, dict[int, Any]] = {}
        self._answers: dict[str, list[Any]] = {}
        self._asked: Counter[str] = Counter()
        self._step, self._moved = 0, time.monotonic()
        self._ending = self._over = False
        self._thread = threading.Thread(target=self._watch, name="watch over processes", daemon=True)

    def meet(self, greeting: Any) -> Any:
        """Wait for all, and begin to watch. Returns what process 0 gave as `greeting`."""
        greeting = self._gather(greeting) if self.group.index == 0 else self._call()
        for peer in self.peers.values():
            peer.socket.settimeout(self.peer_timeout)
        self._moved = time.monotonic()
        self._thread.start()
        return greeting

    def progress(self, step: int | None = None) -> None:
        """The main thread got somewhere: a step, a batch of an evaluation."""
        self._step, self._moved = self._step if step is None else step, time.monotonic()

    def exchange(self, value: Any = None, name: str = "main") -> list[Any]:
        """What each process gave, in their order; waits until all have asked as often under that name."""
        self._asked[name] += 1
        question = f"{name} {self._asked[name]}"
        if self.group.index == 0:
            self._take(0, question, value)
        else:
            self._send(self.peers[0], {"question": question, "value": value})
        with self._news:
            while question not in self._answers:
                self._news.wait(1.0)
            return self._answers.pop(question)

    def leave(self) -> None:
        """Say goodbye when the run is over everywhere."""
        self.exchange()
        self._over = True
        for peer in self.peers.values():
            self._send(peer, {"left": True})
        self._hang_up()

    def fail(self, text: str, status: int) -> None:
        """Tell the others that this process ends, and why; returns when they have gone, after seconds at most."""
        self._ending = True
        if self.group.index == 0:
            self._tell(f"process 0 ({socket.gethostname()}) failed: {text}", status)
        else:
            self._send(self.peers[0], {"failed": text, "status": status})
        deadline = time.monotonic() + 2 * PATIENCE
        while time.monotonic() < deadline and any(not peer.left for peer in self.peers.values()):
            time.sleep(0.05)
        self._over = True
        self._hang_up()

    def _gather(self, greeting: Any) -> Any:
        """Process 0: take calls until all are there."""
        deadline, count = time.monotonic() + self.start_timeout, self.group.count
        with self._listen() as server:
            while len(self.peers) < count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    caller, address = server.accept()
                except TimeoutError:
                    missing = [str(index) for index in range(1, count) if index not in self.peers]
                    raise ResourceError(
                        f"{len(missing)} of {count} processes did not come to {self.group.host}:{self.group.port} "
                        f"within {self.start_timeout:g} s: {', '.join(missing[:8])}; "
                        "are all started, and with the same address?"
                    ) from None
                self._welcome(caller, address[0])
        wrong = [peer for peer in self.peers.values() if not peer.alike]
        text = ""
        if wrong:
            text = (
                f"{wrong[0]} was started with another config, data or version of this package than process 0; "
                "give all the same command"
            )
        for peer in self.peers.values():
            self._send(peer, {"refused": text} if text else {"greeting": greeting})
        if text:
            raise ConfigError(text)
        return greeting

    def _welcome(self, caller: socket.socket, address: str) -> None:
        """Process 0: a caller's first message; what is no process of this run is hung up on."""
        caller.settimeout(PATIENCE)
        try:
            hello = json.loads(_read_line(caller))
            index, where = hello["index"], hello["where"]
            same = hello["fingerprint"] == self.fingerprint and hello["count"] == self.group.count
        except (OSError, ValueError, KeyError, TypeError):
            caller.close()
            return
        if type(index) is not int or not 0 < index < self.group.count or index in self.peers:
            text = f"JAX_PROCESS_ID: there is a process {index} already; each of {self.group.count} needs its own"
            self._send(Peer(0, caller, where), {"refused": text})
            caller.close()
            return
        self.peers[index] = Peer(index, caller, f"{where} at {address}", alike=same)

    def _listen(self) -> socket.socket:
        address, both = (self.group.bind, self.group.port), not self.group.bind and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both or ":" in self.group.bind else socket.AF_INET
        try:
            return socket.create_server(address, family=family, backlog=self.group.count, dualstack_ipv6=both)
        except OSError as error:
            raise ResourceError(
                f"JAX_COORDINATOR_ADDRESS: process 0 cannot listen at port {self.group.port}: {error.strerror}"
            ) from error

    def _call(self) -> Any:
        """Any other process: call process 0 until it answers."""
        deadline, wait = time.monotonic() + self.start_timeout, 0.05
        reason, where = "no answer", (self.group.host, self.group.port)
        hello = {"index": self.group.index, "count": self.group.count, "fingerprint": self.fingerprint}
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = socket.create_connection(where, timeout=left)
                self.peers[0] = Peer(0, line, f"{self.group.host}:{self.group.port}")
                self._send(self.peers[0], hello | {"where": f"{socket.gethostname()}, pid {os.getpid()}"})
                line.settimeout(max(deadline - time.monotonic(), 0.001))
                answer = json.loads(_read_line(line))
                if answer.get("refused"):
                    raise ConfigError(answer["refused"])
                return answer["greeting"]
            except TimeoutError:
                reason = "not all came" if self.peers else "no answer"
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or "it hung up"
            time.sleep(min(wait, max(left, 0)))
            wait = min(2 * wait, 2.0)
        raise ResourceError(
            f"JAX_COORDINATOR_ADDRESS: process 0 did not let process {self.group.index} of {self.group.count} in at "
            f"{self.group.host}:{self.group.port} within {self.start_timeout:g} s ({reason})"
        )

    def _watch(self) -> None:
        """The thread: say that this process lives, listen to the others, and end it when one of them is gone."""
        ears, beaten = selectors.DefaultSelector(), 0.0
        for peer in self.peers.values():
            ears.register(peer.socket, selectors.EVENT_READ, peer)
        while not self._over:
            now = time.monotonic()
            if now - beaten >= BEAT_SECONDS:
                beaten = now
                for peer in self._present():
                    self._send(peer, {"step": self._step, "idle": now - self._moved})
            for key, _ in ears.select(BEAT_SECONDS / 2):
                if not self._hear(key.data):
                    ears.unregister(key.fileobj)
            self._look()

    def _hear(self, peer: Peer) -> bool:
        """Read what a peer sent; False when it has hung up."""
        try:
            data = peer.socket.recv(1 << 16)
        except OSError:
            data = b""
        if not data or len(peer.received) > LONGEST:
            if not (peer.left or self._over or self._ending):
                self._lost(f"{peer} ended without a word")
            peer.left = True
            return False
        peer.heard = time.monotonic()
        *whole, peer.received = (peer.received + data).split(b"\n")
        for message in whole:
            self._understand(peer, json.loads(message))
        return True

    def _understand(self, peer: Peer, message: dict[str, Any]) -> None:
        if "idle" in message:
            peer.step, peer.idle = message["step"], message["idle"]
        elif "value" in message:
            self._take(peer.index, message["question"], message["value"])
        elif "answers" in message:
            self._answer(message["question"], message["answers"])
        elif "left" in message:
            peer.left = True
        elif "failed" in message:
            peer.left = True
            self._lost(f"{peer} failed: {message['failed']}", message["status"])
        elif "stop" in message:
            self._lost(message["stop"], message["status"])

    def _take(self, index: int, question: str, value: Any) -> None:
        """Process 0: keep a value; when all have come, send them round."""
        with self._lock:
            values = self._said.setdefault(question, {})
            values[index] = value
            if len(values) < self.group.count:
                return
            answers = [value for _, value in sorted(self._said.pop(question).items())]
        for peer in self._present():
            self._send(peer, {"question": question, "answers": answers})
        self._answer(question, answers)

    def _answer(self, question: str, answers: list[Any]) -> None:
        with self._news:
            self._answers[question] = answers
            self._news.notify_all()

    def _look(self) -> None:
        """End the run if somebody has been silent, or nobody has got anywhere, for too long."""
        now = time.monotonic()
        for peer in self._present():
            if now - peer.heard > self.peer_timeout and not self._ending:
                self._lost(f"{peer} has not been heard of for {self.peer_timeout:g} s")
        if self.group.index == 0 and not self._ending:
            own = Peer(0, None, socket.gethostname(), step=self._step, idle=now - self._moved)
            everybody = [own, *self._present()]
            if max(peer.idle for peer in everybody) > self.step_timeout:
                last = min(everybody, key=lambda peer: (peer.step, -peer.idle))
                self._lost(f"no progress for {self.step_timeout:g} s; the last is {last}, after {last.step} steps")

    def _lost(self, text: str, status: int = ResourceError.status) -> None:
        """End this process because of another one; process 0 first tells the rest."""
        if self.group.index == 0:
            self._tell(text, status)
        # What ended the other one may be known to this one's main thread as well, in better words.
        deadline = time.monotonic() + (PATIENCE if " failed: " in text else 0)
        while not self._ending and time.monotonic() < deadline:
            time.sleep(0.05)
        if not self._ending:
            self._end(f"{text}{self.advice}", status)

    def _tell(self, text: str, status: int) -> None:
        for peer in self._present():
            self._send(peer, {"stop": text, "status": status})

    def _present(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if not peer.left]

    def _send(self, peer: Peer, message: dict[str, Any]) -> None:
        """A peer that cannot be written to is found to be gone when it is listened to."""
        try:
            with self._lock:
                peer.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass

    def _hang_up(self) -> None:
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2 * BEAT_SECONDS)
        for peer in self.peers.values():
            peer.socket.close()


def leave(text: str, status: int) -> None:
    """Print an error and end the process at once, whatever other threads wait for."""
    cursor = "\033[?25h" if sys.stderr.isatty() else ""
    print(f"{cursor}error: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def hold_aborts() -> None:
    """Give this thread's last words time before JAX aborts the process.

    When process 0 dies, JAX's client in every other process calls abort() in the same instant, without a word that a
    user understands. SIGABRT's handler is therefore the C library's `sleep`, which may be called in a handler: it gets
    the signal's number, six, as its seconds, and in these the watching thread speaks and ends the process.
    """
    import ctypes

    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def _read_line(line: socket.socket) -> bytes:
    """Bytes up to the first newline, one by one: what follows belongs to the thread that listens later."""
    data = b""
    while not data.endswith(b"\n"):
        byte = line.recv(1)
        if not byte or len(data) > LONGEST:
            raise ValueError("hung up")
        data += byte
    return data
