"""Numbers in the documents are the ones that the benchmarks wrote."""

import json

from density_guidance.benchmarks import detail_shift, score_alignment
from density_guidance.launcher.environment import PACK


def test_tables_come_from_the_benchmark():
    results = json.loads((PACK / "docs" / "detail_shift.json").read_text())
    assert (PACK / "docs" / "detail_shift.md").read_text() == detail_shift.page(results)
    readme = (PACK / "README.md").read_text()
    _, _, mixture = detail_shift.tables(results)
    assert mixture in readme
    own = results["measured_over_predicted"]["flow"][detail_shift.OWN]
    assert f"{abs(own - 1):.1%}" in readme


def test_score_alignment_table_comes_from_the_benchmark():
    results = json.loads((PACK / "docs" / "score_alignment.json").read_text())
    assert (PACK / "docs" / "score_alignment.md").read_text() == score_alignment.page(results)
    assert score_alignment.readme_table(results) in (PACK / "README.md").read_text()
