"""Text as its tokens arrive: whole characters as soon as they are there."""

import codecs
from collections.abc import Callable, Sequence


class ByteStream:
    """Text as its bytes arrive; a character appears when its last byte has."""

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token: int) -> str:
        """The characters completed by `token`, possibly none."""
        return self._decoder.decode(self._bytes(int(token)))

    def end(self) -> str:
        """What an unfinished character leaves: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """The same for tokenizers whose tokens have no bytes of their own: decode a short window and show what is new."""

    _longest_character = 4
    _window = 8

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._tokens: list[int] = []
        self._shown = self._held = 0

    def put(self, token: int) -> str:
        """The characters completed by `token`, possibly none."""
        self._tokens.append(int(token))
        text = self._decode(self._tokens)
        if text.endswith("\ufffd") and self._held + 1 < self._longest_character:
            self._held += 1
            return ""
        return self._show(text)

    def end(self) -> str:
        """What an unfinished character leaves: U+FFFD or nothing."""
        return self._show(self._decode(self._tokens))

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        if len(self._tokens) > 2 * self._window:
            self._tokens = self._tokens[-self._window :]
            text = self._decode(self._tokens)
        self._shown, self._held = len(text), 0
        return new
