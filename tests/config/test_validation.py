"""What a user reads when values do not fit a spec."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from efficient_lm.errors import ConfigError
from efficient_lm.spec import Choice, Count, Listing, OneOf, PerLayer, Positive, Spec
from efficient_lm.validation import validate

VARYING = "a whole number or a mapping with 'start' and 'end' or with 'center'"


class ToolSpec(Choice, role="tool"):
    pass


class HammerSpec(ToolSpec):
    kind: Literal["hammer"] = "hammer"
    weight: PerLayer[Positive] = 1.0


class SawSpec(ToolSpec):
    kind: Literal["saw"] = "saw"
    teeth: PerLayer[Count | None] = None


class BoxSpec(Spec):
    tool: OneOf[ToolSpec] | None = None


class ShopSpec(Spec):
    boxes: dict[str, BoxSpec] = {}
    names: Annotated[Listing[str], Field(min_length=1)] = ("a",)
    count: Count
    size: Positive | Literal["any"] = "any"
    mode: Literal["fast", "slow"] = "fast"
    open: bool = True


def fault(prefix="", **values):
    with pytest.raises(ConfigError) as caught:
        validate(ShopSpec, {"count": 1} | values, prefix)
    return str(caught.value)


def saw(**values):
    return {"boxes": {"red": {"tool": {"kind": "saw", **values}}}}


def test_a_valid_mapping_gives_the_spec():
    shop = validate(ShopSpec, {"count": 1e2, **saw(teeth=[3, None])})
    assert shop.count == 100 and shop.boxes["red"].tool.teeth == (3, None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"coutn": 2}, "coutn: unknown key; did you mean 'count'? valid: count, boxes, mode, names, open, size"),
        ({"boxes": {"red": {"tols": 1}}}, "boxes.red.tols: unknown key; did you mean 'tool'? valid: tool"),
        (saw(teth=3), "boxes.red.tool.teth: unknown key; did you mean 'teeth'? valid: teeth, kind"),
        (saw(kind="sew"), "boxes.red.tool.kind: unknown tool kind 'sew'; did you mean 'saw'? valid: saw, hammer"),
        ({"boxes": {"red": {"tool": {"teeth": 1}}}}, "boxes.red.tool: expected a mapping with the key 'kind'"),
        ({"boxes": {"red": {"tool": "saw"}}}, "(valid: hammer, saw); got the text 'saw'"),
        (saw(teeth="x"), f"{VARYING} or a list; got the text 'x'"),
        (saw(teeth=[1, "x"]), "boxes.red.tool.teeth.1: expected a whole number; got the text 'x'"),
        (saw(teeth=0), "boxes.red.tool.teeth: expected at least 1; got 0"),
        (saw(teeth=1.5), "boxes.red.tool.teeth: expected a whole number"),
        (saw(teeth={"start": 1}), f"boxes.red.tool.teeth: expected {VARYING}"),
        ({"count": "3"}, "count: expected a whole number; got the text '3'"),
        ({"count": None}, "count: expected a whole number; got null"),
        ({"size": -1}, "size: expected a number above 0; got -1"),
        ({"size": "large"}, "size: expected a number or 'any'; got the text 'large'"),
        ({"mode": "fats"}, "mode: 'fats' is not valid; did you mean 'fast'? valid: fast, slow"),
        ({"open": 1}, "open: expected true or false; got 1"),
        ({"names": []}, "names: expected at least 1 item; got a list of 0"),
        ({"names": "a"}, "names: expected a list; got the text 'a'"),
        ({"boxes": []}, "boxes: expected a mapping; got a list of 0"),
    ],
)  # fmt: skip
def test_one_line_per_fault(values, said):
    text = fault(**values)
    assert said in text and "\n" not in text


def test_a_missing_value_and_the_prefix():
    with pytest.raises(ConfigError, match=r"^shop\.count: a value is needed$"):
        validate(ShopSpec, {}, "shop")


def test_three_faults_at_most():
    lines = fault(a=1, b=2, c=3, d=4, e=5).splitlines()
    assert len(lines) == 4 and lines[0].startswith("a: unknown key") and lines[-1] == "and 2 more"
