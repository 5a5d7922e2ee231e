"""Files of JSON lines that a killed run left with half of a line."""

import pytest

from trl_sgpo.analysis.jsonable import append_lines, whole_lines


@pytest.mark.parametrize(
    ("left", "kept"), [("", []), ('{"a": 1}\n', ['{"a": 1}']), ('{"a": 1}\n{"a', ['{"a": 1}']), ('{"a', [])]
)
def test_half_a_line_is_left_out_and_replaced_by_the_next(tmp_path, caplog, left, kept):
    path = tmp_path / "records.jsonl"
    assert whole_lines(path) == []
    path.write_text(left)
    assert whole_lines(path) == kept
    assert path.read_text() == left  # who only reads changes nothing
    assert ("incomplete" in caplog.text) == (left != "" and not left.endswith("\n"))
    append_lines(path, [{"b": 2}, {"c": 3}])
    assert whole_lines(path) == [*kept, '{"b": 2}', '{"c": 3}']
