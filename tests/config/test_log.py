"""What is said on the console."""

from library.log import Console


class _Gone:
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError

    def isatty(self) -> bool:
        return False


def test_a_reader_that_has_gone_does_not_end_a_run(monkeypatch):
    monkeypatch.setattr("sys.stderr", _Gone())
    console = Console()
    assert console.write("text") == 4
    console.flush()
    assert not console.isatty()
