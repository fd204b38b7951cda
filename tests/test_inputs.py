"""Each input is declared once: what the schema, the check, the locale and the help page say of it agrees."""

import math

import pytest
from density_guidance.benchmarks import make_locales
from density_guidance.nodes import NODES
from density_guidance.nodes.host.inputs import Choice, Number, Numbers

DECLARED = [pytest.param(declared, id=f"{node.__name__}-{declared.name}") for node in NODES for declared in node.INPUTS]


def of_kind(*kinds):
    return pytest.mark.parametrize("declared", [p for p in DECLARED if isinstance(p.values[0], kinds)])


def refused(check, value, *words):
    with pytest.raises(ValueError) as error:
        check(value)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_the_schema_has_the_declared_inputs(node):
    inputs = node.define_schema().inputs
    assert [(i.id, i.tooltip) for i in inputs] == [(d.name, d.tooltip) for d in node.INPUTS]


@of_kind(Number)
def test_what_the_widget_offers_is_what_the_check_takes(declared):
    widget = declared.schema()
    for value in (widget.min, widget.max, widget.default):
        assert declared.check(value) == value
    for value in (widget.min - 1, widget.max + 1, math.nan, None, "many"):
        refused(declared.check, value, declared.name, repr(value), str(widget.min), str(widget.max))


@of_kind(Choice)
def test_the_choices_are_those_that_the_check_takes(declared):
    widget = declared.schema()
    assert [declared.check(value) for value in widget.options] == widget.options and widget.default in widget.options
    refused(declared.check, "another", declared.name, "'another'", *widget.options)


@of_kind(Numbers)
def test_lists_of_numbers_name_the_place(declared):
    assert declared.check(None) is None and declared.check([declared.each.default]) == (declared.each.default,)
    refused(declared.check, [declared.each.default, -99], declared.name, f"for {declared.item} 1", "-99")
    refused(declared.check, [], declared.name, "[]", "list")


def test_the_english_texts_are_the_declared_ones():
    """To renew them: python3 run.py bench make_locales."""
    assert make_locales.ENGLISH.read_text(encoding="utf-8") == make_locales.locale()


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_the_tables_of_the_help_page_are_the_declared_ones(node):
    """To renew them: python3 run.py bench make_locales."""
    path, text = make_locales.help_page(node)
    assert path.read_text(encoding="utf-8") == text
