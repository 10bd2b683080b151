"""The rows of a batch while it arrives: complete and in order, in pieces of a bounded size."""

from datetime import UTC, datetime
from uuid import uuid4

from backcast.api.batch_lines import Rows
from backcast.ledger import submissions
from backcast.ledger.submissions import New
from backcast.models import Submission, TaskType

ECHO = TaskType(name="echo", pool="default", input_schema={"type": "object"})
MOMENT = datetime(2030, 1, 31, 8, 0, 0, 123456, tzinfo=UTC)


def row(text: str) -> New:
    submission = Submission(
        run_at=MOMENT, deadline=datetime.max.replace(tzinfo=UTC), lane="ä", metadata={"\u2028": "\0"}
    )
    return submissions.new(ECHO, submission, input_text=text, input_hash=b"", batch_id=uuid4(), stored_until=MOMENT)


def test_rows_come_back_as_they_were() -> None:
    rows, sent = Rows(), [row('{"value": "\\u0000 \u2029 \N{GRINNING FACE}\\n"}') for _ in range(25)]
    for each in sent:
        rows.add(each)
    assert [len(piece) for piece in rows.pieces(10)] == [10, 10, 5]
    for _ in range(2):
        assert [each for piece in rows.pieces(10) for each in piece] == sent
    assert len(rows) == 25
    rows.close()


def test_pieces_have_a_bounded_size() -> None:
    rows = Rows()
    for _ in range(40):
        rows.add(row("x" * 64 * 1024))
    pieces = list(rows.pieces(500))
    assert sum(len(piece) for piece in pieces) == 40
    assert max(sum(len(each.input or "") for each in piece) for piece in pieces) <= 17 * 64 * 1024
    rows.close()
