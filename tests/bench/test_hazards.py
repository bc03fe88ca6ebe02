"""The check whether an instruction touches what a matrix instruction in flight works on, on code
written by hand; test_triton_compile.py runs it over the kernels.
"""

import pytest

from t5fx.bench.gpu.hazards import accesses, accumulator, hazards, left_operand
from t5fx.bench.gpu.offline import Instruction

#: A product of left operand R8 to R11 into R24 to R55; the second closes its group.
FIRST = "HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, RZ, !UPT"
LAST = "HGMMA.64x64x16.F32.BF16 R24, R12, gdesc[UR4].tnspB, R24, gsb0"
#: One whose operands both lie in shared memory.
SHARED = "HGMMA.64x64x16.F32.F16 R64, gdesc[UR8].tnspB, R64, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
WAIT_FOR_ALL_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x1"


def assembled(*lines):
    """Instructions 16 bytes apart, as `offline.instructions` gives them."""
    code = []
    for place, line in enumerate(lines):
        predicate, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        name, _, operands = rest.partition(" ")
        code.append(Instruction(16 * place, name, operands, bool(predicate)))
    return code


@pytest.mark.parametrize(
    "between",
    [
        "FADD R0, R8, R9",  # a left operand may be read
        "FADD R12, R1, R2",  # belongs to no product yet
        "STG.E.128 desc[UR4][R8.64], R20",
        "IMAD.WIDE R6, R8, 0x4, R12",
        "LDSM.16.M88.4 R4, [R0]",
        "ISETP.GE.AND P0, PT, R8, R9, PT",
        "LOP3.LUT P0, RZ, R8, 0x3, RZ, 0xc0, !PT",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
    ],
)
def test_what_may_be_done_meanwhile(between):
    assert not hazards(assembled(FIRST, between, LAST, WAIT, "FADD R24, R24, R8"))


@pytest.mark.parametrize(
    ("between", "kind"),
    [
        ("FADD R8, R1, R2", "writes a left operand"),
        ("F2FP.BF16.F32.PACK_AB R11, R1, R2", "writes a left operand"),
        ("LDS.128 R4, [R0]", None),
        ("LDS.128 R5, [R0]", "writes a left operand"),
        ("LDG.E.64 R7, desc[UR4][R2.64]", "writes a left operand"),
        ("LDSM.16.MT88.4 R6, [R0]", "writes a left operand"),
        ("LDSM.16.M88.2 R6, [R0]", None),
        ("IMAD.WIDE.U32 R10, R1, 0x4, R2", "writes a left operand"),
        ("CS2R R10, SRZ", "writes a left operand"),
        ("SHFL.BFLY PT, R9, R1, 0x1, 0x1f", "writes a left operand"),
        ("@P0 MOV R10, R3", "writes a left operand"),
        ("MOV R30, R3", "writes an accumulator"),
        ("CS2R R54, SRZ", "writes an accumulator"),
        ("FADD R0, R24, R1", "reads an accumulator"),
        ("STG.E desc[UR4][R2.64], R55", "reads an accumulator"),
        ("STS.128 [R2], R20", None),
        ("STS.128 [R2], R21", "reads an accumulator"),
        ("LDG.E R0, desc[UR4][R54.64]", "reads an accumulator"),
        ("ISETP.GE.AND P0, PT, R24, R9, PT", "reads an accumulator"),
        ("R2UR UR4, R40", "reads an accumulator"),
        # Other products.
        ("HGMMA.64x16x16.F32.BF16 R8, R16, gdesc[UR4], RZ, !UPT", "writes a left operand"),
        ("HGMMA.64x64x16.F32.BF16 R24, R16, gdesc[UR4], R24", None),
        ("HGMMA.64x64x16.F32.BF16 R40, R16, gdesc[UR4], RZ, !UPT", "writes an accumulator"),
        ("HGMMA.64x16x16.F32.BF16 R64, R28, gdesc[UR4], RZ, !UPT", "reads an accumulator"),
        ("HGMMA.64x64x16.F32.BF16 R56, R8, gdesc[UR4], RZ, !UPT", None),
        ("HGMMA.64x64x16.F16 R16, R12, gdesc[UR4], RZ, !UPT", "writes an accumulator"),
        ("HGMMA.64x32x16.F16 R16, R12, gdesc[UR4], RZ, !UPT", None),
    ],
)
def test_what_may_not(between, kind):
    found = hazards(assembled(FIRST, between, WAIT))
    if kind is None:
        assert not found
    else:
        assert kind in [hazard.kind for hazard in found]
        assert {(h.instruction.address, h.product.address) for h in found} == {(16, 0)}
        said = f"0x0010 {between.removeprefix('@P0 ')} {kind} of 0x0000 HGMMA"
        assert any(str(hazard).startswith(said) for hazard in found)


def test_waits():
    touch = "FADD R0, R24, R64"
    assert not hazards(assembled(FIRST, LAST, SHARED, WAIT, touch))
    found = hazards(assembled(FIRST, LAST, SHARED, WAIT_FOR_ALL_BUT_ONE, touch))
    assert [h.product.address for h in found] == [32]
    found = hazards(assembled(SHARED, FIRST, LAST, WAIT_FOR_ALL_BUT_ONE, touch))
    assert [h.product.address for h in found] == [16, 32]
    # A product that closes no group is waited for by nothing.
    assert hazards(assembled(FIRST, WAIT, "MOV R8, R0"))
    # A wait that may be passed by is none.
    assert hazards(assembled(FIRST, LAST, f"@P0 {WAIT}", "MOV R8, R0"))


def test_paths():
    around = assembled(
        "MOV R0, R1",
        "MOV R8, R2",  # the next turn of the loop: the last one's product is in flight
        FIRST,
        LAST,
        "@P0 BRA 0x10",
        WAIT,
        "EXIT",
    )
    assert [(h.kind, h.instruction.address, h.product.address) for h in hazards(around)] == [
        ("writes a left operand", 16, 32)
    ]
    skipped = assembled(LAST, "@P0 BRA 0x30", WAIT, "MOV R12, R0", "EXIT")
    assert [h.instruction.address for h in hazards(skipped)] == [48]
    elsewhere = assembled(LAST, "BRA 0x30", "MOV R12, R0", WAIT, "EXIT")
    assert not hazards(elsewhere)
    assert not hazards(assembled(LAST, "EXIT", "MOV R12, R0"))
    assert hazards([]) == []


def test_registers():
    (store,) = assembled("STG.E.64 desc[UR4][R8.64+0x10], R20")
    assert accesses(store) == (frozenset({8, 9, 20, 21}), frozenset())
    (wide,) = assembled("IMAD.WIDE R2, R5, -0x4, R6")
    assert accesses(wide) == (frozenset({5, 6, 7}), frozenset({2, 3}))
    (product,) = assembled("HGMMA.64x8x8.F32.TF32 R4, R8, gdesc[UR4], R4, gsb0")
    assert accumulator(product) == frozenset(range(4, 8))
    assert left_operand(product) == frozenset(range(8, 12))
