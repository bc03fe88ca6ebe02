"""The process that checks the kernels on a GPU for ``t5fx.kernels.trust``.

It reads a question as JSON from its standard input and prints one line with the verdict.
"""

import json
import math
import sys
import traceback
from typing import Any, NamedTuple

#: Grids by number of axes: of one token, odd ones, and several thousand tokens.
GRIDS = {
    0: ((1,), (63,), (4099,)),
    1: ((1,), (63,), (4099,)),
    2: ((1, 7), (13, 17), (64, 67)),
    3: ((1, 1, 5), (5, 6, 7), (16, 16, 17)),
}
#: Runs of one case whose bits must be equal.
REPEATS = 3


class Trial(NamedTuple):
    """A case and how it is run; see ``parity.compare`` and ``near_parity.compare``."""

    case: Any
    compiled: str | None = None
    repeats: int = 1


def trials(question: dict[str, Any]) -> list[Trial]:
    """What has to be right: the node, then near attention, if it is mixed in."""
    settings = dict(question["node"])
    found = node_trials(question)
    if settings["neighborhood"] or settings["coarse"]:
        found += near_trials(question)
    return found


def node_trials(question: dict[str, Any]) -> list[Trial]:
    """Of the node without near attention: small and odd before large, eager before compiled."""
    from .launch import INTERPRETED
    from .parity import Case

    width = question["width"]
    settings = dict(question["node"])
    tiny, odd, large = GRIDS[question["axes"]]
    common = {
        "dtype": question["dtype"],
        "locality": settings["locality"],
        "key_norm_eps": settings["key_norm_eps"],
    }
    even = {**common, "head_dim": width, "value_dim": width}
    # A head that is padded, values of an odd number of channels, each of another width.
    padded = {**common, "head_dim": 3 * width // 4, "value_dim": width // 2 + 1}
    own = {"parameters": question["dtype"]}
    found = [
        Trial(Case(**even, grid=odd)),
        Trial(Case(**even, grid=tiny, prefix=0, batch=1, heads=1)),
        Trial(Case(**padded, grid=odd, prefix=2, suffix=3, layout="BHND", **own)),
        Trial(Case(**even, grid=large, suffix=1, **own), repeats=REPEATS),
    ]
    if question["direction"] == "backward":
        found.append(Trial(Case(**even, grid=odd, gradient=2**-13, **own)))
    if not INTERPRETED:
        # Static sizes equal to 1 become constants: other machine code.
        found += [
            Trial(Case(**even, grid=large, batch=1, heads=1, prefix=1, **own), "static"),
            Trial(Case(**even, grid=odd, prefix=0, **own), "static"),
            Trial(Case(**padded, grid=large, prefix=2, suffix=3, **own), "dynamic", REPEATS),
        ]
    return found


def near_trials(question: dict[str, Any]) -> list[Trial]:
    """The checks of near attention, for one question."""
    from .launch import INTERPRETED
    from .near_parity import NearCase

    width = question["width"]
    settings = dict(question["node"])
    tiny, odd, large = GRIDS[question["axes"]]
    common = {
        "dtype": question["dtype"],
        **{name: settings[name] for name in ("neighborhood", "coarse", "mix")},
    }
    even = {**common, "head_dim": width, "value_dim": width}
    padded = {**common, "head_dim": 3 * width // 4, "value_dim": width // 2 + 1}
    found = [
        Trial(NearCase(**even, grid=odd)),
        Trial(NearCase(**even, grid=tiny, prefix=0, batch=1, heads=1)),
        Trial(NearCase(**padded, grid=odd, prefix=2, suffix=3, layout="BHND")),
        Trial(NearCase(**even, grid=large, suffix=1), repeats=REPEATS),
    ]
    if question["direction"] == "backward":
        found.append(Trial(NearCase(**even, grid=odd, gradient=2**-13)))
    if not INTERPRETED:
        found += [
            Trial(NearCase(**even, grid=odd, prefix=0), "static"),
            Trial(NearCase(**padded, grid=large, prefix=2, suffix=3), "dynamic", REPEATS),
        ]
    return found


def check(question: dict[str, Any]) -> dict[str, str]:
    """The verdict on what a question asks for: {"status", "reason"}."""
    from . import near_parity, parity

    training = question["direction"] == "backward"
    told = trials(question)
    for trial in told:
        case = trial.case
        tokens = case.prefix + math.prod(case.grid) + case.suffix
        near = isinstance(case, near_parity.NearCase)
        compare = near_parity.compare if near else parity.compare
        where = (
            f"{'near attention, ' if near else ''}{case.dtype}, {tokens} tokens, heads of "
            f"{case.head_dim} and {case.value_dim}, "
            f"{'eager' if trial.compiled is None else f'compiled with {trial.compiled} sizes'}"
        )
        try:
            found = compare(
                case,
                question["device"],
                training=training,
                repeats=trial.repeats,
                compiled=trial.compiled,
            )
        except Exception as error:
            status = "impossible" if _lacks_means(error) else "failed"
            return {"status": status, "reason": f"{where}: {_words(error)}"}
        if not found.ok:
            return {"status": "failed", "reason": f"{where}: {found}"}
    return {"status": "passed", "reason": f"{len(told)} cases are right"}


def _lacks_means(error: BaseException) -> bool:
    """Whether an error says nothing of the kernels: no memory, or nothing to compile with.

    Triton compiles its launcher with the system's compiler of C, and says so where there is none.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError | ImportError | FileNotFoundError):
        return True
    text = str(error)
    return "Failed to find C compiler" in text or "InvalidCxxCompiler" in text


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def main() -> None:
    from ..trust import MARK

    question = json.loads(sys.stdin.read())
    try:
        import torch

        from . import parity  # noqa: F401

        if torch.device(question["device"]).type == "cuda":
            torch.cuda.synchronize(question["device"])
    except Exception as error:
        traceback.print_exc()
        found = {"status": "impossible", "reason": _words(error)}
    else:
        found = check(question)
    print(f"\n{MARK}{json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
