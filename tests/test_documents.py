"""Numbers in the documents are the ones that the benchmarks wrote."""

import json

from density_guidance.benchmarks import detail_shift, log_density
from density_guidance.launcher.environment import PACK


def test_tables_come_from_the_benchmark():
    results = json.loads((PACK / "docs" / "detail_shift.json").read_text())
    assert (PACK / "docs" / "detail_shift.md").read_text() == detail_shift.page(results)
    readme = (PACK / "README.md").read_text()
    _, _, mixture = detail_shift.tables(results)
    assert mixture in readme
    own = results["measured_over_predicted"]["flow"][detail_shift.OWN]
    assert f"{abs(own - 1):.1%}" in readme


def test_log_density_tables_come_from_the_benchmark():
    results = json.loads((PACK / "docs" / "log_density.json").read_text())
    assert (PACK / "docs" / "log_density.md").read_text() == log_density.page(results)
    assert log_density.readme_table(results) in (PACK / "README.md").read_text()
