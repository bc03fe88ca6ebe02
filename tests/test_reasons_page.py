"""The manual has every reason, and its example of each gives that one."""

from pathlib import Path

import pages

from t5fx.reports import REASONS, Report

PAGE = Path(__file__).parent.parent / "docs" / "reasons.md"


def test_each_reason_has_a_section_whose_example_gives_it():
    names = {"__name__": "reasons"}
    found, printed = {}, ""
    for block in pages.blocks(PAGE):
        if block.language == "text":
            pages.check(PAGE, block, printed)
            continue
        names.pop("report", None)
        printed = pages.execute(PAGE, block, names)
        if (report := names.get("report")) is not None:
            given = report.counts() if isinstance(report, Report) else str(report)
            assert block.section in given, (block.section, str(report))
            found[block.section] = report
    assert found.keys() == REASONS.keys()
