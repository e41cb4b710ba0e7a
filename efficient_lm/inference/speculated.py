"""What is said of drafts: how many there were, and how many of them stood."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Speculated:
    """What became of drafts.

    Attributes:
        tokens: made, those of the prompts' passes included.
        verifications: of rows, each by one pass of the whole model.
        drafted: proposals that were verified.
        accepted: of these, those that stood.
        sizes: how many of them each draft made.
        seconds: of wall time, compilation and what was done with tokens as they came included.
    """

    tokens: int = 0
    verifications: int = 0
    drafted: int = 0
    accepted: int = 0
    sizes: tuple[int, ...] = ()
    seconds: float = 0.0

    def added(self, verifications: int, drafted: int, accepted: int, *sizes: int) -> "Speculated":
        """With one more pass."""
        return replace(
            self,
            verifications=self.verifications + verifications,
            drafted=self.drafted + drafted,
            accepted=self.accepted + accepted,
            sizes=tuple(map(int.__add__, self.sizes, sizes)),
        )

    def timed(self, tokens: int, seconds: float) -> "Speculated":
        """With so many tokens, in such a time."""
        return replace(self, tokens=tokens, seconds=seconds)

    def figures(self) -> dict[str, Any]:
        """Plain numbers: `tokens`, `seconds`, `acceptance_rate` of proposals, `tokens_per_verification`, by size the
        share of proposals, `size_shares`."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "acceptance_rate": self.accepted / max(self.drafted, 1),
            "tokens_per_verification": 1 + self.accepted / max(self.verifications, 1),
            "size_shares": [count / max(self.drafted, 1) for count in self.sizes],
        }

    def __str__(self) -> str:
        found = self.figures()
        by_size = ", ".join(f"{100 * share:.0f} %" for share in found["size_shares"])
        sizes = f", drafted by size {by_size}" if len(self.sizes) > 1 else ""
        return (
            f"{self.tokens:,} tokens in {self.seconds:.2f} s: {100 * found['acceptance_rate']:.1f} % of drafted tokens "
            f"accepted, {found['tokens_per_verification']:.2f} tokens per verification{sizes}"
        )
