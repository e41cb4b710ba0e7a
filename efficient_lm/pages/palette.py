"""Colours, marks and dashes of what is told apart in a chart; those of pages and of pictures are the same.

Six hues in two lightnesses of their own, for light and for dark grounds. They differ for people with protanopia,
deuteranopia and tritanopia too; what comes after the sixth has other dashes, and no mark and colour come together
twice before the thirty-seventh.
"""

from typing import NamedTuple

LIGHT = ("#2166c8", "#b5410b", "#119c84", "#e05cc3", "#8f8a12", "#4a2a86")
DARK = ("#5b7cf5", "#e98a4e", "#5fe3c9", "#c9649f", "#e6dc5a", "#b9a6ff")
GROUNDS = ("#ffffff", "#15181d")
"""Of charts, light and dark."""
MARKS = ("o", "s", "^", "D", "v", "P")
"""As Matplotlib names them; a page draws the same ones."""
DASHES = ((), (7, 3), (2, 3), (9, 3, 2, 3))
"""Lengths of strokes and gaps, in line widths or pixels."""


class Style(NamedTuple):
    """How a group looks.

    Attributes:
        color, mark, dash: places in the tables above; a colour of None is the grey of what stands back.
    """

    color: int | None
    mark: int
    dash: int


def style(index: int, second: int = 0, seconds: int = 1) -> Style:
    """Of the group at this place in the legend.

    Args:
        second: its place, of `seconds` places, along something else that groups differ in: groups that differ in that
            alone have one colour, and another mark and dash.
    """
    turn, color = divmod(index, len(LIGHT))
    turn = turn * seconds + second
    return Style(color, (color + turn) % len(MARKS), turn % len(DASHES))


MUTED = Style(None, 0, 0)
"""Of what stands back."""
GREY = "#8a8f98"
"""Its colour, on both grounds."""


def style_sheet() -> str:
    """The colours as properties of CSS, by what the reader's system prefers."""

    def properties(colors: tuple[str, ...], ground: str) -> str:
        named = "".join(f"--c{number}:{color};" for number, color in enumerate(colors))
        return f":root{{{named}--ground:{ground};--grey:{GREY}}}"

    light, dark = properties(LIGHT, GROUNDS[0]), properties(DARK, GROUNDS[1])
    return f"{light}@media(prefers-color-scheme:dark){{{dark}}}"
