"""Collectives read out of a program: in loops as often as these run, in every way of writing who takes part."""

import pytest

from kernels_pallas.ahead.collectives import collectives, totals

PROGRAM = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %part = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %start = ((bf16[4,8]), bf16[16,8]) all-gather-start(%part), replica_groups=[2,4]<=[8], metadata={op_name="layer"}
  %done = bf16[16,8]{1,0} all-gather-done(%start)
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%index, %part)
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %last = s32[] constant(16)
  ROOT %less = pred[] compare(%index, %last), direction=LT
}

ENTRY %main (x: bf16[4,8], y: f32[32]) -> f32[4] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = f32[32]{0} parameter(1)
  %loop = (s32[], bf16[4,8]{1,0}) while(%begin), condition=%condition, body=%bodySAID
  %all = f32[32]{0} all-reduce(%y), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %own = f32[4]{0} reduce-scatter(%all), replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp'}
}
"""


@pytest.mark.parametrize(("said", "times"), [(', backend_config={"known_trip_count":{"n":"12"}}', 12), ("", 16)])
def test_a_program_is_read(said, times):
    gather, reduce, scatter = collectives(PROGRAM.replace("SAID", said))
    assert gather == ("all-gather", 4 * 8 * 2, 4, times, "layer", (0, 1, 2, 3))
    assert gather.moved == 64 * 3 * times
    assert (reduce.operands, reduce.devices, reduce.moved) == (128, 2, 128)
    assert (scatter.operands, scatter.devices, scatter.moved) == (128, 8, 128 * 7 / 8)
    assert totals([gather, gather])["all-gather"] == {"written": 2, "runs": 2 * times, "bytes": 2 * gather.moved}


@pytest.mark.parametrize(
    ("said", "group"),
    [
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups={{1,5},{0,4}}", (1, 5)),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", (0, 4)),
        ("replica_groups=mesh['fsdp'=8] {'fsdp':(2)2}", (0, 2)),
        ("source_target_pairs={{0,3},{3,0}}", (0, 3)),
        ("replica_groups=[4,2]", ()),
    ],
)
def test_who_takes_part_is_read(said, group):
    line = f"  %all = f32[32]{{0}} all-reduce(%y), {said}, to_apply=%add"
    program = PROGRAM.replace("  %all = f32[32]{0} all-reduce(%y), replica_groups={{0,1},{2,3}}, to_apply=%add", line)
    (found,) = [each for each in collectives(program.replace("SAID", "")) if each.kind == "all-reduce"]
    assert (found.devices, found.group) == (2, group)


@pytest.mark.parametrize(("step", "times"), [(1, 16), (2, 8), (5, 4)])
def test_a_loop_may_count_by_more_than_one(step, times):
    """As the compilers for TPUs do where a product and an exchange go around a ring together."""
    counter = f"  %by = u32[]{{:T(128)}} constant({step})\n  %index = u32[] get-tuple-element(%p), index=0\n"
    text = PROGRAM.replace("SAID", "").replace("s32", "u32")
    text = text.replace("  %part", f"{counter}  %next = u32[] add(%index, %by)\n  %part", 1)
    text = text.replace("tuple(%index, %part)", "tuple(%next, %part)")
    text = text.replace("  %last", "  %index = u32[] get-tuple-element(%p), index=0\n  %last")
    assert collectives(text)[0].times == times


def test_a_loop_of_unknown_length_is_not_guessed():
    text = PROGRAM.replace("SAID", "").replace("constant(16)", "parameter(1)")
    with pytest.raises(ValueError, match="a loop around start does not say how often it runs"):
        collectives(text)
