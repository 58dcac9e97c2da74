"""Markdown tables."""

from msbreg.tables import markdown_table


def test_numbers_stand_to_the_right_and_each_rule_is_one():
    """A rule of one character, which is no more than its colon, would be no rule to Markdown."""
    assert markdown_table(["loss", "K", "time"], [["ours", 4, "1.5 ms"], ["SVD", 8, "10 ms"]]).splitlines() == [
        "| loss |  K |   time |",
        "| ---- | -: | -----: |",
        "| ours |  4 | 1.5 ms |",
        "| SVD  |  8 |  10 ms |",
    ]
